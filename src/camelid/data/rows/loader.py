"""The batch of a step, as a function of the configuration and the step alone."""

import atexit
import contextlib
import os
import pickle
import signal
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import numpy as np

from camelid.data.config import DataConfig, Source
from camelid.data.preparation.parts import Stages, Task
from camelid.data.preparation.prepare import prepare
from camelid.data.preparation.store import AGAIN, VALIDATION, Store, is_store
from camelid.data.preparation.workers import Worker, WorkerEnded, end_workers, receive, start_worker
from camelid.data.readers.sources import refuse_repeated, source_files
from camelid.data.rows.batch import Batch
from camelid.data.rows.mixture import Mixture, Share, row_shares
from camelid.data.rows.packing import OR_DATA_CACHE, Packing
from camelid.disk.paths import cache_folder, make_writable
from camelid.errors import UserError
from camelid.text.tokenizer import Tokenizer

Split = Literal["train", "validation"]

LOOKED_AT = 2**20  # tokens of rows, at once, where a first one that counts is looked for


class Loader:
    """The rows of one split: of the given stores, or those of the configuration, which are prepared when needed."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        split: Split = "train",
        progress: Stages | None = None,
        stores: Sequence[Store] | None = None,
    ):
        self.config = config
        self.vocab_size = tokenizer.vocab_size
        stores = open_stores(config, tokenizer, split, progress) if stores is None else stores
        looped = config.cross_documents and not config.shuffle and len(stores) == 1 and split == "train"
        self.packings = tuple(
            Packing(
                store,
                config.sequence_length,
                config.packing_method,
                config.overlong,
                config.cross_documents,
                looped,
                data_cache(config),
            )
            for store in stores
        )
        for packing in self.packings:
            _check_size(packing, split)
        _check_loss(self.packings, split)
        self.mixture = _mixture(config, self.packings, split)

    def check_ids(self, vocab_size: int) -> None:
        """Raises UserError if a store holds an id that is not below a model's `vocab_size`."""
        if self.vocab_size <= vocab_size:  # the stores hold no ids beyond the tokenizer's
            return
        for store in (packing.store for packing in self.packings):
            blocks = (store.tokens[at : at + LOOKED_AT] for at in range(0, store.num_tokens, LOOKED_AT))
            if (largest := max((int(block.max()) for block in blocks), default=0)) >= vocab_size:
                raise UserError(
                    f"{store.folder} holds token id {largest}, and the model's vocabulary has {vocab_size}",
                    "Train a model with more embeddings, or leave out the texts and templates that need this token.",
                )

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of how the rows are made."""
        # Weights of their own have documents of which something is not learnt: prompts.
        prompts = any(packing.method == "stream" and packing.store.codes is not None for packing in self.packings)
        if not (prompts or (self.config.packing_method == "stream" and any(s.has_prompts for s in self.config.train))):
            return ()
        return (
            "packing = 'stream' cuts documents that have prompts, and rows begin in the midst of them; "
            "best_fit keeps them whole",
        )

    @property
    def stores(self) -> tuple[Store, ...]:
        return tuple(packing.store for packing in self.packings)

    @property
    def num_rows(self) -> int:
        return sum(packing.num_rows for packing in self.packings)

    @property
    def num_tokens(self) -> int:
        return sum(packing.store.num_tokens for packing in self.packings)

    def batch(self, step: int, start: int = 0, stop: int | None = None) -> Batch:
        """Rows [start, stop) of a step's batch; the same on whatever process, in whatever order it is asked for."""
        first = step * self.config.batch_size
        return self._rows(*self.mixture.find(np.arange(first, first + self.config.batch_size)[start:stop]))

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every row once; the last batch is filled up with rows of weight 0."""
        ends = np.cumsum([packing.num_rows for packing in self.packings])
        for first in range(0, self.num_rows, batch_size):
            rows = np.arange(first, first + batch_size)
            which = np.minimum(np.searchsorted(ends, rows, "right"), len(ends) - 1)
            yield self._rows(which, rows - np.append(0, ends)[which])

    def epochs(self, step: int) -> tuple[float, ...]:
        """How often each of `packings` was read before a step."""
        taken = self.mixture.taken(step * self.config.batch_size)
        return tuple(rows / packing.rows_per_epoch for rows, packing in zip(taken, self.packings, strict=True))

    def _rows(self, which: np.ndarray, rows: np.ndarray) -> Batch:
        """Rows of packings, given by the packing's number and the row's."""
        if len(self.packings) == 1:
            return self._checked(self.packings[0], rows)
        parts = [vars(self._checked(packing, rows[which == n])) for n, packing in enumerate(self.packings)]
        place = np.argsort(np.argsort(which, kind="stable"))
        return Batch(**{name: np.concatenate([part[name] for part in parts])[place] for name in parts[0]})

    def _checked(self, packing: Packing, rows: np.ndarray) -> Batch:
        """Rows of a packing; raises UserError for ids that no row of the embedding table stands for."""
        batch = packing.rows(rows)
        # Unsigned, so that what was too large for an int32 is not taken as negative.
        largest = max(int(x.view(np.uint32).max(initial=0)) for x in (batch.tokens, batch.targets))
        if largest >= self.vocab_size:
            raise UserError(
                f"{packing.store.folder} holds token id {largest}, outside the tokenizer's vocabulary of "
                f"{self.vocab_size}",
                AGAIN,
            )
        return batch


def prefetched(
    loader: Loader,
    first_step: int,
    last_step: int,
    start: int = 0,
    stop: int | None = None,
    depth: int = 2,
    workers: int | None = None,
) -> Generator[Batch, None, None]:
    """The batches of steps [first_step, last_step), made ahead.

    By `workers` processes (left out: as the configuration says), each `depth` batches ahead, or with 0 of them by a
    thread of this one. The batches and their order are the same. A process that is killed is replaced, with a
    RuntimeWarning; where two end at one step, that is a UserError.
    """
    workers = loader.config.workers if workers is None else workers
    make = partial(loader.batch, start=start, stop=stop)
    steps = range(first_step, last_step)
    return _by_processes(make, steps, depth, workers) if workers else _by_thread(make, steps, depth)


def _by_thread(make: Callable[[int], Batch], steps: range, depth: int) -> Generator[Batch, None, None]:
    maker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="camelid-batches")
    ahead = deque()
    try:
        for step in steps:
            ahead.append(maker.submit(make, step))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        maker.shutdown(cancel_futures=True)


def _by_processes(make: Callable[[int], Batch], steps: range, depth: int, workers: int) -> Generator[Batch, None, None]:
    processes: list[Worker] = []
    packed = pickle.dumps(make)
    close = partial(end_workers, processes)
    atexit.register(close)  # the library would end them by SIGTERM, which they do not hear, and wait

    def start(steps: range) -> Worker:
        # Schedulers send SIGTERM to every process: this one needs batches until it has saved.
        return start_worker(_work, packed, steps, depth, duplex=False, blocked=[signal.SIGTERM])

    def batch(step: int) -> Batch:
        number = steps.index(step) % workers
        try:
            return _receive(processes[number])
        except WorkerEnded as ended:
            warnings.warn(f"{ended.problem}; another one goes on from step {step}", RuntimeWarning, stacklevel=2)
            end_workers([processes[number]])
            processes[number] = start(range(step, steps.stop, workers))
            return _receive(processes[number])  # or it cannot be made

    try:
        for number in range(min(workers, len(steps))):
            processes.append(start(steps[number::workers]))
        yield from _by_thread(batch, steps, depth)
    finally:
        close()
        atexit.unregister(close)


def _receive(worker: Worker) -> Batch:
    batch, error = receive(worker, "makes batches", "data.workers")
    if error is not None:
        raise error
    return batch


def _work(connection: Connection, packed: bytes, steps: range, depth: int) -> None:
    """Sends the batches of these steps, until nobody reads them; what makes them opens its stores here."""
    with contextlib.suppress(BrokenPipeError):
        try:
            for batch in _by_thread(_unpacked(packed), steps, depth):
                connection.send((batch, None))
        except UserError as error:
            while True:  # steps after this one are waited for already
                connection.send((None, error))


def _unpacked(packed: bytes) -> Callable[[int], Batch]:
    try:
        return pickle.loads(packed)
    except UserError as error:
        raise UserError(
            f"{error.problem}, which a process that makes batches was to open again",
            "If it was removed: the same command goes on from the newest checkpoint, and prepares its sources again.",
        ) from error


# Stores ---------------------------------------------------------------------------------


def open_stores(
    config: DataConfig, tokenizer: Tokenizer, split: Split = "train", progress: Stages | None = None
) -> list[Store]:
    """The stores that a split is read from, prepared first where they are not there.

    Each source of a mixture has one. Sources without weights share one, as if they were one source. Raises UserError
    where there is no such split, or a store that is there was made with another tokenizer.
    """
    held_out = split == "validation" and bool(config.validation_fraction)
    groups = _groups(config, config.train if split == "train" or held_out else config.validation)
    if not groups:
        raise UserError("there is no validation text", "Set validation or validation_fraction.")
    if split == "validation" and not held_out:
        files = [path for source in (*config.train, *config.validation) for path in source_files(source)]
        refuse_repeated(files, "Validate on text that is not trained on.")
    stores = [
        _ready(group[0], config, tokenizer) if _is_ready(group[0]) else _prepared(group, config, tokenizer, progress)
        for group in groups
    ]
    return [Store.open(store.folder / VALIDATION) for store in stores] if held_out else stores


def data_cache(config: DataConfig) -> Path:
    """Where what is prepared for recipes is kept: the recipe's choice, or a folder of the cache."""
    return default_cache() if config.cache is None else Path(config.cache)


def default_cache() -> Path:
    """The folder of the cache for what is prepared for recipes that choose none."""
    return cache_folder() / "data"


def _groups(config: DataConfig, sources: Sequence[Source]) -> list[tuple[Source, ...]]:
    """Which sources share a store."""
    if _is_mixed(config) and sources is config.train:
        return [(source,) for source in sources]
    alone = [source for source in sources if _is_ready(source)]
    together = tuple(source for source in sources if not _is_ready(source))
    return [*([together] if together else []), *((source,) for source in alone)]


def _is_mixed(config: DataConfig) -> bool:
    return bool(config.stages) or any(source.weight is not None for source in config.train)


def _is_ready(source: Source) -> bool:
    """Whether a source is one store, which need not be prepared again."""
    return source.kind == "tokens" and len(source.files) == 1 and is_store(source.files[0])


def _ready(source: Source, config: DataConfig, tokenizer: Tokenizer) -> Store:
    store = Store.open(source.files[0])
    store.check_tokenizer(tokenizer.fingerprint, tokenizer.files[0])
    if source in config.train and config.validation_fraction:
        options = (store.manifest.get("prepared") or {"options": {}})["options"]
        if not is_store(store.folder / VALIDATION) or options.get("validation_fraction") != config.validation_fraction:
            raise UserError(
                f"{store.folder} was not prepared with validation_fraction = {config.validation_fraction}",
                "Prepare it with that, or name what to validate on: validation = a source of its own.",
            )
    return store


def _prepared(group: tuple[Source, ...], config: DataConfig, tokenizer: Tokenizer, progress: Stages | None) -> Store:
    fraction = config.validation_fraction if group[0] in config.train else 0.0
    about = {"validation_fraction": fraction, "seed": config.seed, "sequence_length": config.sequence_length}
    root = data_cache(config)
    # Another folder for whatever has changed: what is in the cache is never wrong, and need not be asked about.
    folder = root / Task(group, tokenizer, **about).content_key(progress)[:32]
    if not is_store(folder):
        make_writable(root, OR_DATA_CACHE)
    # One process is this one, whose tokenizer may use all cores.
    workers = config.prepare_workers if config.prepare_workers > 1 else 0
    store = prepare(group, tokenizer, folder, **about, workers=workers, progress=progress)
    mark_used(store, config)
    return store


def mark_used(store: Store, config: DataConfig) -> None:
    """Sets the time at which a store of the cache was last used, which `camelid data cache --prune` goes by, to now."""
    folder = store.folder.parent if store.folder.name == VALIDATION else store.folder
    if folder.parent.resolve() == data_cache(config).resolve():
        with contextlib.suppress(OSError):
            os.utime(folder)


def _mixture(config: DataConfig, packings: Sequence[Packing], split: Split) -> Mixture:
    tokens_per_row = [packing.num_places / packing.num_rows for packing in packings]
    weights = [float(packing.num_places) for packing in packings]
    stages = []
    if split == "train" and _is_mixed(config):
        weights = [
            weight if source.weight is None else source.weight
            for source, weight in zip(config.train, weights, strict=True)
        ]
        stages = [Share(stage.first_step * config.batch_size, stage.weights) for stage in config.stages]
    shares = [Share(0, tuple(weights)), *stages]
    return Mixture(
        tuple(packing.num_rows for packing in packings),
        tuple(Share(share.first, row_shares(share.weights, tokens_per_row)) for share in shares),
        config.shuffle,
        config.seed,
    )


def _check_size(packing: Packing, split: Split) -> None:
    store = packing.store
    # The first token of a document is predicted only where rows run across documents.
    predicted = store.num_tokens - (1 if packing.cross_documents else store.num_documents)
    if predicted > 0 and not packing.num_rows:
        raise UserError(
            f"every document of the {split} text is longer than a row of {packing.sequence_length}",
            "Take longer rows, or overlong = 'split' or 'truncate'.",
        )
    if predicted < 1:
        raise UserError(
            f"the {split} text has nothing to predict: {store.num_tokens} tokens in all",
            "Give documents of two tokens or more.",
        )
    if split == "train" and packing.method == "stream" and store.num_tokens < packing.sequence_length:
        raise UserError(
            f"the train text has {store.num_tokens} tokens, fewer than a row of {packing.sequence_length}",
            f"Give more text, or set sequence_length = {store.num_tokens} or less.",
        )


def _check_loss(packings: Sequence[Packing], split: Split) -> None:
    if not any(map(_teaches, packings)):
        raise UserError(
            f"no row of the {split} text holds a token that the loss counts",
            "Take longer rows: prompts may fill them. "
            f"`camelid data inspect {packings[0].store.folder}` shows what counts.",
        )


def _teaches(packing: Packing) -> bool:
    """Whether a row has some loss; one of the first nearly always does."""
    first, count = 0, 1
    while first < packing.num_rows:
        rows = np.arange(first, min(first + count, packing.num_rows))
        if packing.rows(rows).weights.any():
            return True
        first, count = first + count, min(2 * count, max(1, LOOKED_AT // packing.sequence_length))
    return False
