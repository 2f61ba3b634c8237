"""The batch of a step, as a function of the configuration and the step alone."""

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np

from camelid.data.batch import Batch
from camelid.data.config import DataConfig
from camelid.data.packing_old import Packing  # until data/loader.py is replaced
from camelid.data.sources import list_files, read_documents, refuse_repeated
from camelid.errors import UserError
from camelid.text.tokenizer import Tokenizer

Split = Literal["train", "validation"]
Progress = Callable[[int], None]

# Enough to keep every core busy; the tokenizer needs about a hundred bytes for each of them meanwhile.
CHARACTERS_AT_ONCE = 1_000_000


class Loader:
    """The rows of one split, tokenized when it is made."""

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, split: Split = "train", progress: Progress | None = None
    ):
        self.config = config
        self._packing = _pack_split(config, tokenizer, split, progress)
        _check_size(self._packing, split)
        self._order = _order(self._packing.num_rows, config)

    @property
    def num_rows(self) -> int:
        return self._packing.num_rows

    @property
    def num_tokens(self) -> int:
        return len(self._packing.tokens)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows [start, stop) of a step's batch; the same on whatever process, in whatever order it is asked for."""
        first = step * self.config.batch_size
        places = range(first, first + self.config.batch_size)[start:stop]
        return self._packing.rows(np.array([self._order[place] for place in places], dtype=np.int64))

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every row once; the last batch is filled up with rows of weight 0."""
        for first in range(0, self.num_rows, batch_size):
            yield self._packing.rows(np.arange(first, first + batch_size))


def prefetched(
    loader: Loader, first_step: int, last_step: int, start: int = 0, stop: int | None = None, depth: int = 2
) -> Iterator[Batch]:
    """The batches of steps [first_step, last_step), `depth` of them made ahead by a thread."""
    maker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="camelid-batches")
    ahead = deque()
    try:
        for step in range(first_step, last_step):
            ahead.append(maker.submit(loader.batch, step, start, stop))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        maker.shutdown(cancel_futures=True)


def _order(num_rows: int, config: DataConfig):
    """Which row is at which place of an endless run through all of them."""
    import grain

    rows = grain.MapDataset.range(num_rows)
    return (rows.shuffle(config.seed) if config.shuffle else rows).repeat()


def _pack_split(config: DataConfig, tokenizer: Tokenizer, split: Split, progress: Progress | None) -> Packing:
    files = _files(config, split)
    pack = functools.partial(_pack, config=config, tokenizer=tokenizer, progress=progress)
    texts = read_documents(files, config.text_key)
    if not config.validation_fraction:
        return pack(texts)
    # Reading twice costs little beside tokenizing what the other split needs.
    count = sum(1 for _ in read_documents(files, config.text_key))
    if count < 2:
        return _hold_out_rows(pack(texts), config.validation_fraction, split)
    held_out = _held_out(count, config)
    return pack(text for index, text in enumerate(texts) if (index in held_out) == (split == "validation"))


def _files(config: DataConfig, split: Split) -> list[Path]:
    assert split in ("train", "validation"), split
    train = list_files(config.train)
    if split == "train" or config.validation_fraction:
        return train
    if not config.validation:
        raise UserError("there is no validation text", "set validation or validation_fraction")
    validation = list_files(config.validation)
    refuse_repeated([*train, *validation], "validate on text that is not trained on")
    return validation


def _held_out(count: int, config: DataConfig) -> frozenset[int]:
    """The documents kept for validation: at least one, and never all."""
    size = min(max(1, round(count * config.validation_fraction)), count - 1)
    return frozenset(np.random.default_rng(config.seed).permutation(count)[:size].tolist())


def _hold_out_rows(packing: Packing, fraction: float, split: Split) -> Packing:
    """One document, cut at the beginning of a row; no token is predicted across the cut."""
    if packing.num_rows < 2:
        raise UserError(
            f"one document of {len(packing.tokens)} tokens is too short to hold out rows of {packing.sequence_length}",
            "choose a smaller sequence_length, or name validation files",
        )
    size = min(max(1, round(packing.num_rows * fraction)), packing.num_rows - 1)
    cut = (packing.num_rows - size) * packing.sequence_length
    tokens = packing.tokens[:cut] if split == "train" else packing.tokens[cut:]
    return Packing(tokens, np.array([0, len(tokens)]), packing.sequence_length)


def _pack(texts: Iterable[str], config: DataConfig, tokenizer: Tokenizer, progress: Progress | None) -> Packing:
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    bare = len(tokenizer.encode("", bos=config.add_bos, eos=config.add_eos))
    pieces = [np.empty(0, dtype)]
    lengths = [0]
    done = 0
    for chunk in _chunks(texts):
        encoded = tokenizer.encode_batch(chunk, bos=config.add_bos, eos=config.add_eos)
        # A document without text would teach that EOS follows BOS.
        kept = [ids for ids in encoded if len(ids) > bare]
        pieces.append(np.fromiter(itertools.chain.from_iterable(kept), dtype))
        lengths.extend(map(len, kept))
        done += len(chunk)
        if progress is not None:
            progress(done)
    return Packing(np.concatenate(pieces), np.cumsum(lengths, dtype=np.int64), config.sequence_length)


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if characters >= CHARACTERS_AT_ONCE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _check_size(packing: Packing, split: Split) -> None:
    if not packing.num_targets:
        raise UserError(
            f"the {split} text has nothing to predict: {len(packing.tokens)} tokens in all",
            "give documents of two tokens or more",
        )
    if split == "train" and len(packing.tokens) < packing.sequence_length:
        raise UserError(
            f"the train text has {len(packing.tokens)} tokens, fewer than a row of {packing.sequence_length}",
            f"give more text, or set sequence_length = {len(packing.tokens)} or less",
        )
