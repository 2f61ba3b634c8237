"""Training state on disk, through Orbax: asynchronous, atomic, restored onto any mesh."""

import contextlib
import functools
import json
import math
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from camelid.checkpoint.folder import in_units
from camelid.checkpoint.integrity import checksum, count_not_finite, described, path_name, survey
from camelid.checkpoint.layout import aligned, cuts
from camelid.checkpoint.tensors import Index, Tensor, cast
from camelid.errors import UserError
from camelid.parallel.hosts import any_true, is_main, wait_for_all

ZARR = "/.zarray"  # after the name of each array, what describes it
CHUNK = 32 * 2**20  # bytes of an array that lie together on disk, and are read together
METADATA, CHECKSUMS = "_CHECKPOINT_METADATA", "checksums"  # Orbax's file about a step, and our entry in it
MORE_SPACE = "Free some space; the same command goes on from the checkpoint before."


class RunCheckpoints:
    """The checkpoints of one run, by step; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, create=True)
        handler = ocp.StandardCheckpointHandler()  # without it, item_metadata of an earlier process's steps is empty
        self._folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handler)

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Copies the state and writes it in the background; every process calls this at the same step.

        Raises UserError where the disk is full, or a number of the state is infinite or NaN; the checkpoints before
        stay.
        """
        if step == self.latest():
            return
        checksums, not_finite = survey(state)
        if not_finite:
            raise UserError(
                f"the state after step {step} has infinite or NaN values in {described(not_finite)}; it is not saved",
                self.way_on(),
            )
        with _full_disk_told(self._folder):
            self._manager.wait_until_finished()  # what it writes is not yet missing from the free space
            need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            if (free := shutil.disk_usage(self._folder).free) < need:
                raise UserError(
                    f"{self._folder} has {in_units(free)} free, and a checkpoint of {in_units(need)} is due",
                    MORE_SPACE,
                )
            args = ocp.args.StandardSave(state, jax.tree.map_with_path(_cut, state))
            self._manager.save(step, args=args, custom_metadata={CHECKSUMS: checksums})

    def way_on(self) -> str:
        """What to do where training ended with infinite or NaN values, for messages."""
        self.wait()
        if (step := self.latest()) is None:
            return "There is no checkpoint yet. Start again with a lower learning rate, or with other data."
        return (
            f"The last checkpoint, of step {step}, is kept. The same command would end here again: start another run "
            f"from it with init = {str(self._folder / str(step))!r}, init_optimizer = true, and a lower learning rate "
            "or another data.seed."
        )

    def restore(self, step: int, target: Any) -> Any:
        """The state of a step, on the devices of `target`; every process calls this.

        Raises UserError where the step is damaged, or of other shapes or dtypes.
        """
        place = self._folder.absolute() / str(step)
        arrays, state, problem = {}, None, None
        try:
            arrays = _open_arrays(place)
            _check_same(step, arrays, target)
            state = jax.tree.map_with_path(lambda path, leaf: arrays[path_name(path)].on_devices(leaf), target)
        except Damage as error:
            problem = str(error)
        if any_true(problem is not None):
            raise damaged(place, problem or "another process cannot read its part", resuming=True)
        checksums, not_finite = survey(state)
        if odd := [name for name, array in arrays.items() if array.checksum not in (None, checksums[name])]:
            raise damaged(place, f"{odd[0]} {CHANGED}", resuming=True)
        if not_finite:
            raise damaged(place, f"infinite or NaN values in {described(not_finite)}", resuming=True)
        return state

    def reload(self) -> None:
        """Looks again at which steps there are; every process calls this after one of them has moved some."""
        wait_for_all("checkpoints are moved")
        self._manager.reload()

    def wait(self) -> None:
        """Returns when everything is on disk; raises UserError where the disk is full."""
        with _full_disk_told(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Ends the writing; call `wait` before where it matters."""
        self._manager.close()


# Reading without a run --------------------------------------------------------------------


CHANGED = "is not what was saved: its checksum differs"


class Damage(ValueError):
    """What is wrong with a checkpoint."""


@dataclass(frozen=True)
class Stored(Tensor):
    """An array of a checkpoint, in its folder."""

    store: ts.TensorStore
    checksum: int | None
    """of what was saved, as `integrity.checksum` computes it; None for checkpoints of an older camelid"""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def read_into(self, out: np.ndarray, index: Index) -> None:
        """Fills `out`, contiguous and of the shape that `index` cuts, casting to its dtype.

        The first call verifies the checksum of the whole array. Raises UserError where it is damaged.
        """
        held = out if out.dtype == self.dtype else np.empty(out.shape, self.dtype)
        try:
            with self.lock:
                _ = self.not_finite
            self._read(held, index)
        except Damage as error:
            raise damaged(self.file, str(error)) from error
        if held is not out:
            cast(self, held, out)

    @functools.cached_property
    def not_finite(self) -> int:
        """How many values are infinite or NaN; reads everything, and raises Damage where the checksum differs."""
        total = count = 0
        for index in cuts(self.shape) if self.shape else [()]:
            values = np.empty([s.stop - s.start for s in index], self.dtype)
            self._read(values, index)
            total, count = (total + checksum(values)) % 2**32, count + count_not_finite(values)
        if self.checksum not in (None, total):
            raise Damage(f"{self.name} {CHANGED}")
        return count

    def on_devices(self, target: jax.ShapeDtypeStruct) -> jax.Array:
        """The array where `target` lives, each device's part read for it, not verified."""
        held: dict[tuple, np.ndarray] = {}

        def read(index: Index | None) -> np.ndarray:
            assert index is not None
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True))
            if bounds not in held:
                held[bounds] = aligned([stop - start for start, stop in bounds], self.dtype)
                self._read(held[bounds], tuple(slice(*pair) for pair in bounds))
            return held[bounds]

        return jax.make_array_from_callback(self.shape, target.sharding, read)

    def _read(self, out: np.ndarray, index: Index) -> None:
        """Fills `out`, of our dtype; raises Damage."""
        try:
            ts.array(out).write(self.store[index].translate_to[(0,) * len(index)]).result()
        except (OSError, ValueError) as error:
            raise Damage(f"{self.name} cannot be read: {_first_line(error)}") from error


def damaged(place: Path, problem: str, resuming: bool = False) -> UserError:
    """The error for a step that is damaged, which says which other steps of the run are whole.

    Reads all of these, which takes a while.
    """
    others = [step for step in steps_in(place.parent) if step != int(place.name)] if is_main() else []
    whole = sorted((step for step in others if find_damage(place.parent / str(step)) is None), reverse=True)
    if not whole:
        advice = "No other step of this run is whole: copy the folder again, or begin another run."
    elif resuming:
        advice = (
            f"{_listed(whole)} whole. To go on from step {whole[0]}, add --from-step {whole[0]} (in Python, "
            "from_step); later steps are moved aside, not deleted."
        )
    else:
        advice = f"{_listed(whole)} whole. To open step {whole[0]}, give {place.parent / str(whole[0])}."
    return UserError(f"the checkpoint of step {place.name} in {place.parent} is damaged: {problem}", advice)


def _listed(steps: list[int]) -> str:
    return f"Step {steps[0]} is" if len(steps) == 1 else f"Steps {', '.join(map(str, steps))} are"


def find_damage(place: Path) -> str | None:
    """What is wrong with the checkpoint of a step, of which everything is read; None where it is whole and finite."""
    try:
        counts = {name: array.not_finite for name, array in _open_arrays(place).items()}
    except Damage as error:
        return str(error)
    odd = {name: count for name, count in counts.items() if count}
    return f"infinite or NaN values in {described(odd)}" if odd else None


def steps_in(folder: Path) -> list[int]:
    """The steps of a run's complete checkpoints, damaged ones among them."""
    return [int(place.name) for place in folder.iterdir() if place.name.isdigit()]


def newest(folder: Path) -> int | None:
    """The step of the newest complete checkpoint among those of a run."""
    return max(ocp.utils.checkpoint_steps(folder.absolute()), default=None)


def open_step(folder: Path, step: int) -> Mapping[str, Tensor]:
    """The arrays of a step by path, say `params.layers.attn.q_proj`; raises UserError where they are not whole."""
    place = folder.absolute() / str(step)
    try:
        return _open_arrays(place)
    except Damage as error:
        raise damaged(place, str(error)) from error


def _open_arrays(place: Path) -> dict[str, Stored]:
    """The arrays of a step; raises Damage where some are missing."""
    try:
        checksums = _saved_checksums(place)
        stores = _stores(place / "default", 0)
        # Slices of a layer may cross all of its chunks, which are kept until the next: each is read once.
        layers = [x.dtype.numpy_dtype.itemsize * math.prod(x.shape[1:]) for name, x in stores.items() if _stacked(name)]
        stores = _stores(place / "default", 2 * max([CHUNK, *layers]))
    except (OSError, ValueError) as error:
        raise Damage(_first_line(error)) from error
    if missing := checksums.keys() - stores.keys():
        raise Damage(f"{min(missing)} is missing")
    return {
        name: Stored(place, name, 0, x.shape, np.dtype(x.dtype.numpy_dtype), x, checksums.get(name))
        for name, x in stores.items()
    }


def _saved_checksums(place: Path) -> dict[str, int]:
    """By path: the checksums of the arrays of a step; empty for checkpoints of an older camelid. Raises Damage."""
    try:
        return json.loads((place / METADATA).read_bytes())["custom_metadata"].get(CHECKSUMS, {})
    except OSError as error:
        raise Damage(f"{METADATA} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damage(f"{METADATA} is not what Orbax wrote: {_first_line(error)}") from error


def _check_same(step: int, arrays: Mapping[str, Stored], target: Any) -> None:
    """Raises UserError where a checkpoint is not one of the state that is asked for."""
    theirs = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
    ours = _describe(target)
    if odd := sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)):
        raise UserError(
            f"the checkpoint of step {step} has {odd[0]} as {theirs.get(odd[0])}, not as {ours.get(odd[0])}",
            "Resume with the recipe that the run began with.",
        )


def _stores(folder: Path, cache_bytes: int) -> dict[str, ts.TensorStore]:
    """Every array that Orbax laid in a folder, by its name there."""
    files = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}
    keys = [key.decode() for key in ts.KvStore.open(files).result().list().result()]
    names = [key.removesuffix(ZARR) for key in keys if key.endswith(ZARR)]
    if not names:
        raise ValueError("it holds no arrays")
    # A piece that was lost is an error, and not zeros.
    spec = {"driver": "zarr", "open": True, "fill_missing_data_reads": False}
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    opening = {name: ts.open(spec | {"kvstore": files | {"path": f"{name}/"}}, context=context) for name in names}
    return {name: future.result() for name, future in opening.items()}


def _cut(path: Any, leaf: Any) -> ocp.SaveArgs:
    """How an array is cut on disk: each layer apart, as checkpoints are read."""
    stacked = _stacked(path_name(path))
    return ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=(0,) if stacked else ())


def _stacked(name: str) -> bool:
    return "layers" in name.split(".")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def _full_disk_told(folder: Path) -> Iterator[None]:
    """The many errors in which a full disk comes out of Orbax, as one."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if "No space left" not in str(error):
            raise
        raise UserError(f"the disk of {folder} is full", MORE_SPACE) from error


def _describe(tree: Any) -> dict[str, tuple]:
    """Shape and dtype of each leaf by path, however the tree's nodes are made."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}
