"""What goes wrong in a run with everything that is saved beside its steps: it ends with a message, and is resumed."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import camelid.runs.lora
import camelid.runs.run
from camelid.data.rows.loader import Loader
from camelid.model.config import ComputeConfig
from camelid.parallel.mesh import one_device
from camelid.parallel.stop_signal import StopSignal
from camelid.runs.run import run
from camelid.train.loggers import MetricsFile
from runs import VOCAB, assert_refused, called, contents, losses, recipe, tiny_run, write_recipe_file
from tiny import tiny_config, tiny_params

pytestmark = pytest.mark.quick_compile

BAD = (2, 3)  # the steps, from 0, whose batch is not finite: the updates 3 and 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    config = tiny_config(vocab_size=VOCAB, num_layers=1, bos_id=256, eos_ids=(257,))
    camelid.Model(config, tiny_params(config), None, ComputeConfig(), one_device()).save(folder)
    return folder


@pytest.fixture(autouse=True, scope="module")
def bad_batches() -> Iterator[None]:
    """Weights of two batches are NaN, in all runs of this module; all of them run on one device."""
    batch = Loader.batch

    def poisoned(self: Loader, step: int, *rows: int, **named: int) -> Any:
        found = batch(self, step, *rows, **named)
        return replace(found, weights=found.weights * np.float32(np.nan)) if step in BAD else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())
        patch.setattr(Loader, "batch", poisoned)
        yield


def table(folder: Path, base: Path) -> dict[str, Any]:
    """A recipe's table: adapters with dropout, an average, validations, milestones and the best checkpoint."""
    fields = {
        "init": str(base),
        "lora": {"rank": 2, "targets": ["q_proj", "lm_head"], "dropout": 0.2},
        "ema": {"decay": 0.5},
        "data__validation_fraction": 0.3,
        "train": {"steps": 6, "checkpoint_every": 2, "evaluate_every": 2, "keep_checkpoints": 1}
        | {"milestones_every": 5, "keep_best": True, "metrics": ["accuracy"]},
    }
    made = tiny_run(folder, **fields)
    del made["model"]
    return made


@pytest.fixture(scope="module")
def straight(base: Path, bad_batches: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed but the two batches."""
    folder = tmp_path_factory.mktemp("straight")
    assert run(recipe(table(folder, base))).finished
    return folder / "run"


def assert_same_end(ours: Path, straight: Path) -> None:
    """The same adapters, bit for bit, and every step and its numbers once."""
    for name in ("adapter", "adapter_ema"):
        file = f"{name}/adapter_model.safetensors"
        assert (ours / file).read_bytes() == (straight / file).read_bytes(), name
    names = ("step", "loss", "gradient_norm", "accuracy", "skipped", "skipped_in_a_row")
    one, other = ([[row[name] for name in names] for row in losses(each)] for each in (ours, straight))
    assert one == other
    assert json.loads((ours / "best.json").read_text()) == json.loads((straight / "best.json").read_text())


def test_skipped_updates_are_counted_and_have_no_accuracy(straight: Path):
    rows = losses(straight)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] is None for row in rows] == [False, False, True, True, False, False]
    assert [row["accuracy"] is None for row in rows] == [False, False, True, True, False, False]
    assert [row["skipped_in_a_row"] for row in rows] == [0, 0, 1, 2, 0, 0]
    # Step 4 is due among skipped updates, and waits for step 5, which is a milestone; 6 is the newest and the best.
    assert {path.name for path in (straight / "checkpoints").iterdir()} <= {"2", "5", "6"}
    assert {"5", "6"} <= {path.name for path in (straight / "checkpoints").iterdir()}


def test_a_run_that_is_stopped_among_skipped_updates_goes_on_bit_for_bit(base: Path, straight: Path, tmp_path: Path):
    class StopAmongThem(StopSignal):
        def should_stop(self, step: int) -> bool:
            return step == BAD[0] + 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(camelid.runs.run, "StopSignal", StopAmongThem)
        outcome = run(recipe(table(tmp_path, base)))
    assert (outcome.finished, outcome.steps) == (False, 3)
    assert run(recipe(table(tmp_path, base))).finished
    assert_same_end(tmp_path / "run", straight)


def test_a_tokenizer_that_changed_is_refused_and_the_run_stays_as_it_is(base: Path, straight: Path):
    before = contents(straight)
    tokenizer = straight.parent / "tokenizer" / "tokenizer.json"
    own = tokenizer.read_text()
    file = write_recipe_file(table(straight.parent, base), straight.parent / "recipe.toml")
    try:
        tokenizer.write_text(json.dumps(json.loads(own) | {"normalizer": {"type": "Lowercase"}}))
        refused = called("train", file)
    finally:
        tokenizer.write_text(own)
    assert_refused(refused, f"{straight} was trained on text of another tokenizer than {tokenizer}")
    assert contents(straight) == before


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_at_adapter(patch: pytest.MonkeyPatch) -> None:
    """The disk is full when the adapter is written beside the second checkpoint."""
    write, calls = camelid.runs.lora.write_files, []

    def failing(*given: Any, **options: Any) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise full()
        write(*given, **options)

    patch.setattr(camelid.runs.lora, "write_files", failing)


def full_at_best(patch: pytest.MonkeyPatch) -> None:
    """The disk is full when best.json is written."""
    write = Path.write_bytes

    def failing(self: Path, content: bytes) -> int:
        if content.startswith(b'{"step": ') and b'"validation_loss"' in content:
            raise full()
        return write(self, content)

    patch.setattr(Path, "write_bytes", failing)


def full_at_metrics(patch: pytest.MonkeyPatch) -> None:
    """The disk is full at the first line of metrics.jsonl."""
    start = MetricsFile.__init__

    def on_full_disk(self: MetricsFile, path: Path, resume_from: int) -> None:
        start(self, path, resume_from)
        self._file.close()
        self._file = Path("/dev/full").open("a", encoding="utf-8", buffering=1)  # noqa: SIM115

    patch.setattr(MetricsFile, "__init__", on_full_disk)


@pytest.mark.parametrize(
    ("fill", "message", "resumes"),
    [
        (full_at_adapter, "the disk of {run}/adapter is full", "resuming after step 5"),
        (full_at_best, "{run}/best.json: No space left on device", "resuming after step 2"),
        (full_at_metrics, "{run}/metrics.jsonl: No space left on device", "compiling"),
    ],
)
def test_a_full_disk_ends_the_run_which_is_resumed_from_its_last_checkpoint(
    fill: Callable[[pytest.MonkeyPatch], None], message: str, resumes: str, base: Path, straight: Path, tmp_path: Path
):
    file = write_recipe_file(table(tmp_path, base), tmp_path / "recipe.toml")
    with pytest.MonkeyPatch.context() as patch:
        fill(patch)
        ended = called("train", file)
    assert_refused(ended, message.format(run=tmp_path / "run"))
    again = called("train", file)
    assert again.returncode == 0, again.stderr
    assert resumes in again.stderr
    assert_same_end(tmp_path / "run", straight)
