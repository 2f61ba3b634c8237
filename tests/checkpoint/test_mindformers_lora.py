"""LoRA factors under MindFormers' names: PEFT's own adapters, renamed, are the adapters that PEFT saved.

No file of MindFormers' LoRA is at hand: the names are those of its code, and the values are those that PEFT saved.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from camelid.api import load_params
from camelid.checkpoint.adapters.added import with_adapters
from camelid.checkpoint.adapters.lora import AdaptedCheckpoint
from camelid.checkpoint.checkpoint import Checkpoint
from camelid.checkpoint.registry import open_checkpoint
from camelid.errors import UserError
from camelid.model.config import ComputeConfig
from camelid.model.params import named
from camelid.parallel.mesh import one_device
from mindspore_files import file, record
from runs import called
from tiny import save_hf, tiny_config, tiny_params, to_transformers, transformers_twin

# PEFT speaks of embedding tables that it saves, and of Hub names that it cannot look up.
pytestmark = [
    pytest.mark.quick_compile,
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

TINY = tiny_config(head_dim=8)
ALPHA, RANK = 12, 3
MODULES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
OTHERS = {
    "model.embed_tokens.weight": "model.tok_embeddings.embedding_weight",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.norm.": "model.norm_out.",
}
WAYS = {
    "mindpet 1.0.0": ("tk_delta_lora_a", "tk_delta_lora_b"),
    "mindpet, with the names of its parameters": ("mindpet_delta_lora_A", "mindpet_delta_lora_B"),
    "mindpet": ("mindpet_delta_lora_a", "mindpet_delta_lora_b"),
    "parallel_core": ("lora_A.weight", "lora_B.weight"),
    "pynative": ("lora_a", "lora_b"),
}
MINDPET = WAYS["mindpet"]
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, and with `adapter`, which PEFT saved for it."""
    folder = tmp_path_factory.mktemp("peft")
    save_hf(transformers_twin(TINY, tiny_params(TINY)), folder / "base")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    targets = [name.rpartition(".")[2] for name in MODULES]
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) / 5)
    model.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def merged(folder: Path) -> Arrays:
    """The parameters that PEFT merges, by camelid's paths."""
    model = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(folder / "base"), folder / "adapter"
    )
    state = model.merge_and_unload().state_dict()  # pyright: ignore[reportCallIssue]
    return {name: tensor.numpy() for name, tensor in state.items()}


def renamed(name: str) -> str:
    for theirs, word in {**MODULES, **OTHERS}.items():
        name = name.replace(theirs, word)
    return name


def factors(folder: Path, names: tuple[str, str] = MINDPET) -> Arrays:
    """PEFT's adapter under MindFormers' names."""
    words = dict(zip(("lora_A.weight", "lora_B.weight"), names, strict=True))
    held = load_file(folder / "adapter" / "adapter_model.safetensors")
    return {
        renamed(re.sub(r"lora_[AB]\.weight$", lambda match: words[match[0]], name.removeprefix("base_model.model."))): x
        for name, x in held.items()
    }


def weights() -> Arrays:
    arrays = to_transformers(tiny_params(TINY))
    return {
        renamed(name): x if x.ndim < 3 else x.reshape(-1, TINY.embed_dim if "o_proj" not in name else x[0].size)
        for name, x in arrays.items()
    }


def written(path: Path, arrays: Mapping[str, np.ndarray], yaml: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({name: np.ascontiguousarray(x) for name, x in arrays.items()}, path, {"format": "ms"})
    else:
        path.write_bytes(file(arrays))
    if yaml is not None:
        (path.parent / "run_llama_7b_lora.yaml").write_text(yaml)
    return path


def yaml(alpha: float = ALPHA, rank: int = RANK) -> str:
    return f"""
model:
  model_config:
    pet_config:
      pet_type: lora
      # lora_alpha: 99
      lora_rank: {rank}
      lora_alpha: {alpha}
"""


def assert_merged(checkpoint: Checkpoint, merged: Arrays) -> None:
    params = load_params(checkpoint, ComputeConfig(), one_device())
    for name, values in to_transformers(params).items():
        expected = merged[name]
        largest = np.abs(expected).max()
        np.testing.assert_allclose(values.reshape(expected.shape), expected, rtol=0, atol=1e-6 * largest, err_msg=name)


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    held, expected = (load_file(each / "adapter_model.safetensors") for each in (ours, theirs))
    assert held.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(held[name], array, err_msg=name)


# Factors alone --------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_factors_become_the_adapter_that_peft_saved(folder: Path, tmp_path: Path, way: str):
    lora = written(tmp_path / "lora.ckpt", factors(folder, WAYS[way]))
    made = called(
        "convert", folder / "base", tmp_path / "out", "--adapter", lora, "--lora-alpha", ALPHA, "--to", "peft"
    )
    assert made.returncode == 0, made.stderr
    assert_same_tensors(tmp_path / "out", folder / "adapter")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (RANK, ALPHA)
    assert settings["base_model_name_or_path"] == str(folder / "base")


def test_peft_opens_the_converted_adapter_and_computes_the_same(folder: Path, tmp_path: Path):
    lora = written(tmp_path / "lora" / "lora.safetensors", factors(folder), yaml())
    assert called("convert", folder / "base", tmp_path / "out", "--adapter", lora, "--to", "peft").returncode == 0
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        ours, theirs = (
            peft.AutoPeftModelForCausalLM.from_pretrained(each)(tokens).logits
            for each in (tmp_path / "out", folder / "adapter")
        )
    np.testing.assert_array_equal(ours.numpy(), theirs.numpy())


def test_the_alpha_is_that_of_the_yaml_and_a_weight_multiplies_the_update(folder: Path, tmp_path: Path, merged: Arrays):
    base = open_checkpoint(folder / "base")
    lora = written(tmp_path / "lora" / "lora.ckpt", factors(folder), yaml(2 * ALPHA))
    assert_merged(with_adapters(base, [f"{lora}=0.5"]), merged)
    assert_merged(with_adapters(base, [str(lora)], ALPHA), merged)
    manifest = {"format": "mindformers_pynative_lora_adapter_v1", "lora_config": {"lora_rank": 3, "lora_alpha": 12.0}}
    written(tmp_path / "new" / "adapter.safetensors", factors(folder, WAYS["pynative"]))
    (tmp_path / "new" / "mindformers_adapter_config.json").write_text(json.dumps(manifest, indent=2))
    assert_merged(with_adapters(base, [str(tmp_path / "new" / "adapter.safetensors")]), merged)


def interleaved(array: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a half-split matrix in the order in which rotary pairs are neighbors."""
    halves = array.reshape(heads, 2, -1, array.shape[-1])
    return halves.swapaxes(1, 2).reshape(array.shape)


def test_the_rows_of_older_models_are_interleaved(folder: Path, tmp_path: Path, merged: Arrays):
    def older(arrays: Arrays, ends: tuple[str, str]) -> Arrays:
        heads = {ends[0]: TINY.num_heads, ends[1]: TINY.num_kv_heads}
        return {
            name: next((interleaved(x, n) for end, n in heads.items() if name.endswith(end)), x)
            for name, x in arrays.items()
        }

    held = older(factors(folder), ("wq.mindpet_delta_lora_b", "wk.mindpet_delta_lora_b"))
    lora = written(tmp_path / "lora" / "lora.ckpt", held, yaml())
    assert_merged(with_adapters(open_checkpoint(folder / "base"), [f"mindspore-interleaved::{lora}"]), merged)
    held |= older(weights(), ("wq.weight", "wk.weight"))
    both = written(tmp_path / "both" / "both.ckpt", held, yaml())
    assert_merged(open_checkpoint(f"mindspore-interleaved::{both}", config=TINY), merged)
    base = written(tmp_path / "base.ckpt", older(weights(), ("wq.weight", "wk.weight")))
    opened = open_checkpoint(f"mindspore-interleaved::{base}", config=TINY)
    assert_merged(with_adapters(opened, [str(lora)]), merged)  # the layout of the base


# With the base --------------------------------------------------------------------------


def test_a_checkpoint_that_holds_base_and_factors_is_merged_when_it_is_read(
    folder: Path, tmp_path: Path, merged: Arrays
):
    training = {f"adam_m.{name}": x for name, x in factors(folder).items()} | {"global_step": np.ones(1, np.float32)}
    path = written(tmp_path / "run" / "llama_lora-1_2.ckpt", weights() | factors(folder) | training, yaml())
    opened = open_checkpoint(path, config=TINY)
    assert isinstance(opened, AdaptedCheckpoint)
    assert_merged(opened, merged)
    assert any("not read: adam_m." in note for note in opened.notes)
    assert opened.assumed_layout is not None
    assert opened.files == [path]
    plain = open_checkpoint(written(tmp_path / "plain.ckpt", weights()), config=TINY)
    assert_merged(plain, dict(to_transformers(tiny_params(TINY))))


def test_such_a_checkpoint_is_converted_merged_or_as_an_adapter(folder: Path, tmp_path: Path, merged: Arrays):
    path = written(tmp_path / "run" / "both.ckpt", weights() | factors(folder))
    options = "--config", folder / "base" / "config.json", "--lora-alpha", ALPHA
    made = called("convert", path, tmp_path / "merged", *options)
    assert made.returncode == 0, made.stderr
    assert_merged(open_checkpoint(tmp_path / "merged"), merged)
    assert called("convert", path, tmp_path / "adapter", *options, "--to", "peft").returncode == 0
    assert_same_tensors(tmp_path / "adapter", folder / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] is None  # the base is not in Hugging Face's form


def test_factors_of_concatenated_matrices_are_taken_apart(folder: Path, tmp_path: Path):
    """With qkv_concat, one pair of factors adapts queries, keys and values, whose rows alternate by key head."""
    draw, kv = np.random.default_rng(0), TINY.num_kv_heads
    arrays, a, b = weights(), {}, {}
    for layer in range(TINY.num_layers):
        block = f"model.layers.{layer}."
        q, k, v = (arrays.pop(f"{block}attention.w{x}.weight").reshape(kv, -1, TINY.embed_dim) for x in "qkv")
        arrays[f"{block}attention.w_qkv.weight"] = np.concatenate([q, k, v], 1).reshape(-1, TINY.embed_dim)
        gate, up = (arrays.pop(f"{block}feed_forward.w{x}.weight") for x in "13")
        arrays[f"{block}feed_forward.w_gate_hidden.weight"] = np.stack([gate, up], 1).reshape(-1, TINY.embed_dim)
        for name in ("attention.w_qkv", "feed_forward.w_gate_hidden"):
            module = f"{block}{name}"
            a[module] = draw.standard_normal((RANK, TINY.embed_dim), np.float32)
            b[module] = draw.standard_normal((len(arrays[f"{module}.weight"]), RANK), np.float32)
    held = {f"{m}.lora_a": x for m, x in a.items()} | {f"{m}.lora_b": x for m, x in b.items()}
    ours = open_checkpoint(written(tmp_path / "both" / "a.ckpt", arrays | held, yaml()), config=TINY)
    for module in a:
        arrays[f"{module}.weight"] = arrays[f"{module}.weight"] + ALPHA / RANK * (b[module] @ a[module])
    expected = open_checkpoint(written(tmp_path / "merged.ckpt", arrays), config=TINY)
    one, other = (named(load_params(each, ComputeConfig(), one_device())) for each in (ours, expected))
    for path, array in other.items():
        np.testing.assert_allclose(np.asarray(one[path]), np.asarray(array), rtol=0, atol=1e-4, err_msg=path)


# Errors ---------------------------------------------------------------------------------


def change(name: str, value: np.ndarray | None) -> Callable[[Arrays], Arrays]:
    """Replaces one factor, or removes it."""

    def changed(arrays: Arrays) -> Arrays:
        held = arrays | ({} if value is None else {name: value})
        return held if value is not None else {key: array for key, array in held.items() if key != name}

    return changed


FIRST = "model.layers.0.attention.wq.mindpet_delta_lora"
CASES: dict[str, tuple[Callable[[Arrays], Arrays], str | None, str]] = {
    "no alpha": (dict, None, r"factors of rank 3, and not their lora_alpha.*--lora-alpha NUMBER"),
    "alpha 0": (dict, "lora_alpha: 0\n", r"has lora_alpha = 0"),
    "no number": (dict, "lora_alpha: 1.2.3\n", r"has lora_alpha = 1\.2\.3"),
    "two alphas": (dict, yaml() + "      lora_alpha: 13\n", r"lora_alpha is ambiguous: 12 in .*, 13 in"),
    "the YAML of another run": (dict, yaml(rank=8), r"run_llama_7b_lora.yaml has lora_rank 8, and .* have rank 3"),
    "one factor of two": (change(f"{FIRST}_b", None), yaml(), "without the factor b of model.layers.0.attention.wq"),
    "two generations": (
        change("model.layers.0.attention.wq.lora_a", np.ones((3, 48), np.float32)),
        yaml(),
        "named in two ways: .* and .*",
    ),
    "another shape": (change(f"{FIRST}_a", np.ones((3, 47), np.float32)), yaml(), r"have shapes \(3, 47\) and"),
    "an unknown module": (
        lambda arrays: {name.replace("attention.wo", "attention.wx"): array for name, array in arrays.items()},
        yaml(),
        "attention.wx, which is not a matrix of this model",
    ),
    "the base too": (lambda arrays: arrays | weights(), yaml(), "besides LoRA factors.*give it as SOURCE"),
    "no factors": (lambda arrays: weights(), yaml(), "has no LoRA factors"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_an_error_that_names_it(folder: Path, tmp_path: Path, case: str):
    make, text, message = CASES[case]
    lora = written(tmp_path / "lora" / "lora.safetensors", make(factors(folder)), text)
    with pytest.raises(UserError) as error:
        with_adapters(open_checkpoint(folder / "base"), [str(lora)])
    assert re.search(message, f"{error.value.problem} {error.value.advice}", re.DOTALL), error.value


def test_factors_of_integers_are_refused(folder: Path, tmp_path: Path):
    arrays = factors(folder)
    a = arrays.pop(f"{FIRST}_a")
    path = written(tmp_path / "lora.ckpt", arrays, yaml())
    path.write_bytes(path.read_bytes() + record(f"{FIRST}_a", "Int32", a.shape, a.astype("<i4").tobytes()))
    with pytest.raises(UserError, match=f"{FIRST}_a is int32"):
        with_adapters(open_checkpoint(folder / "base"), [str(path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{lora}", "out", "--config", "{base}"], "LoRA factors without the weights of their base"),
        (["{base}", "out", "--adapter", "{peft}", "--lora-alpha", "3"], "has a lora_alpha of its own"),
        (["{base}", "out", "--lora-alpha", "3"], "for LoRA factors in MindSpore files, and .* is hf"),
        (["{plain}", "out", "--config", "{base}", "--lora-alpha", "3"], "has no LoRA factors"),
        (["{base}", "out", "--adapter", "{lora}", "--lora-alpha", "0"], "--lora-alpha 0"),
        (["{base}", "out", "--to", "peft"], "has no adapter to write"),
        (["{base}", "out", "--to", "peft", "--adapter", "{peft}", "--adapter", "{peft}=2"], "here are several"),
        (["{base}", "out", "--to", "peft", "--adapter", "{peft}", "--dtype", "bfloat16"], "written as it is"),
    ],
)
def test_options_that_do_not_apply_are_refused(folder: Path, tmp_path: Path, arguments: list[str], message: str):
    paths: dict[str, Any] = {"base": folder / "base", "peft": folder / "adapter"}
    paths["lora"] = written(tmp_path / "lora" / "lora.ckpt", factors(folder))
    paths["plain"] = written(tmp_path / "plain" / "plain.ckpt", weights())
    made = called("convert", *(str(tmp_path / each) if each == "out" else each.format(**paths) for each in arguments))
    assert made.returncode == 2
    assert re.search(message, " ".join(made.stderr.split())), made.stderr
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_another_weight_is_written_with_its_alpha_multiplied(folder: Path, tmp_path: Path):
    adapter = f"{folder / 'adapter'}=0.5"
    assert called("convert", folder / "base", tmp_path / "out", "--to", "peft", "--adapter", adapter).returncode == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == ALPHA / 2
    again = called("convert", folder / "base", tmp_path / "out", "--to", "peft", "--adapter", adapter, "--overwrite")
    assert again.returncode == 0, again.stderr


def test_a_head_with_factors_is_no_longer_tied(tmp_path: Path):
    tied = replace(TINY, tie_embeddings=True)
    save_hf(transformers_twin(tied, tiny_params(tied)), tmp_path / "tied")
    draw = np.random.default_rng(0)
    shapes = {"lm_head.lora_a": (RANK, TINY.embed_dim), "lm_head.lora_b": (TINY.vocab_size, RANK)}
    held = {name: draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    lora = written(tmp_path / "lora" / "lora.ckpt", held, yaml())
    base = open_checkpoint(tmp_path / "tied")
    opened = with_adapters(base, [str(lora)])
    assert not opened.config.tie_embeddings
    update = ALPHA / RANK * (held["lm_head.lora_b"] @ held["lm_head.lora_a"])
    params = named(load_params(opened, ComputeConfig(), one_device()))
    table = np.asarray(named(load_params(base, ComputeConfig(), one_device()))["embed"])
    np.testing.assert_array_equal(params["embed"], table)
    np.testing.assert_allclose(params["lm_head"], table + update, rtol=0, atol=1e-5)
