import itertools
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from camelid.data import report, samples
from camelid.data.config import DataConfig, Source, Stage
from camelid.data.preparation.prepare import prepare
from camelid.data.preparation.store import VALIDATION, Store
from camelid.data.rows.loader import Loader
from camelid.data.rows.packing import Packing
from camelid.text.tokenizer import Tokenizer
from data.stores import write_store
from text.tiny import BOS, EOS


def of_lengths(folder: Path, lengths: list[int]) -> Store:
    return write_store(folder, [[7] * length for length in lengths])


def masked(folder: Path, tokenizer: str = "none", documents: int = 60, vocab_size: int = 258) -> Store:
    """Documents of letters between BOS and EOS, most of them learnt at their end alone, some not at all."""
    draw = random.Random(3)
    tokens = [[BOS, *draw.choices(range(97, 123), k=draw.randint(1, 40)), EOS] for _ in range(documents)]
    weights = []
    for n, each in enumerate(tokens):
        learnt = 0 if n % 7 == 3 else draw.randint(1, len(each) - 1)
        weights.append([0.0] * (len(each) - learnt) + [0.5 if n % 5 == 0 else 1.0] * learnt)
    return write_store(folder, tokens, weights, vocab_size, tokenizer)


@pytest.fixture
def loader(tokenizer: Tokenizer, tmp_path: Path) -> Loader:
    """Three sources, one of them of plain text, and two stages."""
    masked(tmp_path / "a", tokenizer.fingerprint)
    masked(tmp_path / "b", tokenizer.fingerprint, documents=25)
    write_store(tmp_path / "c", [[BOS, *range(65, 80), EOS]] * 9, vocab_size=258, tokenizer=tokenizer.fingerprint)
    weights = {"a": 5.0, "b": 2.0, "c": 0.0}
    train = tuple(
        Source(files=(str(tmp_path / name),), kind="tokens", weight=weight) for name, weight in weights.items()
    )
    stages = (Stage(first_step=30, weights=(1.0, 1.0, 8.0)), Stage(first_step=90, weights=(1.0, 0.0, 0.0)))
    config = DataConfig(train=train, stages=stages, packing="best_fit", sequence_length=16, batch_size=4)
    return Loader(config, tokenizer)


# --- stores


def test_lengths_are_counted_the_same_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    lengths = random.Random(1).choices(range(1, 12), k=100)
    store = of_lengths(tmp_path / "store", lengths)
    for block in (1, 7, 1000):
        monkeypatch.setattr(report, "BLOCK", block)
        tokens, documents = report.count_lengths(store.offsets)
        assert dict(zip(tokens.tolist(), documents.tolist(), strict=True)) == Counter(lengths)
    told = report.of_store(store)["lengths"]
    in_order = sorted(lengths)
    assert (told["shortest"], told["longest"]) == (1, 11)
    assert told["mean"] == pytest.approx(sum(lengths) / 100)
    assert [told[name] for name in ("median", "p90", "p99")] == [in_order[49], in_order[89], in_order[98]]


@pytest.mark.parametrize(
    ("lengths", "edges"),
    [
        ([5] * 10, [5, 6]),
        ([3, 4, 4, 9], [3, 4, 5, 6, 7, 8, 9, 10]),
        ([*range(1, 200), 5000], [*range(0, 201, 20), 5001]),
    ],
    ids=["of one length", "few", "one far off"],
)
def test_every_document_stands_in_its_bar(lengths: list[int], edges: list[int], tmp_path: Path):
    half = len(lengths) // 2
    parts = [lengths[:half], lengths[half:]]
    drawn = report.histogram([of_lengths(tmp_path / str(n), part) for n, part in enumerate(parts)])
    assert drawn["edges"] == edges
    for part, bars in zip(parts, drawn["documents"], strict=True):
        assert bars == [sum(a <= length < b for length in part) for a, b in itertools.pairwise(edges)]
        assert sum(bars) == len(part)


@pytest.mark.parametrize("block", [1, 50, 2**20])
def test_tokens_with_loss_and_documents_without(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "BLOCK", block)
    store = masked(tmp_path / "store")
    bounds = list(zip(store.offsets[:-1].tolist(), store.offsets[1:].tolist(), strict=True))
    learnt = [int((store.weights(*each)[1:] > 0).sum()) for each in bounds]
    told = report.of_store(store)
    assert (told["documents"], told["tokens"], told["with_loss"]) == (60, store.num_tokens, sum(learnt))
    silent = [n for n, count in enumerate(learnt) if not count]
    assert told["documents_without_loss"] == {"count": 9, "first": silent[:5]}
    assert told["weights"] == [0.0, 0.5, 1.0]
    assert told["held_out"] is None


def test_a_first_token_has_no_loss_whatever_its_weight(tmp_path: Path):
    store = write_store(tmp_path / "store", [[1, 2], [3]], [[1.0, 0.0], [1.0]])
    told = report.of_store(store)
    assert (told["with_loss"], told["documents_without_loss"]) == (0, {"count": 2, "first": [0, 1]})


@pytest.mark.parametrize("block", [1, 3, 2**20])
def test_in_plain_text_only_single_tokens_have_no_loss(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(report, "BLOCK", block)
    store = of_lengths(tmp_path / "store", [3, 1, 2, 1, 1, 1, 5, 1, 1])
    assert store.codes is None
    told = report.of_store(store)
    assert (told["with_loss"], told["documents_without_loss"]) == (7, {"count": 6, "first": [1, 3, 4, 5, 7]})


def test_what_was_held_out_is_told(tmp_path: Path):
    store = of_lengths(tmp_path / "store", [3, 4])
    of_lengths(store.folder / VALIDATION, [5])
    assert report.of_store(store)["held_out"] == {"documents": 1, "tokens": 5}


# --- rows


@pytest.mark.parametrize("method", ["stream", "best_fit", "none"])
@pytest.mark.parametrize("overlong", ["split", "truncate", "drop"])
@pytest.mark.parametrize(
    "plain", [None, [1, 9, 30, 1, 1, 1, 1, 1, 1, 2], [2, 9, 30]], ids=["masked", "some short", "text"]
)
def test_rows_without_loss_are_those_whose_weights_are_all_zero(
    method, overlong, plain: list[int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(report, "BLOCK", 100)
    store = of_lengths(tmp_path / "store", plain) if plain else masked(tmp_path / "store")
    for size in (1, 4, 8):
        packing = Packing(store, size, method, "split" if method == "stream" else overlong)
        weights = packing.rows(np.arange(packing.num_rows)).weights
        silent = np.flatnonzero((weights == 0).all(axis=1)).tolist()
        told = report.of_packing(packing)
        assert told["rows_without_loss"] == {"count": len(silent), "first": silent[:5]}
        assert (told["rows"], told["filled"]) == (packing.num_rows, packing.fill_rate)
        of_first = report.silent_among_first(packing, 3)
        examined = min(3, packing.num_rows)
        assert of_first == (sum(row < 3 for row in silent), examined, packing.num_rows)


def test_plain_text_is_not_read_for_rows_that_must_have_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(Packing, "rows")
    store = of_lengths(tmp_path / "store", [2, 9, 30])
    for method in ("stream", "best_fit"):
        assert report.of_packing(Packing(store, 4, method))["rows_without_loss"] == {"count": 0, "first": []}


def test_split_truncated_and_dropped_documents_are_counted(tmp_path: Path):
    store = of_lengths(tmp_path / "store", [4, 3, 3, 8, 20])  # stream: | 4 | 3 1 | 2 2 | 4 | 2 2 | ...

    def counts(*how) -> tuple[int, ...]:
        told = report.of_packing(Packing(store, 4, *how))
        return tuple(told[name] for name in ("split", "truncated", "dropped", "lost"))

    assert counts("stream") == (3, 0, 0, 0)
    assert counts("best_fit", "split") == (2, 0, 0, 0)
    assert counts("best_fit", "truncate") == (0, 2, 0, 3 + 15)
    assert counts("best_fit", "drop") == (0, 0, 2, 7 + 19)


# --- recipes


@pytest.mark.parametrize("steps", [20, 110])
def test_shares_and_repeats_are_those_of_the_rows_that_training_takes(loader: Loader, steps: int):
    seen = []
    told = report.of_loader(loader, steps, lambda done, total: seen.append((done, total)))
    sources, _ = loader.mixture.find(np.arange(steps * 4))
    num_rows = np.array([packing.num_rows for packing in loader.packings])
    per_row = np.array([packing.num_places for packing in loader.packings]) / num_rows
    asked = [(5 / 7, 2 / 7, 0), (0.1, 0.1, 0.8), (1, 0, 0)]
    for stage, first, last, share in zip(told["stages"], (0, 30, 90), (30, 90, steps), asked, strict=True):
        rows = np.bincount(sources[first * 4 : last * 4], minlength=3)
        assert (stage["first_step"], stage["steps"]) == (first, max(0, min(last, steps) - first))
        assert stage["rows"] == rows.tolist()
        np.testing.assert_allclose(stage["asked"], share)
        np.testing.assert_allclose(stage["given"], rows * per_row / max(1, (rows * per_row).sum()))
        np.testing.assert_allclose(stage["repeats"], rows / num_rows)
    np.testing.assert_allclose(told["repeats"], np.bincount(sources, minlength=3) / num_rows)
    assert told["rows"] == num_rows.sum()
    assert [Path(source["name"]).name for source in told["sources"]] == ["a", "b", "c"]
    assert seen[-1] == (num_rows[:2].sum(), num_rows.sum()), "the third needs no look"


def test_sources_that_are_stores_have_their_names(tokenizer: Tokenizer, tmp_path: Path):
    Path("rows.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    text = Source(files=("rows.jsonl",))
    prepare([text], tokenizer, tmp_path / "mine", validation_fraction=0.3)
    mine = Source(files=(str(tmp_path / "mine"),), kind="tokens")

    def names(split: Literal["train", "validation"], *train: Source, **how: Any) -> list[str]:
        config = DataConfig(train=train, sequence_length=2, batch_size=2, cache="cache", **how)
        return [source["name"] for source in report.of_loader(Loader(config, tokenizer, split))["sources"]]

    assert names("train", text) == names("validation", text, validation_fraction=0.3) == ["rows.jsonl"]
    assert names("train", mine, validation_fraction=0.3) == [str(tmp_path / "mine")]
    assert names("validation", mine, validation_fraction=0.3) == [str(tmp_path / "mine" / VALIDATION)]
    assert names("validation", text, validation=(mine,)) == [str(tmp_path / "mine")]


def test_the_rows_shown_are_the_first_of_the_training(loader: Loader, tokenizer: Tokenizer):
    batch = loader.batch(0)
    shown = samples.rows_as_text(loader, tokenizer, 6)
    sources, rows = loader.mixture.find(np.arange(6))
    assert [(row["source"], row["row"]) for row in shown] == list(zip(sources.tolist(), rows.tolist(), strict=True))
    for n, row in enumerate(shown[:4]):
        segments, weights = batch.segments[n], batch.weights[n]
        assert len(row["documents"]) == segments.max()
        assert row["padding"] == (segments == 0).sum()
        for segment, pieces in enumerate(row["documents"], start=1):
            here = segments == segment
            ends = bool(weights[here][-1] > 0)
            ids = [*batch.tokens[n][here].tolist(), *batch.targets[n][here][-1:].tolist() * ends]
            loss = [0, *weights[here][: None if ends else -1].tolist()]
            assert "".join(piece["text"] for piece in pieces) == tokenizer.backend.decode(ids)
            assert [piece["weight"] for piece in pieces for _ in range(piece["tokens"])] == loss
            assert [piece["text"] for piece in pieces if piece["special"]] == [
                {BOS: "<s>", EOS: "</s>"}[token] for token in ids if token >= BOS
            ]


def test_rows_of_a_stream_end_where_the_next_begins(tokenizer: Tokenizer, tmp_path: Path):
    write_store(tmp_path / "s", [[BOS, *b"abcd", EOS], [BOS, *b"ef", EOS]], None, 258, tokenizer.fingerprint)
    train = (Source(files=(str(tmp_path / "s"),), kind="tokens"),)
    config = DataConfig(train=train, sequence_length=4, batch_size=1, shuffle=False)
    loader = Loader(config, tokenizer)

    def told(row: dict) -> list[str]:
        return ["".join(f"({p['text']})" if p["weight"] else p["text"] for p in pieces) for pieces in row["documents"]]

    rows = samples.rows_as_text(loader, tokenizer, 3)
    assert [told(row) for row in rows] == [["<s>(abcd)"], ["d(</s>)", "<s>(ef)"], ["f(</s>)"]]
    across = Loader(replace(config, cross_documents=True), tokenizer)
    assert told(samples.rows_as_text(across, tokenizer, 3)[1]) == ["d(</s>)<s>(ef)"]


# --- text


def test_documents_are_shown_up_to_a_length(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(samples, "SHOWN", 4)
    write_store(tmp_path / "s", [[BOS, *b"abcdef", EOS], [BOS, *b"g", EOS], [BOS]], [[1.0] * 8, [1.0, 0, 2], [0]], 258)
    first, second = samples.documents_as_text(Store.open(tmp_path / "s"), tokenizer, 2)
    assert (first["document"], first["tokens"], first["left_out"]) == (0, 8, 4)
    assert first["documents"] == [
        [
            {"text": "<s>", "tokens": 1, "weight": 0.0, "special": True},
            {"text": "abc", "tokens": 3, "weight": 1.0, "special": False},
        ]
    ]
    assert (second["tokens"], second["left_out"]) == (3, 0)
    assert [(piece["text"], piece["weight"]) for piece in second["documents"][0]] == [
        ("<s>", 0),
        ("g", 0),
        ("</s>", 2),
    ]
    assert len(samples.documents_as_text(Store.open(tmp_path / "s"), tokenizer, 9)) == 3
