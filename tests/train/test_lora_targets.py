"""The [lora] table of a recipe: which modules it means, and what it refuses."""

from dataclasses import replace
from typing import Any

import pytest

from camelid.errors import UserError
from camelid.model.adapters import LoRAPlan, MatrixPlan
from camelid.model.config import ModelConfig
from camelid.runs.lora_targets import plan_adapters
from camelid.runs.recipe import read_recipe, structure, write_recipe
from camelid.train.lora_config import LoRAConfig
from families import FAMILIES
from test_recipe import table
from tiny import tiny_config

CONFIG = tiny_config(num_layers=3)
PHI = replace(FAMILIES["phi"].ours, family="phi")
PHI3 = replace(FAMILIES["phi3, sliding window"].ours, family="phi3")


def plan(config: ModelConfig = CONFIG, **fields: Any) -> LoRAPlan:
    lora = structure(table(lora=fields)).lora
    assert lora is not None
    return plan_adapters(lora, config)


def ranks(config: ModelConfig = CONFIG, **fields: Any) -> dict[str, tuple[int, ...]]:
    """The ranks of the layers of each parameter, by the last part of its path."""
    matrices = plan(config, **{"rank": 4} | fields).matrices
    return {path.rpartition(".")[2]: matrix.ranks for path, matrix in matrices.items()}


def test_the_defaults_are_every_matrix_of_every_layer_with_a_scale_of_two():
    found = plan(rank=16)
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    assert [path.rpartition(".")[2] for path in found.matrices] == names
    assert set(found.matrices.values()) == {MatrixPlan((16, 16, 16), (32.0, 32.0, 32.0))}
    assert found.scales("layers.attn.q_proj") == (2.0, 2.0, 2.0)
    stable = plan(rank=16, alpha=8, rank_stabilized=True)
    assert stable.scales("layers.attn.q_proj") == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj"], {"q_proj": (4, 4, 4)}),
        (["embed", "lm_head"], {"embed": (4,), "lm_head": (4,)}),
        (["embed_tokens"], {"embed": (4,)}),
        ([r"layers\.[02]\..*(q|v)_proj"], {"q_proj": (4, 0, 4), "v_proj": (4, 0, 4)}),
        (["model.layers.1.self_attn.o_proj", "layers.2.attn.o_proj"], {"o_proj": (0, 4, 4)}),
        (["mlp", "k_proj"], {"k_proj": (4,) * 3, "gate_proj": (4,) * 3, "up_proj": (4,) * 3, "down_proj": (4,) * 3}),
    ],
    ids=str,
)
def test_targets_are_groups_names_and_patterns(targets: list[str], expected: dict[str, tuple[int, ...]]):
    assert ranks(targets=targets) == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["layers.0-1.attn"], {"q_proj": (4, 4, 0), "k_proj": (4, 4, 0), "v_proj": (4, 4, 0), "o_proj": (4, 4, 0)}),
        (["*ate_proj", "layers.2-9.attn.o_proj"], {"gate_proj": (4, 4, 4), "o_proj": (0, 0, 4)}),
        ([r"layers.1.*q_proj"], {"q_proj": (0, 4, 0)}),  # a regular expression, since it matches
    ],
    ids=str,
)
def test_patterns_of_parameters_choose_modules_too(targets: list[str], expected: dict[str, tuple[int, ...]]):
    assert ranks(targets=targets) == expected


def test_the_first_pattern_that_matches_gives_the_rank_and_the_alpha():
    found = plan(
        rank=4,
        targets=["q_proj", "down_proj"],
        rank_pattern={r"layers\.1\..*q_proj": 5, "q_proj": 2},
        alpha_pattern={"down_proj": 3},
    )
    assert found.matrices["layers.attn.q_proj"] == MatrixPlan((2, 5, 2), (8.0, 8.0, 8.0))
    assert found.matrices["layers.mlp.down_proj"] == MatrixPlan((4, 4, 4), (3.0, 3.0, 3.0))


def test_modules_have_the_names_of_their_family_and_those_of_camelid():
    layers = (2,) * PHI.num_layers
    assert ranks(PHI, rank=2, targets=["dense", "fc1"]) == {"o_proj": layers, "up_proj": layers}
    assert ranks(PHI, rank=2, targets=["o_proj"]) == {"o_proj": layers}
    assert ranks(PHI3, rank=2, targets=["qkv_proj"]).keys() == {"q_proj", "k_proj", "v_proj"}
    assert ranks(PHI3, rank=2, targets=["v_proj"]).keys() == {"v_proj"}


@pytest.mark.parametrize(
    ("fields", "problem", "advice"),
    [
        (
            {"targets": ["query"]},
            r"lora\.targets has 'query', which matches no module",
            "q_proj, k_proj, v_proj, o_proj",
        ),
        (
            {"targets": ["q_proj", r"layers\.7\..*"]},
            r"lora\.targets has 'layers",
            r"model\.layers\.0\.self_attn\.q_proj",
        ),
        (
            {"targets": [".*wq|.*wv"]},
            r"lora\.targets has '\.\*wq\|\.\*wv', which matches no module",
            r"\nwq is named q_proj here\. wv is named v_proj here\. The modules are embed_tokens",
        ),
        (
            {"targets": ["attention.w_qkv"]},
            "which matches no module",
            r"w_qkv is named q_proj, k_proj, v_proj here\. The",
        ),
        (
            {"targets": ["q_proj"], "rank_pattern": {"w2": 2}},
            r"lora\.rank_pattern has 'w2'",
            r"w2 is named down_proj here\. The modules are q_proj",
        ),
        ({"targets": ["attn_norm"]}, r"lora\.targets has 'attn_norm'", "attention and mlp are groups"),
        ({"targets": []}, r"lora\.targets = \(\)", "Name modules"),
        ({"targets": ["q_proj("]}, r"lora\.targets has 'q_proj\(', which is not a regular expression", "Write a name"),
        ({"targets": ["q_proj"], "rank_pattern": {"k_proj": 2}}, r"lora\.rank_pattern has 'k_proj'", "are q_proj"),
        (
            {"targets": ["q_proj"], "alpha_pattern": {"up": 2}},
            r"lora\.alpha_pattern has 'up'",
            "The modules are q_proj",
        ),
        ({"rank": 21}, r"lora has rank 21 for layers\.attn\.k_proj, whose .* at most rank 20", r"lora\.rank_pattern"),
        ({"rank": 0}, r"lora\.rank = 0", "1 or more"),
        ({"rank_pattern": {"q_proj": 0}}, r"lora\.rank_pattern has 'q_proj' = 0", "1 or more"),
        ({"alpha": -1}, r"lora\.alpha = -1", "above 0"),
        ({"dropout": 1.0}, r"lora\.dropout = 1\.0", "probability"),
        ({"dropout": 0.1, "targets": ["embed"]}, r"lora\.dropout = 0\.1 has no effect", "add targets"),
        (
            {"kind": "dora", "targets": ["embed"]},
            r"lora\.kind = 'dora' does not apply to the embedding",
            "Leave embed out",
        ),
        ({"kind": "loha"}, r"lora\.kind: 'loha' is not one of 'lora', 'dora'", r"docs/recipes\.md"),
        ({"base": "fp8"}, r"lora\.base: 'fp8' is not one of 'float32', 'bfloat16', 'int8', 'nf4'", r"docs/recipes\.md"),
        ({"r": 8}, r"no field 'lora\.r'", r"Did you mean 'lora\.rank'"),
        ({"target_modules": ["q_proj"]}, r"no field 'lora\.target_modules'", r"Did you mean 'lora\.targets'"),
        ({"modules_to_save": ["norm"]}, r"no field 'lora\.modules_to_save'", "It has rank"),
    ],
    ids=str,
)
def test_a_table_that_does_not_fit_is_refused_by_its_field(fields: dict[str, Any], problem: str, advice: str):
    with pytest.raises(UserError, match=problem) as error:
        plan(**{"rank": 4} | fields)
    assert error.match(advice)


def test_dora_of_a_part_of_one_matrix_of_peft_is_refused():
    with pytest.raises(UserError, match=r"names a part of .*qkv_proj\.weight.*\n.*q_proj, k_proj, v_proj"):
        plan(PHI3, rank=2, kind="dora", targets=["q_proj"])
    assert plan(PHI3, rank=2, kind="dora", targets=["qkv_proj"]).dora


def test_a_recipe_with_lora_needs_a_base():
    model = dict(table(), init=None, tokenizer="tok", model={"preset": "tinyllama_1b"}, lora={})
    with pytest.raises(UserError, match=r"\[lora\] and no init"):
        structure({key: value for key, value in model.items() if value is not None})


def test_a_lora_table_is_written_and_read_and_set_on_the_command_line(tmp_path: Any):
    file = tmp_path / "recipe.toml"
    lora = {"rank": 8, "rank_pattern": {r"layers\.1\..*": 4}, "targets": ["q_proj"]}
    file.write_text(write_recipe(structure(table(lora=lora))))
    assert read_recipe(file).lora == LoRAConfig(rank=8, rank_pattern={r"layers\.1\..*": 4}, targets=("q_proj",))
    file.write_text(write_recipe(structure(table())))
    assert read_recipe(file).lora is None
    words = [
        "--lora.rank",
        "8",
        "--lora.targets",
        "mlp",
        "--lora.alpha-pattern",
        "{up_proj = 4}",
        "--lora.kind",
        "dora",
    ]
    found = read_recipe(file, words).lora
    assert found == LoRAConfig(rank=8, targets=("mlp",), alpha_pattern={"up_proj": 4.0}, kind="dora")
