"""A dry run: it finds the program and the sizes of the run itself, says what the run would do, and leaves nothing."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import pytest

import camelid.runs.dry_run
import camelid.runs.run
from camelid.api import Model
from camelid.checkpoint.state import saved_state
from camelid.disk.locks import locked
from camelid.disk.space import format_bytes
from camelid.errors import UserError
from camelid.model.config import ComputeConfig
from camelid.model.decoder import declare_decoder
from camelid.model.flops import product_flops, training_flops
from camelid.model.params import abstract
from camelid.parallel.mesh import one_device
from camelid.runs.dry_run import dry_run
from camelid.runs.dry_run_report import report_lines
from camelid.runs.file_names import FINISHED
from camelid.runs.program import trace_step
from camelid.runs.reference import REFERENCE
from camelid.runs.run import run
from camelid.text.tokenizer import load_tokenizer
from camelid.train.objective import NextTokenLoss
from end_to_end.test_preference import pairs_run
from runs import VOCAB, called, contents, lay_over, recipe, tensor_bytes, tiny_run, write_recipe_file, write_text
from text.tiny import save_byte_tokenizer
from tiny import tiny_config, tiny_params

pytestmark = pytest.mark.quick_compile

MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def on_one_device(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())


class Traced(Exception):
    """Ends a run that has traced its step."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    config = tiny_config(vocab_size=VOCAB, num_layers=2, bos_id=256, eos_ids=(257,))
    tokenizer = load_tokenizer(save_byte_tokenizer(folder / "tokenizer"))
    files = tuple(tokenizer.files)
    Model(config, tiny_params(config), tokenizer, ComputeConfig(), one_device(), files).save(folder / "model")
    return folder / "model"


def full(folder: Path, model: Path) -> dict[str, Any]:
    return tiny_run(folder, mesh=MESH, ema={"decay": 0.9}, train__accumulate=2, optimizer__moment_dtype="bfloat16")


def adapters(folder: Path, model: Path, **lora: Any) -> dict[str, Any]:
    table = tiny_run(folder, init=str(model), lora={"rank": 4} | lora, compute={"dtype": "bfloat16"})
    del table["model"]
    return table


def nf4(folder: Path, model: Path) -> dict[str, Any]:
    pattern = {r"layers\.0\.self_attn\.q_proj": 2}
    return adapters(folder, model, base="nf4", kind="dora", rank_pattern=pattern) | {"mesh": MESH}


def preference(folder: Path, model: Path) -> dict[str, Any]:
    return pairs_run(folder)


@pytest.mark.parametrize("make", [full, nf4, preference])
def test_the_program_and_the_sizes_are_those_of_the_run(
    make: Callable[[Path, Path], dict[str, Any]], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if make is preference:
        on_one_device(monkeypatch)
    programs: list[str] = []
    given: list[Any] = []

    def tracing(step: Any, *arguments: Any) -> Any:
        traced = trace_step(step, *arguments)
        programs.append(traced.lower().as_text())
        given.append(arguments)
        return traced

    def tracing_only(*arguments: Any) -> Any:
        tracing(*arguments)
        raise Traced

    described = recipe(make(tmp_path, base))
    monkeypatch.setattr(camelid.runs.dry_run, "trace_step", tracing)
    before = {id(array): array for array in jax.live_arrays()}
    found = dry_run(described)
    assert all(id(array) in before for array in jax.live_arrays()), "arrays were allocated"
    assert not Path(described.run).exists()
    monkeypatch.setattr(camelid.runs.run, "trace_step", tracing_only)
    with pytest.raises(Traced):
        run(described)
    assert programs[0] == programs[1]

    (state, frozen, _), compiled = given[1], found.compiled
    assert compiled is not None
    groups = {
        "frozen parameters": frozen,
        "trained parameters": state.trainable,
        "optimizer state": (state.opt_state, state.counters, state.step),
        "moving average": state.ema,
    }
    batch = 2 if make is preference else 1  # a float32 and four int32 arrays, and for pairs the reference
    rows = described.data.batch_size // (4 if described.mesh.tensor == 2 else 1) * described.data.sequence_length
    sizes = {name: on_first_device(tree) for name, tree in groups.items()} | {"batch": (4 + batch) * 4 * rows}
    assert compiled.held == sizes
    assert compiled.memory.argument_size_in_bytes == sum(sizes.values())
    assert compiled.memory.alias_size_in_bytes == sum(sizes.values()) - sizes["batch"] - sizes["frozen parameters"]
    metrics = compiled.memory.output_size_in_bytes - compiled.memory.alias_size_in_bytes
    assert 0 < metrics < 1000
    assert compiled.memory.temp_size_in_bytes > max(sizes.values())
    assert compiled.total == sum(sizes.values()) + metrics + compiled.memory.temp_size_in_bytes
    assert found.disk.checkpoint == sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def on_first_device(tree: Any) -> int:
    """The bytes of the arrays of a tree on one device."""
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])


def test_what_a_dry_run_says_comes_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    on_one_device(monkeypatch)
    table = tiny_run(tmp_path, train={"steps": 2, "checkpoint_every": 1})
    file, folder = write_recipe_file(table, tmp_path / "recipe.toml"), tmp_path / "run"

    new = dry_run(recipe(table))
    lines = "\n".join(report_lines(new))
    rows = sum(packing.num_rows for packing in new.opened.components.loader.packings)
    for words in (
        f"dry run: nothing is trained, and nothing is written to {folder}",
        "steps              1 to 2",
        "tokens per step    128 (8 rows of 16)",
        f"steps per epoch    {rows / 8:,.1f}",
        f"epochs in the run  {2 * 8 / rows:.3g}",
        "each, at most 2 at once",
        "time not known: no peak of cpu in float32 is known",
    ):
        assert words in lines, lines
    assert not folder.exists()

    outcome = run(recipe(table))
    assert [path.name for path in outcome.saved] == ["model"]
    assert new.disk.results == {"model": bytes_of_tensors(folder / "model")}

    before = contents(folder)
    finished = called("train", file, "--dry-run")
    assert finished.returncode == 0, finished.stderr
    assert "this run is finished: it has made all 2 steps" in finished.stdout
    assert "Nothing would be trained" in finished.stdout
    assert "memory" not in finished.stdout
    with locked(folder):
        longer = called("train", file, "--dry-run", "--train.steps", 4, "--from-step", 1)
    assert longer.returncode == 0, longer.stderr
    for words in (
        "resuming after step 1\n",
        "steps              2 to 4\n",
        "note: the checkpoints of steps 2 would be moved aside",
        f"note: another process is training in {folder}",
    ):
        assert words in longer.stdout, longer.stdout
    assert contents(folder) == before
    (folder / FINISHED).unlink()
    assert "all 2 steps are made: model/ would be written" in "\n".join(report_lines(dry_run(recipe(table))))

    (tmp_path / "text.jsonl").unlink()
    write_text(tmp_path / "text.jsonl", documents=41)
    with pytest.raises(UserError, match=r"text\.jsonl changed since"):
        dry_run(recipe(table))


@pytest.mark.parametrize("trained", ["all", "adapters"])
def test_the_disk_space_is_that_of_what_is_written(
    trained: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    on_one_device(monkeypatch)
    table = tiny_run(tmp_path, ema={"decay": 0.9}) if trained == "all" else adapters(tmp_path, base, merge=True)
    train = {"steps": 2, "checkpoint_every": 1, "milestones_every": 1}
    checkpoint = {"optimizer": False, "dtype": "bfloat16", "export": "hf"}
    table = lay_over(table, {"train": train, "checkpoint": checkpoint})
    found = dry_run(recipe(table))
    folder = run(recipe(table)).folder
    names = ("model", "model_ema") if trained == "all" else ("adapter", "model")
    sizes = {name: bytes_of_tensors(folder / name) for name in names}
    assert found.disk.results == sizes
    assert [bytes_of_tensors(folder / "milestones" / "1" / name) for name in names] == list(sizes.values())
    arrays = saved_state.open_step(folder / "checkpoints", 2)
    assert found.disk.checkpoint == sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays.values())
    assert found.disk.milestones == len(saved_state.steps_in(folder / "milestones")) == 2
    assert found.disk.needed == found.disk.checkpoints * found.disk.checkpoint + 3 * sum(sizes.values())
    lines = "\n".join(report_lines(found))
    assert f"milestones/  {format_bytes(sum(sizes.values()))} each, 2 in the run" in lines


def bytes_of_tensors(folder: Path) -> int:
    return sum(len(content) for _, _, content in tensor_bytes(folder).values())


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"data__sequence_length": 65}, r"data\.sequence_length = 65 exceeds the context of 64"),
        ({"data__batch_size": 7}, r"data\.batch_size = 7 is not divisible by"),
        ({"data__train": ["nowhere.txt"]}, r"nowhere\.txt"),
        ({"train__freeze": ["nothing"]}, r"train\.freeze"),
        ({"lora__rank": 48}, r"lora has rank 48 for .*, whose matrices have at most rank 20"),
        ({"train": {"steps": 2, "trackers": ["mlflow"]}}, "mlflow"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_with_a_recipe_shows(fields: dict[str, Any], problem: str, base: Path, tmp_path: Path):
    table = lay_over(adapters(tmp_path, base), fields)
    with mock.patch.dict("sys.modules", {"mlflow": None}), pytest.raises(UserError, match=problem):
        dry_run(recipe(table))
    assert not (tmp_path / "run").exists()


def test_a_run_that_cannot_be_resumed_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    on_one_device(monkeypatch)
    monkeypatch.setattr(camelid.runs.dry_run, "_compile", lambda opened, state: None)  # what it finds is tested above
    table = pairs_run(tmp_path, train={"steps": 1}, data__batch_size=64)
    del table["data"]["validation_fraction"]
    new = "\n".join(report_lines(dry_run(recipe(table))))
    assert re.search(r"before the first step, the log-probabilities of the reference are computed, for \d+ rows", new)
    assert re.search(r"note: the training data fills \d+ rows of 128 tokens, and data\.batch_size is 64", new)
    run(recipe(table))
    longer = lay_over(table, {"train__steps": 2})
    resumed = dry_run(recipe(longer))
    assert "log-probabilities" not in "\n".join(report_lines(resumed))
    (tmp_path / "run" / REFERENCE).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=f"{REFERENCE} is missing or damaged"):
        dry_run(recipe(longer))
    (tmp_path / "elsewhere").rename(tmp_path / "run" / REFERENCE)
    with pytest.raises(UserError, match=r"has a run with another recipe: dpo\.beta"):
        dry_run(recipe(lay_over(table, {"dpo__beta": 0.7})))


@pytest.mark.parametrize(
    ("remat", "attention", "least", "most", "complete"),
    [("none", "dense", 1, 1, True), ("layer", "dense", 1.25, 1.34, True), ("none", "blockwise", 0.5, 1, False)],
)
def test_products_are_counted_as_often_as_they_are_computed(
    remat: Any, attention: Any, least: float, most: float, complete: bool
):
    """The formula counts half of the products of attention, which the dense kernel computes without its mask."""
    config, length, rows = tiny_config(), 32, 2
    objective = NextTokenLoss(config=config, compute=ComputeConfig(remat=remat, attention=attention))
    mesh = one_device()
    params = abstract(declare_decoder(config), "float32", mesh)
    dtypes = dict.fromkeys(("tokens", "targets", "positions", "segments"), "int32") | {"weights": "float32"}
    batch = {name: jax.ShapeDtypeStruct((rows, length), dtype) for name, dtype in dtypes.items()}
    batch["rows"] = jax.ShapeDtypeStruct((rows,), "int32")

    def loss(params: Any, batch: Any) -> jax.Array:
        return objective(params, batch, jax.random.key(0))[0]

    with jax.set_mesh(mesh):
        count, counted = product_flops(jax.make_jaxpr(jax.grad(loss))(params, batch).jaxpr)
    masked = 3 * 4 * config.num_layers * config.num_heads * config.head_dim * (length - 1) / 2
    expected = (training_flops(config, length) + masked) * rows * length
    assert counted == complete
    assert least <= count / expected <= most


def test_the_time_is_estimated_and_what_does_not_fit_is_noted(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    on_one_device(monkeypatch)
    found = dry_run(recipe(adapters(tmp_path, base)))
    assert found.compiled is not None
    compiled = dataclasses.replace(found.compiled, flops=jax.device_count() * 0.4 * 1e12 * 900)
    timed = dataclasses.replace(found, compiled=compiled)
    with mock.patch("camelid.runs.dry_run_report.peak_flops", return_value=1e12):
        lines = "\n".join(report_lines(timed))
    assert "about 1:00:00 (9e+02 s per step) at an assumed 40% of 1 TFLOP/s per device" in lines
    full = dataclasses.replace(found, disk=dataclasses.replace(found.disk, free=found.disk.needed - 5_000_000))
    with mock.patch("camelid.runs.dry_run_report.device_memory", return_value=1000):
        lines = "\n".join(report_lines(full))
    assert "note: a device has 1.0 kB: raise train.accumulate" in lines
    assert f"note: 5.0 MB are missing on the disk of {found.opened.folder}" in lines
    without = dataclasses.replace(found, compiled=dataclasses.replace(found.compiled, memory=None))
    assert "activations and temporaries  the compiler of this backend does not say" in "\n".join(report_lines(without))
