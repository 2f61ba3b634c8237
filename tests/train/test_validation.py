"""What is validated: all rows or a choice of them, with the loss of each source, and progress on the way."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from camelid.data.config import DataConfig, Source
from camelid.data.preparation.task import Task
from camelid.data.rows.loader import Loader
from camelid.errors import UserError
from camelid.parallel.mesh import one_device
from camelid.runs.recipe import Recipe
from camelid.runs.validation import mean_losses
from camelid.text.tokenizer import Tokenizer, load_tokenizer
from camelid.train.loggers import Terminal
from camelid.train.objective import Arrays
from camelid.train.state import TrainState
from runs import recipe, tiny_run
from text.tiny import save_byte_tokenizer


def source(folder: Path, letter: str, documents: int, **options) -> Source:
    file = folder / f"{letter}.jsonl"
    file.write_text("".join(json.dumps({"text": letter * (5 + n % 3)}) + "\n" for n in range(documents)))
    return Source(files=(str(file),), **options)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(save_byte_tokenizer(tmp_path / "tokenizer"))


def config(folder: Path, names: tuple[str | None, ...], **options) -> DataConfig:
    """Validation sources of 40 and 20 documents, each in a row of its own."""
    sources = [source(folder, letter, n, name=name) for letter, n, name in zip("ab", (40, 20), names, strict=True)]
    about = {"sequence_length": 8, "batch_size": 4, "packing": "none", "cache": str(folder / "cache")}
    return DataConfig(train=(source(folder, "t", 40),), validation=tuple(sources), **about, **options)


def letter_loss(params: dict, batch: Arrays, key: jax.Array | None):
    """A loss that can be computed by hand: the parameter times the token, for each target."""
    weights = batch["weights"]
    return (
        params["x"] * (batch["tokens"].astype(weights.dtype) * weights).sum(),
        weights.sum(),
        {"half": (weights.sum(), 2 * weights.sum())},
    )


def validated(data: DataConfig, tokenizer: Tokenizer, folder: Path) -> dict[str, float]:
    table: Recipe = recipe(tiny_run(folder))
    whole = Recipe(**{**vars(table), "data": data})
    loader = Loader(data, tokenizer, "validation")
    with jax.set_mesh(one_device()):
        state = TrainState(np.int32(0), {"x": np.float32(2.0)}, ())
        return mean_losses(letter_loss, loader, whole, one_device(), None, Terminal(0, 1), state)


def by_hand(loader: Loader, packing: int | None = None) -> float:
    rows = [loader.packings[n].rows(np.arange(1000)) for n in ((0, 1) if packing is None else (packing,))]
    total = sum(float((batch.tokens * batch.weights).sum()) for batch in rows)
    return 2 * total / sum(float(batch.weights.sum()) for batch in rows)


def test_the_loss_of_each_named_source_and_of_all_is_that_of_its_rows(tmp_path: Path, tokenizer: Tokenizer):
    data = config(tmp_path, ("code", "text"))
    found, loader = validated(data, tokenizer, tmp_path), Loader(data, tokenizer, "validation")
    expected = {"loss": by_hand(loader), "half": 0.5, "loss/code": by_hand(loader, 0), "loss/text": by_hand(loader, 1)}
    assert found == pytest.approx(expected, rel=1e-6)
    assert expected["loss/text"] - expected["loss/code"] > 0.5, "one is of the letter b, the other of a"


def test_sources_without_names_are_one_and_names_change_no_store(tmp_path: Path, tokenizer: Tokenizer):
    data = config(tmp_path, (None, None))
    assert list(validated(data, tokenizer, tmp_path)) == ["loss", "half"]
    named, plain = source(tmp_path, "a", 3, name="code"), source(tmp_path, "a", 3)
    assert Task((named,), tokenizer).content_key() == Task((plain,), tokenizer).content_key()
    assert "name" not in Task((named,), tokenizer).describe()["options"]["sources"][0]


def test_a_maximum_of_tokens_chooses_rows_of_all_sources_by_the_seed(tmp_path: Path, tokenizer: Tokenizer):
    def rows(seed: int, most: int | None) -> list[np.ndarray]:
        data = config(tmp_path, ("code", "text"), max_validation_tokens=most, seed=seed)
        return Loader(data, tokenizer, "validation").validation_rows()

    assert [len(part) for part in rows(0, None)] == [40, 20]
    assert [part.tolist() for part in rows(0, 10**6)] == [part.tolist() for part in rows(0, None)]
    chosen = rows(0, 8 * 30 + 7)
    assert sum(map(len, chosen)) == 30
    assert all(len(part) >= 5 and len(set(part)) == len(part) for part in chosen)
    assert [max(part) < n for part, n in zip(chosen, (40, 20), strict=True)] == [True, True]
    assert [part.tolist() for part in rows(0, 247)] == [part.tolist() for part in chosen]
    assert [part.tolist() for part in rows(1, 247)] != [part.tolist() for part in chosen]


def test_each_chosen_row_is_read_once_and_batches_are_padded_by_source(tmp_path: Path, tokenizer: Tokenizer):
    loader = Loader(config(tmp_path, ("code", "text"), max_validation_tokens=8 * 31), tokenizer, "validation")
    found: list[list[bytes]] = [[], []]
    for number, batch in loader.for_validation(4):
        assert len(batch.tokens) == 4
        found[number] += [t.tobytes() for t, w in zip(batch.tokens, batch.weights, strict=True) if w.any()]
    for packing, rows, read in zip(loader.packings, loader.validation_rows(), found, strict=True):
        assert read == [tokens.tobytes() for tokens in packing.rows(rows).tokens]


def test_validation_fields_that_cannot_work_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="max_validation_tokens = 7 is less than a row of 8 tokens"):
        config(tmp_path, (None, None), max_validation_tokens=7)
    with pytest.raises(UserError, match=r"data\.validation has names \['x', 'x'\]"):
        config(tmp_path, ("x", "x"))
    with pytest.raises(UserError, match="name = 'a/b'"):
        source(tmp_path, "a", 1, name="a/b")
    named = source(tmp_path, "a", 1, name="a")
    with pytest.raises(UserError, match=r"data\.train names a source, and no documents are held out"):
        DataConfig(train=(named,), sequence_length=8, batch_size=4)
    with pytest.raises(UserError, match="and there is no validation data"):
        DataConfig(train=(source(tmp_path, "a", 1),), sequence_length=8, batch_size=4, max_validation_tokens=8)


def test_without_a_terminal_progress_is_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    clock = iter([0.0, 4.0, 9.9, 10.0, 15.0, 21.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with Terminal(0, 10).progress("validation rows", 5000) as show:
        for done in (1000, 2000, 3000, 4000, 5000):
            show(done)
    assert capsys.readouterr().err == "validation rows: 3,000 of 5,000\nvalidation rows: 5,000 of 5,000\n"


def test_on_a_terminal_progress_is_a_second_bar_that_goes_away(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = Terminal(0, 100)
    with terminal.progress("validation rows", 5) as show:
        show(3)
    assert terminal._bar is None
    numbers = {"loss": 1.0, "learning_rate": 1e-3, "tokens_per_second": 1e4, "step_s": 2.0, "data_s": 0.1, "eta_s": 1.0}
    terminal.show(5, numbers)
    assert terminal._bar is not None
    with terminal.progress("validation rows", 5) as show:
        show(3)
        assert [(task.fields["name"], task.completed) for task in terminal._bar.tasks] == [
            ("train", 5),
            ("validation rows", 3),
        ]
    assert [task.fields["name"] for task in terminal._bar.tasks] == ["train"]
    terminal.close()
