"""Samples in the course of training: from which parameters, where they are written, and that they change nothing."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import camelid
import camelid.generate.decode
import camelid.runs.run
from camelid.api import Model
from camelid.errors import UserError
from camelid.model.config import ComputeConfig
from camelid.parallel.mesh import MeshConfig, one_device
from camelid.parallel.stop_signal import StopSignal
from camelid.runs.run import run
from camelid.runs.samples import Samples, encode_prompts
from camelid.text.chat import load_template
from camelid.text.messages import Message
from camelid.text.tokenizer import load_tokenizer
from camelid.train.config import SamplesConfig
from camelid.train.loggers import Terminal
from camelid.train.state import TrainState
from runs import VOCAB, called, losses, recipe, tiny_run, write_recipe_file
from text.tiny import save_byte_tokenizer
from tiny import tiny_config, tiny_params

pytestmark = pytest.mark.quick_compile

PROMPTS = ["abc, \N{SNOWMAN}", "h"]
SAMPLES = {"prompts": PROMPTS, "every": 2, "max_new_tokens": 5, "temperature": 1.0, "seed": 7}
CONFIG = tiny_config(vocab_size=VOCAB, bos_id=256, eos_ids=(257,))


class StopAfterTwo(StopSignal):
    def should_stop(self, step: int) -> bool:
        return step == 2


def sampled_run(folder: Path, samples: dict[str, Any] | None = SAMPLES, **fields: Any) -> dict[str, Any]:
    """A recipe's table: four steps with everything that samples could disturb."""
    shared = {"ema": {"decay": 0.9}, "dropout": {"residual": 0.1}, "data__validation_fraction": 0.3}
    shared |= {"optimizer__learning_rate": 0.1}  # so that the average differs from the parameters
    table = tiny_run(folder, **shared | {"train__checkpoint_every": 2, "optimizer__decay_steps": 4} | fields)
    return table if samples is None else table | {"samples": samples}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with samples, on eight devices."""
    folder = tmp_path_factory.mktemp("straight")
    jitted: list[Any] = [camelid.generate.decode._first_tokens, camelid.generate.decode._more_tokens]
    programs = [function._cache_size() for function in jitted]
    done = called("train", write_recipe_file(sampled_run(folder), folder / "recipe.toml"))
    assert done.returncode == 0, done.stderr
    compiled = [function._cache_size() for function in jitted]
    assert compiled == [size + 1 for size in programs], "each program is compiled once"
    (folder / "stderr.txt").write_text(done.stderr)
    return folder / "run"


def test_each_step_has_a_line_for_each_prompt(straight: Path):
    assert [(row["step"], row["prompt"], row["seed"]) for row in rows(straight)] == [
        (step, prompt, 7 + number) for step in (0, 2, 4) for number, prompt in enumerate(PROMPTS)
    ]
    assert all(row["finish_reason"] in ("stop", "length") for row in rows(straight))
    said = (straight.parent / "stderr.txt").read_text()
    assert re.search(r"step 4: validation loss .*\nstep 4: samples of the moving average\n  > abc, \N{SNOWMAN}\n", said)


def test_samples_are_what_the_average_of_the_parameters_generates(straight: Path):
    options = {"max_new_tokens": 5, "temperature": 1.0, "seed": 7}
    last = [row["completion"] for row in rows(straight) if row["step"] == 4]
    average, trained = (
        [x.text for x in camelid.load(straight / name, mesh=MeshConfig(fsdp=8)).generate(PROMPTS, **options)]
        for name in ("model_ema", "model")
    )
    assert last == average
    assert last != trained


def test_samples_change_no_bit_of_training(straight: Path, tmp_path: Path):
    run(recipe(sampled_run(tmp_path, samples=None)))
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    names = ("step", "loss", "gradient_norm")
    ours, theirs = (
        [[row[name] for name in names] for row in losses(folder)] for folder in (straight, tmp_path / "run")
    )
    assert ours == theirs


def test_a_resumed_run_has_the_lines_of_one_that_was_not_interrupted(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    table = sampled_run(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(camelid.runs.run, "StopSignal", StopAfterTwo)
        assert run(recipe(table)).steps == 2
    assert {row["step"] for row in rows(tmp_path / "run")} == {0}, "a run that is stopping does not sample"
    # As if it had been killed while it wrote, after a later step whose checkpoint was not complete.
    expected = (straight / "samples.jsonl").read_text()
    cut = "".join(expected.splitlines(keepends=True)[:3])
    (tmp_path / "run" / "samples.jsonl").write_text(
        cut + json.dumps({**rows(straight)[0], "step": 3}) + '\n{"step": 3, "pr'
    )
    run(recipe(table))
    assert (tmp_path / "run" / "samples.jsonl").read_text() == expected


def test_prompts_may_change_when_a_run_is_resumed(straight: Path, tmp_path: Path):
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    table = sampled_run(straight.parent, SAMPLES | {"prompts": ["new"]}, train__steps=5) | {"run": str(folder)}
    run(recipe(table))
    before = rows(straight)
    assert rows(folder)[: len(before)] == before
    assert [(row["step"], row["prompt"]) for row in rows(folder)[len(before) :]] == [(4, "new"), (5, "new")]


# Prompts ------------------------------------------------------------------------------------


def store(*templates: str | None) -> Any:
    return SimpleNamespace(templates=set(templates))


def test_prompts_of_chats_have_the_template_of_the_training_data(tmp_path: Path):
    tokenizer = load_tokenizer(save_byte_tokenizer(tmp_path))
    plain = [[256, *b"hi"]]
    chat = [Message("system", "Be kind."), Message("user", "hi")]
    ids, _ = load_template("llama2", tokenizer).render(chat, tokenizer, add_generation_prompt=True)
    cases: list[tuple[dict[str, Any], list[Any], Any]] = [
        ({"system": "Be kind."}, [store("llama2"), store("llama2")], [ids.tolist()]),
        ({"system": "Be kind.", "chat": True}, [store("llama2"), store()], [ids.tolist()]),
        ({}, [store("llama2"), store()], plain),
        ({}, [store("llama2", "alpaca")], plain),
        ({}, [store("of a tokenizer that is not here")], plain),
        ({"chat": False}, [store("llama2")], plain),
    ]
    config = tiny_config(vocab_size=VOCAB, context_length=200)
    for fields, stores, expected in cases:
        assert encode_prompts(SamplesConfig(prompts=("hi",), **fields), config, tokenizer, stores) == expected, fields
    refused: list[tuple[dict[str, Any], list[Any], str]] = [
        ({"chat": True}, [store("llama2", None)], r"several chat templates: llama2, that of the tokenizer"),
        ({"chat": True}, [store()], r"has no chat template"),
        ({"system": "Be kind."}, [store()], r"the training data do not have one chat template"),
        ({"max_new_tokens": 200}, [store()], r"\[samples\]: prompt 0 has 3 tokens"),
    ]
    for fields, stores, problem in refused:
        with pytest.raises(UserError, match=problem):
            encode_prompts(SamplesConfig(prompts=("hi",), **fields), config, tokenizer, stores)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"prompts": []}, r"samples\.prompts = \[\]"),
        ({"prompts": ["a", ""]}, r"samples\.prompts = \['a', ''\]"),
        ({"every": 0}, r"samples\.every = 0"),
        ({"max_new_tokens": 0}, r"samples\.max_new_tokens = 0"),
        ({"temperature": -1.0}, r"samples\.temperature = -1\.0"),
        ({"temperature": float("nan")}, r"samples\.temperature = nan"),
        ({"chat": False, "system": "x"}, r"samples\.system = 'x' is a message of a chat"),
    ],
)
def test_fields_that_cannot_work_are_refused(tmp_path: Path, fields: dict[str, Any], problem: str):
    with pytest.raises(UserError, match=problem):
        recipe(sampled_run(tmp_path, SAMPLES | fields))


def test_a_prompt_on_the_command_line_may_have_commas(tmp_path: Path):
    file = write_recipe_file(sampled_run(tmp_path), tmp_path / "recipe.toml")
    done = called("train", file, "--samples.prompts", "One day, Tim", "--print-recipe")
    assert 'prompts = [\n    "One day, Tim",\n]' in done.stdout


# What is said -------------------------------------------------------------------------------


def test_a_model_without_finite_logits_ends_no_run_and_control_characters_reach_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tokenizer = load_tokenizer(save_byte_tokenizer(tmp_path / "tokenizer"))
    params = jax.tree.map(lambda x: jnp.full_like(x, np.nan), tiny_params(CONFIG))
    sent = []
    samples = Samples(
        recipe(sampled_run(tmp_path, SAMPLES | {"prompts": ["a\x1b[2J\nb"]})),
        lambda params: Model(CONFIG, params, tokenizer, ComputeConfig(), one_device()),
        [[256, 97]],
        None,
        tmp_path,
        Terminal(0, 4),
        [SimpleNamespace(write_samples=lambda step, rows: sent.append((step, rows)))],  # type: ignore
        0,
    )
    samples.write(TrainState(jnp.int32(2), params, ()), 2)
    samples.close()
    expected = {"step": 2, "prompt": "a\x1b[2J\nb", "completion": "", "finish_reason": "error", "seed": 7}
    assert rows(tmp_path) == [expected]
    assert sent == [(2, [expected])]
    assert capsys.readouterr().err == (
        "step 2: samples\n  > a\N{REPLACEMENT CHARACTER}[2J\n    b\n    (the logits are NaN or infinite)\n"
    )
