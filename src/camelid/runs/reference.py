"""What the reference of a preference loss predicts: computed once, before the first step, and kept in the run's folder.

The reference is the model that a run starts from. Only its log-probability of each answer is needed, so no second model
is in memory while the run trains, and a run that is resumed does not need `init`.
"""

import contextlib
import dataclasses
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from camelid.checkpoint.integrity import checksum_arrays
from camelid.data.rows.loader import Loader
from camelid.disk.atomic import sync, write_atomically
from camelid.errors import UserError
from camelid.model.context import Context
from camelid.model.decoder import Decoder
from camelid.parallel.batch_sharding import BatchSharding
from camelid.parallel.hosts import broadcast_from_main, is_main, to_host
from camelid.runs.components import Components
from camelid.runs.start import Start
from camelid.train.loggers import Terminal
from camelid.train.objective import Arrays
from camelid.train.preference import DPOLoss
from camelid.train.trainable import combine

REFERENCE = "reference.npz"
"""name of the file: an array `SPLIT.N` for store N of each split, and ABOUT"""
ABOUT = "about"
"""its entry that holds as JSON what the arrays depend on"""

Values = dict[str, Sequence[Float32[np.ndarray, " documents"]]]
"""for each split, of each of its stores: the log-probability of every document; NaN for those that are in no row"""


def with_reference(components: Components, start: Start, folder: Path, mesh: Mesh, terminal: Terminal) -> Components:
    """The components with loaders whose rows have the log-probabilities of the reference; every process calls this.

    They are read from the folder of the run. A run that has no checkpoint computes them if they are missing or of other
    parameters or data. Raises UserError if those of a run that has one are missing, and for values that are not finite.
    """
    loaders = _loaders(components)
    if start.resumed is not None:
        check_reference(components, folder)
        values = _read(folder / REFERENCE, loaders)
    else:
        params = combine(start.state.trainable, start.frozen)
        about = {**_about(components, loaders), "init": checksum_arrays(params)[0]}
        if broadcast_from_main(lambda: _is_kept(folder / REFERENCE, about)):
            values = _read(folder / REFERENCE, loaders)
        else:
            values = _computed(components, loaders, params, mesh, terminal)
            if is_main():
                _write(folder / REFERENCE, values, about)
    loaders = {split: loader.with_reference(values[split]) for split, loader in loaders.items()}
    return dataclasses.replace(components, loader=loaders["train"], validation=loaders.get("validation"))


def check_reference(components: Components, folder: Path) -> None:
    """Raises UserError if the folder of a run that has a checkpoint lacks them; every process calls this."""
    about = _about(components, _loaders(components))
    if not broadcast_from_main(lambda: _is_kept(folder / REFERENCE, about)):
        raise UserError(
            f"{folder / REFERENCE} is missing or damaged: it holds what the model that the run started from predicts",
            "Restore it from a copy of the folder, or train from init again with another --run.",
        )


def _loaders(components: Components) -> dict[str, Loader]:
    loaders = {"train": components.loader}
    return loaders if components.validation is None else loaders | {"validation": components.validation}


def _about(components: Components, loaders: dict[str, Loader]) -> dict[str, Any]:
    """What the log-probabilities depend on, apart from the parameters."""
    data = components.recipe.data
    return {
        "data": {split: [store.fingerprint for store in loader.stores] for split, loader in loaders.items()},
        "rows": {"sequence_length": data.sequence_length, "overlong": data.overlong},
        "dtype": components.recipe.compute.dtype,
    }


# Computing -----------------------------------------------------------------------------------------------


def _computed(
    components: Components, loaders: dict[str, Loader], params: Decoder, mesh: Mesh, terminal: Terminal
) -> Values:
    recipe, objective = components.recipe, components.step.objective
    assert isinstance(objective, DPOLoss)
    sharding = BatchSharding(recipe.data.batch_size // recipe.train.accumulate, mesh)
    total = sum(loader.num_rows for loader in loaders.values())
    values, done = {}, 0
    with terminal.progress("reference", total) if is_main() else contextlib.nullcontext(lambda rows: None) as show:
        for split, loader in loaders.items():

            def shown(rows: int, before: int = done) -> None:
                show(before + rows)

            values[split] = _of_loader(objective, loader, params, sharding, shown)
            done += loader.num_rows
    return values


def _of_loader(
    objective: DPOLoss, loader: Loader, params: Decoder, sharding: BatchSharding, show: Callable[[int], None]
) -> list[np.ndarray]:
    """For each packing of a loader, the log-probability of every document."""
    found, done = [], 0
    for batch in loader.in_order(sharding.rows):
        log_probs = to_host(_log_probs(params, sharding.place(vars(batch)), objective)).reshape(sharding.rows, -1)
        answers = batch.segments.max(1)
        found.append(log_probs[np.arange(log_probs.shape[1]) < answers[:, None]])
        done += sharding.rows
        show(min(done, loader.num_rows))
    of_fragments = np.concatenate(found)
    if wrong := int(np.count_nonzero(~np.isfinite(of_fragments))):
        raise UserError(
            f"the log-probabilities that the reference gives to {wrong:,} of {len(of_fragments):,} answers are not "
            "finite",
            "Use compute.dtype = 'float32', or another init.",
        )
    values, first = [], 0
    for packing in loader.packings:
        assert packing.plan is not None, "pairs are planned"
        starts = packing.plan.starts
        of_documents = np.full(packing.store.num_documents, np.nan, np.float32)
        of_documents[packing.documents(starts)] = of_fragments[first : first + len(starts)]
        values.append(of_documents)
        first += len(starts)
    return values


@partial(jax.jit, static_argnames="objective")
def _log_probs(params: Decoder, batch: Arrays, objective: DPOLoss) -> jax.Array:
    return objective.answer_log_probs(params, batch, Context("scoring"))


# The file -----------------------------------------------------------------------------------------------


def _is_kept(path: Path, about: dict[str, Any]) -> bool:
    """Whether the file can be read, and was written for what `about` holds."""
    try:
        # NumPy leaves a damaged file open.
        with path.open("rb") as file, np.load(file) as arrays:
            found = {name: arrays[name] for name in arrays.files}  # verifies the checksum of each
            kept = json.loads(found[ABOUT].item())
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return False
    return all(kept.get(name) == value for name, value in about.items())


def _read(path: Path, loaders: dict[str, Loader]) -> Values:
    with np.load(path) as arrays:
        return {
            split: [arrays[f"{split}.{number}"] for number in range(len(loader.packings))]
            for split, loader in loaders.items()
        }


def _write(path: Path, values: Values, about: dict[str, Any]) -> None:
    arrays: dict[str, Any] = {ABOUT: np.array(json.dumps(about))}
    for split, each in values.items():
        arrays |= {f"{split}.{number}": array for number, array in enumerate(each)}
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_atomically(path, file.getvalue())
    sync(path)
