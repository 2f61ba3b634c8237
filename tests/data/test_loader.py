import itertools
import json
import random
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest

from camelid.data.batch import Batch
from camelid.data.config import DataConfig
from camelid.data.loader import Loader, prefetched
from camelid.errors import UserError
from camelid.text.tokenizer import Tokenizer, load_tokenizer
from text.tiny import BOS, EOS, save_byte_tokenizer

FIELDS = ("tokens", "targets", "weights", "positions", "segments")
DOCUMENTS = ["".join(random.Random(n).choices(ascii_lowercase, k=12 + n % 7)) for n in range(17)]


def write_documents(name: str, documents: list[str]) -> None:
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


@pytest.fixture
def config() -> DataConfig:
    """36 rows of 8, the last of them not full, in batches of 4."""
    write_documents("a.jsonl", DOCUMENTS)
    return DataConfig(train=("a.jsonl",), sequence_length=8, batch_size=4)


def assert_equal(left: Batch, right: Batch) -> None:
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(left, field), getattr(right, field), err_msg=field)


def joined(*batches: Batch) -> Batch:
    return Batch(*(np.concatenate([getattr(batch, field) for batch in batches]) for field in FIELDS))


def texts(loader: Loader) -> list[bytes]:
    """The documents of a loader, read back from its rows."""
    rows = joined(*loader.in_order(3))
    stream = rows.tokens[rows.segments > 0].tolist()
    return [bytes(part) for part in _split(stream) if part]


def _split(stream: list[int]) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in stream:
        parts.append([]) if token >= BOS else parts[-1].append(token)
    return parts


# --- what an epoch is


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_token_but_a_documents_first_is_predicted_once_an_epoch(config, tokenizer: Tokenizer, shuffle: bool):
    loader = Loader(replace(config, batch_size=1, shuffle=shuffle), tokenizer)
    epoch = joined(*(loader.batch(step) for step in range(loader.num_rows)))
    expected = Counter()
    for text in DOCUMENTS:
        expected.update(itertools.pairwise([BOS, *text.encode(), EOS]))
    weighted = epoch.weights > 0
    assert Counter(zip(epoch.tokens[weighted].tolist(), epoch.targets[weighted].tolist(), strict=True)) == expected


def test_an_epoch_has_every_row_once_and_the_next_another_order(config: DataConfig, tokenizer: Tokenizer):
    loader = Loader(replace(config, batch_size=1), tokenizer)
    in_order = [row.tobytes() for row in joined(*loader.in_order(1)).tokens]
    epochs = [
        [loader.batch(epoch * loader.num_rows + n).tokens.tobytes() for n in range(loader.num_rows)]
        for epoch in range(3)
    ]
    assert all(Counter(epoch) == Counter(in_order) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert in_order not in epochs


def test_without_shuffling_rows_come_in_order_again_and_again(config: DataConfig, tokenizer: Tokenizer):
    loader = Loader(replace(config, shuffle=False), tokenizer)
    rows = joined(*loader.in_order(loader.num_rows)).tokens
    steps = joined(*(loader.batch(step) for step in range(25))).tokens
    np.testing.assert_array_equal(steps, rows[np.arange(100) % loader.num_rows])


def test_another_seed_is_another_order(config: DataConfig, tokenizer: Tokenizer):
    first, second = (Loader(replace(config, seed=seed), tokenizer).batch(0).tokens for seed in (0, 1))
    assert not np.array_equal(first, second)


# --- a batch is a function of the configuration and the step


def test_a_batch_is_the_same_however_it_is_cut_and_whoever_makes_it(config: DataConfig, tokenizer: Tokenizer):
    one, other = Loader(config, tokenizer), Loader(config, tokenizer)
    for step in (7, 0, 30, 3):
        whole = one.batch(step)
        assert_equal(joined(other.batch(step, 0, 1), other.batch(step, 1, 3), other.batch(step, 3, 4)), whole)
        assert_equal(joined(other.batch(step, stop=2), other.batch(step, start=2)), whole)


def test_a_far_step_answers_at_once(config: DataConfig, tokenizer: Tokenizer):
    loader = Loader(config, tokenizer)
    begin = time.perf_counter()
    assert loader.batch(10**9).tokens.shape == (4, 8)
    assert time.perf_counter() - begin < 1


def test_a_batch_may_be_larger_than_an_epoch(config: DataConfig, tokenizer: Tokenizer):
    loader = Loader(replace(config, batch_size=100), tokenizer)
    counts = Counter(row.tobytes() for row in loader.batch(0).tokens)
    assert len(counts) == loader.num_rows == 36
    assert set(counts.values()) == {2, 3}


# --- validation


def test_in_order_gives_every_row_once_and_fills_up_with_nothing(config: DataConfig, tokenizer: Tokenizer):
    loader = Loader(config, tokenizer)
    batches = list(loader.in_order(5))
    assert [len(batch.tokens) for batch in batches] == [5] * 8
    rows = joined(*batches)
    assert_equal(joined(*loader.in_order(1)), Batch(*(getattr(rows, field)[:36] for field in FIELDS)))
    assert not rows.weights[36:].any()
    assert not rows.segments[36:].any()


def test_a_fraction_holds_out_whole_documents(config: DataConfig, tokenizer: Tokenizer):
    config = replace(config, validation_fraction=0.2)
    train, validation = (texts(Loader(config, tokenizer, split)) for split in ("train", "validation"))
    assert len(validation) == 3
    assert sorted(train + validation) == sorted(text.encode() for text in DOCUMENTS)
    assert texts(Loader(config, tokenizer, "validation")) == validation
    assert texts(Loader(replace(config, seed=1), tokenizer, "validation")) != validation


def test_a_small_fraction_holds_out_at_least_one_document(config: DataConfig, tokenizer: Tokenizer):
    assert len(texts(Loader(replace(config, validation_fraction=0.001), tokenizer, "validation"))) == 1
    assert len(texts(Loader(replace(config, validation_fraction=0.999), tokenizer, "train"))) == 1


def test_a_fraction_of_one_document_is_rows_at_its_end(tokenizer: Tokenizer):
    text = bytes(range(32, 127)).decode()
    Path("a.txt").write_text(text)
    config = DataConfig(train=("a.txt",), sequence_length=10, batch_size=1, validation_fraction=0.25)
    train, validation = (Loader(config, tokenizer, split) for split in ("train", "validation"))
    assert (train.num_rows, validation.num_rows) == (8, 2)
    assert texts(train) == [text[:79].encode()]
    assert texts(validation) == [text[79:].encode()]
    # The first token after the cut is validation's alone: nobody predicts it.
    assert joined(*train.in_order(8)).weights.sum() == 79
    assert joined(*validation.in_order(2)).weights.sum() == 97 - 80 - 1


def test_validation_files_are_read_as_they_are(config: DataConfig, tokenizer: Tokenizer):
    write_documents("b.jsonl", ["held out", "too"])
    config = replace(config, validation=("b.jsonl",))
    assert texts(Loader(config, tokenizer, "validation")) == [b"held out", b"too"]
    assert len(texts(Loader(config, tokenizer))) == 17


def test_a_validation_text_may_be_shorter_than_a_row(config: DataConfig, tokenizer: Tokenizer):
    write_documents("b.jsonl", ["x"])
    loader = Loader(replace(config, validation=("b.jsonl",)), tokenizer, "validation")
    (batch,) = loader.in_order(1)
    assert batch.tokens.tolist() == [[BOS, ord("x"), EOS, 0, 0, 0, 0, 0]]
    assert batch.weights.sum() == 2


def test_train_and_validation_may_not_share_a_file(config: DataConfig, tokenizer: Tokenizer):
    shared = replace(config, validation=(str(Path("a.jsonl").absolute()),))
    with pytest.raises(UserError, match=r"more than once.*\n.*not trained on"):
        Loader(shared, tokenizer, "validation")


def test_no_validation_is_an_error_when_it_is_asked_for(config: DataConfig, tokenizer: Tokenizer):
    with pytest.raises(UserError, match="no validation text"):
        Loader(config, tokenizer, "validation")


# --- what becomes of a document


@pytest.mark.parametrize(
    ("add_bos", "add_eos", "expected"),
    [(None, True, [BOS, 120, EOS]), (False, True, [120, EOS]), (True, False, [BOS, 120])],
)
def test_documents_begin_and_end_as_configured(config, tokenizer: Tokenizer, add_bos, add_eos, expected: list[int]):
    write_documents("a.jsonl", ["x"] * 9)
    loader = Loader(replace(config, add_bos=add_bos, add_eos=add_eos), tokenizer)
    rows = joined(*loader.in_order(1))
    assert rows.tokens[rows.segments > 0].tolist() == expected * 9
    assert loader.num_tokens == len(expected) * 9


def test_special_strings_in_documents_are_text(config: DataConfig, tokenizer: Tokenizer):
    write_documents("a.jsonl", ["</s><s>"])
    assert next(Loader(config, tokenizer).in_order(1)).tokens.tolist() == [[BOS, *b"</s><s>"]]


def test_documents_without_text_are_dropped(config: DataConfig, tokenizer: Tokenizer):
    write_documents("a.jsonl", ["", "first", "", "second", ""])
    assert Loader(config, tokenizer).num_tokens == len("firstsecond") + 4


def test_large_ids_survive(config: DataConfig, tmp_path: Path):
    folder = save_byte_tokenizer(tmp_path / "large")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["llama"] = 70_000
    content["added_tokens"] += [dict(content["added_tokens"][0], id=70_000, content="llama", special=False)]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    write_documents("a.jsonl", ["llama" * 9])
    rows = joined(*Loader(config, load_tokenizer(folder)).in_order(1))
    assert rows.tokens[rows.segments > 0].tolist() == [BOS, *[70_000] * 9, EOS]


def test_progress_counts_documents(config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    whole = Loader(config, tokenizer)
    monkeypatch.setattr("camelid.data.loader.CHARACTERS_AT_ONCE", 100)
    seen: list[int] = []
    chunked = Loader(config, tokenizer, progress=seen.append)
    assert len(seen) > 2
    assert seen == sorted(set(seen))
    assert seen[-1] == 17
    assert_equal(joined(*chunked.in_order(5)), joined(*whole.in_order(5)))


def test_too_little_text_is_refused(config: DataConfig, tokenizer: Tokenizer):
    write_documents("a.jsonl", ["abc"])
    with pytest.raises(UserError, match="5 tokens, fewer than a row of 8"):
        Loader(config, tokenizer)
    write_documents("a.jsonl", list("abcdefghijk"))
    with pytest.raises(UserError, match="nothing to predict"):
        Loader(replace(config, add_bos=False, add_eos=False), tokenizer)
    write_documents("a.jsonl", [""])
    with pytest.raises(UserError, match="nothing to predict"):
        Loader(config, tokenizer)
    with pytest.raises(UserError, match="too short to hold out rows"):
        Loader(replace(config, validation_fraction=0.1), tokenizer)


# --- prefetching


def builders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("camelid-batches")]


def test_prefetched_batches_are_the_loaders(config: DataConfig, tokenizer: Tokenizer):
    loader = Loader(config, tokenizer)
    for depth in (0, 2, 9):
        batches = list(prefetched(loader, 3, 8, 1, 3, depth=depth))
        assert len(batches) == 5
        for step, batch in enumerate(batches, start=3):
            assert_equal(batch, loader.batch(step, 1, 3))
    assert not builders()


class Watched(Loader):
    """Remembers the steps asked for, and fails at one."""

    failing: int | None = None

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        self.asked = [*getattr(self, "asked", []), (step, threading.current_thread().name)]
        if step == self.failing:
            raise UserError("no such row", "none")
        return super().batch(step, start, stop)


def test_batches_are_made_ahead_by_a_thread_but_not_further_than_told(config: DataConfig, tokenizer: Tokenizer):
    loader = Watched(config, tokenizer)
    batches = prefetched(loader, 0, 100, depth=2)
    next(batches)
    deadline = time.monotonic() + 10
    while len(loader.asked) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [step for step, _ in loader.asked] == [0, 1, 2]
    assert all(name.startswith("camelid-batches") for _, name in loader.asked)
    batches.close()


def test_a_failure_reaches_the_reader_at_its_step(config: DataConfig, tokenizer: Tokenizer):
    loader = Watched(config, tokenizer)
    loader.failing = 2
    batches = prefetched(loader, 0, 9)
    assert_equal(next(batches), loader.batch(0))
    assert_equal(next(batches), loader.batch(1))
    with pytest.raises(UserError, match="no such row"):
        next(batches)
    assert not builders()


def test_closing_ends_the_thread(config: DataConfig, tokenizer: Tokenizer):
    loader = Watched(config, tokenizer)
    batches = prefetched(loader, 0, 1000)
    next(batches)
    assert builders()
    batches.close()
    assert not builders()
    assert len(loader.asked) <= 3
