import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest

import camelid
from camelid.data.config import DataConfig, Source, Stage
from camelid.data.preparation.prepare import prepare
from camelid.data.preparation.store import VALIDATION
from camelid.data.rows.batch import Batch
from camelid.data.rows.loader import Loader
from camelid.data.rows.prefetch import prefetched
from camelid.data.rows.stores import data_cache, open_stores
from camelid.errors import UserError
from camelid.text.tokenizer import Tokenizer, load_tokenizer
from runs import TIMEOUT_S
from text.tiny import BOS, EOS, save_byte_tokenizer

FIELDS = ("tokens", "targets", "weights", "positions", "segments")
DOCUMENTS = ["".join(random.Random(n).choices(ascii_lowercase, k=12 + n % 7)) for n in range(17)]


def write_documents(name: str, documents: list[str]) -> None:
    Path(name).write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


A = (Source(files=("a.jsonl",)),)
B = (Source(files=("b.jsonl",)),)


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAMELID_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config() -> DataConfig:
    """36 rows of 8, the last of them not full, in batches of 4."""
    write_documents("a.jsonl", DOCUMENTS)
    return DataConfig(train=A, sequence_length=8, batch_size=4)


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
    begin = time.thread_time()  # which does not depend on what else the machine does
    assert loader.batch(10**9).tokens.shape == (4, 8)
    assert time.thread_time() - begin < 1


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


def test_a_fraction_of_one_document_is_its_end(tokenizer: Tokenizer):
    text = bytes(range(32, 127)).decode()
    Path("a.txt").write_text(text)
    config = DataConfig(train=(Source(files=("a.txt",)),), sequence_length=10, batch_size=1, validation_fraction=0.25)
    train, validation = (Loader(config, tokenizer, split) for split in ("train", "validation"))
    assert (train.num_tokens, validation.num_tokens) == (97 - 24, 24)
    # A last token that begins a row stands in none: nothing follows it.
    assert texts(train) == [text[:72].encode()]
    assert texts(validation) == [text[72:].encode()]
    # The first token after the cut is validation's alone: nobody predicts it.
    assert joined(*train.in_order(8)).weights.sum() == 97 - 24 - 1
    assert joined(*validation.in_order(2)).weights.sum() == 24 - 1


def test_validation_files_are_read_as_they_are(config: DataConfig, tokenizer: Tokenizer):
    write_documents("b.jsonl", ["held out", "too"])
    config = replace(config, validation=B)
    assert texts(Loader(config, tokenizer, "validation")) == [b"held out", b"too"]
    assert len(texts(Loader(config, tokenizer))) == 17


def test_a_validation_text_may_be_shorter_than_a_row(config: DataConfig, tokenizer: Tokenizer):
    write_documents("b.jsonl", ["x"])
    loader = Loader(replace(config, validation=B), tokenizer, "validation")
    (batch,) = loader.in_order(1)
    assert batch.tokens.tolist() == [[BOS, ord("x"), EOS, 0, 0, 0, 0, 0]]
    assert batch.weights.sum() == 2


def test_train_and_validation_may_not_share_a_file(config: DataConfig, tokenizer: Tokenizer):
    shared = replace(config, validation=(Source(files=(str(Path("a.jsonl").absolute()),)),))
    with pytest.raises(UserError, match=r"more than once.*\n.*not used for training"):
        Loader(shared, tokenizer, "validation")


def test_no_validation_is_an_error_when_it_is_asked_for(config: DataConfig, tokenizer: Tokenizer):
    with pytest.raises(UserError, match="no validation data"):
        Loader(config, tokenizer, "validation")


# --- what becomes of a document


@pytest.mark.parametrize(
    ("add_bos", "add_eos", "expected"),
    [(None, True, [BOS, 120, EOS]), (False, True, [120, EOS]), (True, False, [BOS, 120])],
)
def test_documents_begin_and_end_as_configured(config, tokenizer: Tokenizer, add_bos, add_eos, expected: list[int]):
    write_documents("a.jsonl", ["x"] * 9)
    source = replace(A[0], add_bos=add_bos, add_eos=add_eos)
    loader = Loader(replace(config, train=(source,)), tokenizer)
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


def test_too_little_text_is_refused(config: DataConfig, tokenizer: Tokenizer):
    write_documents("a.jsonl", ["abc"])
    with pytest.raises(UserError, match="5 tokens, fewer than a row of 8"):
        Loader(config, tokenizer)
    for packing in ("best_fit", "none"):
        assert Loader(replace(config, packing=packing), tokenizer).num_rows == 1
    for packing in ("best_fit", "none"):
        with pytest.raises(UserError, match=r"every document of the train data is longer than a row .*\n.*overlong"):
            Loader(replace(config, packing=packing, overlong="drop", sequence_length=3), tokenizer)
    write_documents("a.jsonl", list("abcdefghijk"))
    bare = (replace(A[0], add_bos=False, add_eos=False),)
    for packing in ("stream", "best_fit", "none"):
        with pytest.raises(UserError, match="nothing to predict"):
            Loader(replace(config, train=bare, packing=packing), tokenizer)
    assert Loader(replace(config, train=bare, cross_documents=True), tokenizer).num_rows == 2
    write_documents("a.jsonl", [""])
    with pytest.raises(UserError, match=r"no text in a\.jsonl"):
        Loader(config, tokenizer)


# --- stores and the cache


def test_a_source_is_prepared_once_and_again_when_it_changes(config: DataConfig, tokenizer: Tokenizer):
    seen: list[str] = []

    def load() -> Loader:
        return Loader(config, tokenizer, progress=lambda done, total, stage="tokenizing", /: seen.append(stage))

    before = texts(load())
    assert set(seen) == {"reading", "tokenizing"}
    seen.clear()
    assert texts(load()) == before
    assert set(seen) == {"reading"}
    write_documents("a.jsonl", ["another"] * 3)
    assert texts(load()) == [b"another"] * 3
    assert len(list(data_cache(config).iterdir())) == 2


def test_the_cache_is_where_the_recipe_or_the_user_says(config: DataConfig, tokenizer: Tokenizer, monkeypatch):
    Loader(replace(config, cache="mine"), tokenizer)
    assert len(list(Path("mine").iterdir())) == 1
    monkeypatch.delenv("CAMELID_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("xdg").absolute()))
    Loader(config, tokenizer)
    assert len(list(Path("xdg/camelid/data").iterdir())) == 1


def test_sources_without_weights_are_one_text(config: DataConfig, tokenizer: Tokenizer):
    write_documents("b.jsonl", DOCUMENTS[5:])
    write_documents("a.jsonl", DOCUMENTS[:5])
    apart = Loader(replace(config, train=(*A, replace(B[0], add_eos=True))), tokenizer)
    assert len(apart.packings) == 1
    assert texts(apart) == [text.encode() for text in DOCUMENTS]


def test_a_prepared_store_is_read_where_it_is(config: DataConfig, tokenizer: Tokenizer):
    prepare(A, tokenizer, Path("store"))
    ready = replace(config, train=(Source(files=("store",), kind="tokens"),))
    loader = Loader(ready, tokenizer)
    assert_equal(loader.batch(3), Loader(config, tokenizer).batch(3))
    assert loader.packings[0].store.folder == Path("store")
    with pytest.raises(UserError, match=r"store was not prepared with validation_fraction = 0\.2"):
        Loader(replace(ready, validation_fraction=0.2), tokenizer)
    prepare(A, tokenizer, Path("store"), validation_fraction=0.2, overwrite=True)
    held_out = Loader(replace(ready, validation_fraction=0.2), tokenizer, "validation")
    assert texts(held_out) == texts(Loader(replace(config, validation_fraction=0.2), tokenizer, "validation"))
    named = replace(ready, validation=(Source(files=(f"store/{VALIDATION}",), kind="tokens"),))
    assert texts(Loader(named, tokenizer, "validation")) == texts(held_out)


def test_a_store_of_another_tokenizer_is_refused(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path):
    prepare(A, tokenizer, Path("store"))
    other = load_tokenizer(save_byte_tokenizer(tmp_path / "other", adds_bos=False))
    with pytest.raises(UserError, match=r"store was prepared with another tokenizer than .*other"):
        Loader(replace(config, train=(Source(files=("store",), kind="tokens"),)), other)


def test_several_stores_of_a_source_are_all_of_this_tokenizer(config: DataConfig, tokenizer: Tokenizer, tmp_path: Path):
    prepare(A, tokenizer, Path("store"))
    write_documents("b.jsonl", DOCUMENTS)
    prepare(B, load_tokenizer(save_byte_tokenizer(tmp_path / "other", adds_bos=False)), Path("theirs"))
    both = Source(files=("store", "theirs"), kind="tokens")
    for train in ((both,), (*A, both), (replace(both, weight=1.0),)):
        with pytest.raises(UserError, match="theirs was prepared with another tokenizer than"):
            Loader(replace(config, train=train), tokenizer)


def test_a_store_with_ids_beyond_the_vocabulary_is_named(config: DataConfig, tokenizer: Tokenizer):
    write_documents("b.jsonl", DOCUMENTS)
    store = prepare(A, tokenizer, Path("store"))
    loader = Loader(replace(config, train=(Source(files=("store",), kind="tokens"), *B)), tokenizer)
    written = (store.folder / "tokens.bin").read_bytes()
    for last in (tokenizer.vocab_size, 65535):
        (store.folder / "tokens.bin").write_bytes(written[:-2] + last.to_bytes(2, "little"))
        with pytest.raises(UserError, match=f"store holds token id {last}, outside of the vocabulary of 258 tokens"):
            list(loader.in_order(8))
    # The first row does not hold this one, but is asked to predict it.
    (store.folder / "tokens.bin").write_bytes(written[:16] + b"\xff\xff" + written[18:])
    with pytest.raises(UserError, match="store holds token id 65535"):
        next(Loader(replace(config, train=(Source(files=("store",), kind="tokens"),)), tokenizer).in_order(1))
    (store.folder / "tokens.bin").write_bytes(written)
    assert len(list(loader.in_order(8))) == 9


def test_text_of_which_nothing_counts_is_refused(config: DataConfig, tokenizer: Tokenizer):
    rows = [{"q": "ask " * 9, "a": "answer"}] * 3000
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(files=("a.jsonl",), kind="fields", fields="[q],a")
    config = replace(config, train=(source,), packing="best_fit", overlong="truncate", sequence_length=16)
    with pytest.raises(UserError, match=r"no row of the train data has a token with a loss\n.*sequence_length"):
        Loader(config, tokenizer)
    rows[-1] = {"q": "ask", "a": "answer"}
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert Loader(config, tokenizer).num_rows == 3000
    Path("b.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match="no row of the validation data"):
        Loader(replace(config, validation=(replace(source, files=("b.jsonl",)),)), tokenizer, "validation")


def test_stores_without_weights_are_read_by_their_size(config: DataConfig, tokenizer: Tokenizer):
    write_documents("b.jsonl", DOCUMENTS * 3)
    prepare(B, tokenizer, Path("store"))
    loader = Loader(replace(config, train=(*A, Source(files=("store",), kind="tokens"))), tokenizer)
    assert len(loader.packings) == 2
    once, again = loader.epochs(3600)
    assert abs(once / again - 1) < 0.01
    rows = joined(*loader.in_order(7))
    assert rows.weights.sum() == sum(len(text) + 1 for text in DOCUMENTS) * 4


# --- mixtures


def mixed(tokenizer: Tokenizer) -> DataConfig:
    """Three sources of different kinds, sizes and weights, whose shares change twice."""
    write_documents("a.jsonl", DOCUMENTS)
    write_documents("b.jsonl", ["B" * (n % 40 + 1) for n in range(50)])
    Path("c.jsonl").write_text("".join(json.dumps({"q": "C" * (n % 9), "a": "D" * 12}) + "\n" for n in range(20)))
    chats = Source(files=("c.jsonl",), kind="fields", fields="[q],a", weight=2.0)
    return DataConfig(
        train=(replace(A[0], weight=1.0), replace(B[0], weight=1.0), chats),
        stages=(Stage(first_step=60, weights=(0.0, 1.0, 1.0)), Stage(first_step=133, weights=(1.0, 0.1, 0.1))),
        packing="best_fit",
        sequence_length=24,
        batch_size=8,
    )


def test_weights_are_shares_of_tokens(tokenizer: Tokenizer):
    config = replace(mixed(tokenizer), stages=())
    loader = Loader(config, tokenizer)
    found = Counter()
    for step in range(256):
        batch = loader.batch(step)
        for row, segments in zip(batch.tokens, batch.segments, strict=True):
            source = "b" if ord("B") in row else "c" if ord("D") in row else "a"
            found[source] += int((segments > 0).sum())
    shares = {source: tokens / found.total() for source, tokens in found.items()}
    assert {source: round(share, 2) for source, share in shares.items()} == {"a": 0.25, "b": 0.25, "c": 0.5}
    assert loader.epochs(0) == (0, 0, 0)
    read = [epochs * packing.num_places for epochs, packing in zip(loader.epochs(256), loader.packings, strict=True)]
    assert [round(tokens / sum(read), 2) for tokens in read] == [0.25, 0.25, 0.5]


def test_a_stage_changes_the_shares_from_its_step_on(tokenizer: Tokenizer):
    loader = Loader(mixed(tokenizer), tokenizer)
    before, at, end = loader.epochs(59), loader.epochs(60), loader.epochs(133)
    assert before[0] < at[0] == end[0]
    assert at[1] < end[1]
    assert not any(
        set(row) & set(range(ord("a"), ord("z") + 1)) for step in range(60, 133) for row in loader.batch(step).tokens
    )


def test_validation_of_a_mixture_is_every_row_once(tokenizer: Tokenizer):
    config = replace(mixed(tokenizer), validation_fraction=0.2)
    loader = Loader(config, tokenizer, "validation")
    assert len(loader.packings) == 3
    assert [store.num_documents for store in open_stores(config, tokenizer, "validation")] == [3, 10, 4]
    rows = joined(*loader.in_order(5))
    assert (rows.segments > 0).sum() == sum(packing.num_places for packing in loader.packings)


@pytest.fixture
def expected(tokenizer: Tokenizer) -> list[Batch]:
    """Batches 0 to 199 with packing, mixing, stages and shuffling all on."""
    batches = list(prefetched(Loader(mixed(tokenizer), tokenizer), 0, 200))
    assert len({batch.tokens.tobytes() for batch in batches}) == 200
    return batches


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_batches_are_the_same_for_any_number_of_processes_and_when_others_go_on(
    tokenizer: Tokenizer, expected: list[Batch], processes: int
):
    own = 8 // processes
    for first, last in ((0, 100), (100, 200)):
        loaders = [Loader(mixed(tokenizer), tokenizer) for _ in range(processes)]
        shares = [prefetched(loader, first, last, n * own, n * own + own) for n, loader in enumerate(loaders)]
        for step, parts in enumerate(zip(*shares, strict=True), start=first):
            assert_equal(joined(*parts), expected[step])


@pytest.mark.parametrize(("workers", "first", "start"), [(1, 0, 0), (4, 0, 0), (4, 100, 4), (2, 190, 5)])
def test_batches_are_the_same_for_any_number_of_workers(
    tokenizer: Tokenizer, expected: list[Batch], workers: int, first: int, start: int
):
    loader = Loader(replace(mixed(tokenizer), workers=workers), tokenizer)
    batches = list(prefetched(loader, first, 200, start))
    assert len(batches) == 200 - first
    for step, batch in enumerate(batches, start=first):
        assert_equal(batch, Batch(**{name: x[start:] for name, x in vars(expected[step]).items()}))


def test_best_fit_fills_rows_of_gsm8k(assets: Path):
    source = Source(files=(str(assets / "data" / "gsm8k" / "train.jsonl"),), kind="gsm8k")
    config = DataConfig(train=(source,), packing="best_fit", sequence_length=1024, batch_size=8)
    loader = Loader(config, load_tokenizer(assets / "tokenizers" / "llama2"))
    assert loader.packings[0].store.num_documents == 7473
    assert loader.packings[0].fill_rate > 0.97
    batch = loader.batch(0)
    assert (batch.segments > 0).mean() > 0.97
    assert (batch.weights.sum(axis=1) > 0).all()


def write_instructions(name: str, count: int) -> None:
    rows = [{"instruction": f"Say {'a' * (n % 9)}", "output": f"Well, {'b' * (n % 5)}"} for n in range(count)]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_rows_of_instructions_begin_with_a_prompt_by_default(tokenizer: Tokenizer):
    write_instructions("a.jsonl", 40)
    source = Source(files=("a.jsonl",), kind="instruct", template="chatml")
    config = DataConfig(train=(source,), sequence_length=256, batch_size=4)
    begin = tokenizer.encode("<|im_start|>user", bos=False)

    def begun(loader: Loader) -> list[bool]:
        rows = np.concatenate([batch.tokens for batch in loader.in_order(4)])[: loader.num_rows]
        return [row[: len(begin)].tolist() == begin for row in rows]

    whole, cut = Loader(config, tokenizer), Loader(replace(config, packing="stream"), tokenizer)
    assert all(begun(whole))
    assert whole.notes == ()
    assert not all(begun(cut))
    (note,) = cut.notes
    assert note.startswith("packing = 'stream' splits documents that have prompts")


def test_a_stream_of_a_prepared_store_with_prompts_is_said(config: DataConfig, tokenizer: Tokenizer):
    write_instructions("b.jsonl", 40)
    prepare([Source(files=("b.jsonl",), kind="instruct", template="chatml")], tokenizer, Path("store"))
    config = replace(config, train=(*A, Source(files=("store",), kind="tokens")))
    assert len(Loader(config, tokenizer).notes) == 1
    assert Loader(replace(config, packing="best_fit"), tokenizer).notes == ()
    assert Loader(replace(config, train=A), tokenizer).notes == ()


def test_sources_without_a_template_are_all_named_before_anything_is_read(tokenizer: Tokenizer):
    for name in ("a", "b", "c", "d"):
        write_instructions(f"{name}.jsonl", 2)
    Path("d.jsonl").write_text("broken")
    given = Source(files=("d.jsonl",), kind="instruct", template="alpaca")
    lacking = (
        Source(files=("a.jsonl",), kind="instruct"),
        Source(files=("b.jsonl", "c.jsonl"), kind="chat"),
    )
    config = DataConfig(train=(given, *lacking), sequence_length=8, batch_size=2)
    with pytest.raises(UserError, match=r"^a\.jsonl, b\.jsonl, c\.jsonl: .* has no chat template"):
        Loader(config, tokenizer)


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
    deadline = time.monotonic() + TIMEOUT_S
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


def workers_of(pid: int) -> list[int]:
    children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_closing_ends_the_processes(config: DataConfig, tokenizer: Tokenizer):
    batches = prefetched(Loader(config, tokenizer), 0, 1000, workers=2)
    next(batches)
    assert len(workers_of(os.getpid())) == 2
    batches.close()
    assert not workers_of(os.getpid())


@pytest.fixture
def large(config: DataConfig) -> DataConfig:
    """Batches that no pipe takes: a process is always in the midst of sending one."""
    write_documents("a.jsonl", ["large" * 2**15])
    return replace(config, sequence_length=2**12)


def test_a_process_that_was_killed_is_replaced(large: DataConfig, tokenizer: Tokenizer):
    loader = Loader(large, tokenizer)
    batches = prefetched(loader, 3, 40, workers=2)
    got = [next(batches)]
    for _ in range(2):
        time.sleep(1)  # until they wait for their reader, in the midst of a batch
        for worker in workers_of(os.getpid()):
            os.kill(worker, signal.SIGKILL)
        with pytest.warns(RuntimeWarning, match=r"ended unexpectedly \(exit code -9\); another one resumes"):
            got += itertools.islice(batches, 10)
    got += batches
    assert len(got) == 37
    for step, batch in enumerate(got, start=3):
        assert_equal(batch, loader.batch(step))
    assert not workers_of(os.getpid())


def test_a_store_that_was_removed_is_named_where_a_process_opens_it_again(
    large: DataConfig, tokenizer: Tokenizer, capfd: pytest.CaptureFixture[str]
):
    loader = Loader(large, tokenizer)
    batches = prefetched(loader, 0, 1000, workers=1)
    assert_equal(next(batches), loader.batch(0))
    folder = loader.packings[0].store.folder
    shutil.rmtree(folder)
    assert_equal(next(batches), loader.batch(1))
    (worker,) = workers_of(os.getpid())
    os.kill(worker, signal.SIGKILL)
    with (
        pytest.warns(RuntimeWarning) as warned,
        pytest.raises(UserError, match=f"{folder} is not a prepared store.*\n.*rerun the command"),
    ):
        list(batches)
    (warning,) = warned
    assert "ended unexpectedly (exit code -9); another one resumes" in str(warning.message)
    assert "Traceback" not in capfd.readouterr().err
    assert not workers_of(os.getpid())
    assert_equal(Loader(large, tokenizer).batch(2), loader.batch(2))


class Deadly(Loader):
    """Ends its process at one step."""

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        if step == 5:
            os._exit(3)
        return super().batch(step, start, stop)


def test_a_step_that_ends_every_process_is_an_error_and_no_wait(config: DataConfig, tokenizer: Tokenizer):
    batches = prefetched(Deadly(config, tokenizer), 0, 1000, workers=2)
    with (
        pytest.warns(RuntimeWarning, match="another one resumes"),
        pytest.raises(UserError, match=r"creates batches ended unexpectedly \(exit code 3\)"),
    ):
        list(batches)
    assert not workers_of(os.getpid())


def test_a_failure_in_a_process_reaches_the_reader_at_its_step(config: DataConfig, tokenizer: Tokenizer):
    loader = Watched(config, tokenizer)
    loader.failing = 2
    batches = prefetched(loader, 0, 9, workers=1)
    for step in range(2):
        assert_equal(next(batches), loader.batch(step))
    with pytest.raises(UserError, match="no such row"):
        next(batches)
    assert not workers_of(os.getpid())


COMMAND = """
import signal, sys
from camelid.data.config import DataConfig, Source
from camelid.data.rows.loader import Loader
from camelid.data.rows.prefetch import prefetched
from camelid.text.tokenizer import load_tokenizer

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *about: None)
    config = DataConfig(train=(Source(files=("a.jsonl",)),), sequence_length=2**12, batch_size=4, workers=2)
    batches = prefetched(Loader(config, load_tokenizer(sys.argv[1])), 0, 10**9)
    for asked in sys.stdin:
        next(batches)
        print("batch", flush=True)
"""


@contextlib.contextmanager
def command(tokenizer: Tokenizer) -> Iterator[tuple[subprocess.Popen[str], Callable[[], str]]]:
    """A process that reads as many batches as it is asked for, and the function that asks."""
    Path("command.py").write_text(COMMAND)
    process = subprocess.Popen(
        [sys.executable, "command.py", str(tokenizer.files[0].parent)],
        env=os.environ | {"PYTHONPATH": str(Path(camelid.__file__).parents[1])},
        stdin=-1,
        stdout=-1,
        stderr=-1,
        text=True,
        process_group=0,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    into, out = process.stdin, process.stdout

    def ask() -> str:
        into.write("\n")
        into.flush()
        return out.readline()

    try:
        yield process, ask
    finally:
        process.kill()
        process.wait()


def test_processes_leave_signals_to_their_parent_and_end_with_it(large: DataConfig, tokenizer: Tokenizer):
    with command(tokenizer) as (process, ask):
        answers = [ask()]
        workers = workers_of(process.pid)
        # Enough that each process makes one that it had not made before.
        for n in range(12):
            os.killpg(process.pid, signal.SIGTERM if n % 2 else signal.SIGINT)
            answers.append(ask())
        after = workers_of(process.pid)
    deadline = time.monotonic() + TIMEOUT_S
    while (left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    _, err = process.communicate()
    assert answers == ["batch\n"] * 13, err
    assert "KeyboardInterrupt" not in err
    assert len(workers) == 2
    assert sorted(after) == sorted(workers), "one that a signal ended would be replaced"
    assert not left, "they should end with their parent"


def test_a_program_may_end_in_the_midst_of_its_batches(large: DataConfig, tokenizer: Tokenizer):
    with command(tokenizer) as (process, ask):
        ask()
        workers = workers_of(process.pid)
        _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (0, "")
    assert len(workers) == 2
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
