"""Opens the stores of a recipe, and prepares those that do not exist yet in the cache."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from camelid.data.config import DataConfig, Source
from camelid.data.preparation.prepare import prepare
from camelid.data.preparation.store import VALIDATION, Store, is_store
from camelid.data.preparation.task import StageProgress, Task
from camelid.data.readers.file_names import refuse_repeated
from camelid.data.readers.sources import source_files
from camelid.disk.paths import cache_folder, make_writable
from camelid.errors import UserError
from camelid.text.tokenizer import Tokenizer

Split = Literal["train", "validation"]

OR_DATA_CACHE = ", or data.cache in the recipe,"
"""Part of the advice if the cache cannot be written."""


def open_stores(
    config: DataConfig, tokenizer: Tokenizer, split: Split = "train", progress: StageProgress | None = None
) -> list[Store]:
    """Returns the stores of a split, and prepares those that do not exist yet.

    Each source of a mixture has its own store. Sources without weights share one, as if they were one source. Raises
    UserError if there is no data for the split, or if an existing store was prepared with another tokenizer.
    """
    held_out = split == "validation" and bool(config.validation_fraction)
    groups = _groups(config, _sources(config, split))
    if not groups:
        raise UserError("there is no validation data", "Set validation or validation_fraction.")
    if split == "validation" and not held_out:
        files = [path for source in (*config.train, *config.validation) for path in source_files(source)]
        refuse_repeated(files, "Validate on files that are not used for training.")
    stores = [
        _ready(group[0], config, tokenizer) if _is_ready(group[0]) else _prepared(group, config, tokenizer, progress)
        for group in groups
    ]
    return [Store.open(store.folder / VALIDATION) for store in stores] if held_out else stores


def store_names(config: DataConfig, split: Split) -> list[str]:
    """The name of each store of a split: that of its source, or its number, from 1."""
    groups = _groups(config, _sources(config, split))
    return [group[0].name or str(number) for number, group in enumerate(groups, 1)]


def _sources(config: DataConfig, split: Split) -> tuple[Source, ...]:
    held_out = bool(config.validation_fraction)
    return config.train if split == "train" or held_out else config.validation


def data_cache(config: DataConfig) -> Path:
    """Returns the cache of prepared stores: that of the recipe, or the default one."""
    return default_cache() if config.cache is None else Path(config.cache)


def default_cache() -> Path:
    """Returns the cache of prepared stores for recipes that set none."""
    return cache_folder() / "data"


def _groups(config: DataConfig, sources: Sequence[Source]) -> list[tuple[Source, ...]]:
    """The sources of each store."""
    if is_mixed(config) and sources is config.train:
        return [(source,) for source in sources]
    alone = [source for source in sources if _has_own_store(source)]
    together = tuple(source for source in sources if not _has_own_store(source))
    return [*([together] if together else []), *((source,) for source in alone)]


def _has_own_store(source: Source) -> bool:
    return source.name is not None or _is_ready(source)


def is_mixed(config: DataConfig) -> bool:
    """Whether the sources have weights, so that each has its own store."""
    return bool(config.stages) or any(source.weight is not None for source in config.train)


def _is_ready(source: Source) -> bool:
    """Whether a source is one store, which needs no preparation."""
    return source.kind == "tokens" and len(source.files) == 1 and is_store(source.files[0])


def _ready(source: Source, config: DataConfig, tokenizer: Tokenizer) -> Store:
    store = Store.open(source.files[0])
    store.check_tokenizer(tokenizer.fingerprint, tokenizer.files[0])
    if source in config.train and config.validation_fraction:
        options = (store.manifest.get("prepared") or {"options": {}})["options"]
        if not is_store(store.folder / VALIDATION) or options.get("validation_fraction") != config.validation_fraction:
            raise UserError(
                f"{store.folder} was not prepared with validation_fraction = {config.validation_fraction}",
                "Prepare it with this fraction, or set validation to a source of its own.",
            )
    return store


def _prepared(
    group: tuple[Source, ...], config: DataConfig, tokenizer: Tokenizer, progress: StageProgress | None
) -> Store:
    fraction = config.validation_fraction if group[0] in config.train else 0.0
    about = {"validation_fraction": fraction, "seed": config.seed, "sequence_length": config.sequence_length}
    root = data_cache(config)
    # The name of the folder depends on everything that determines its content, so an entry of the cache is never stale.
    folder = root / Task(group, tokenizer, **about).content_key(progress)[:32]
    if not is_store(folder):
        make_writable(root, OR_DATA_CACHE)
    # With one worker, this process tokenizes, and its tokenizer may use all cores.
    workers = config.prepare_workers if config.prepare_workers > 1 else 0
    store = prepare(group, tokenizer, folder, **about, workers=workers, progress=progress)
    mark_used(store, config)
    return store


def mark_used(store: Store, config: DataConfig) -> None:
    """Sets the last use of a store in the cache, by which `camelid data cache --prune` selects, to the present time."""
    folder = store.folder.parent if store.folder.name == VALIDATION else store.folder
    if folder.parent.resolve() == data_cache(config).resolve():
        with contextlib.suppress(OSError):
            os.utime(folder)
