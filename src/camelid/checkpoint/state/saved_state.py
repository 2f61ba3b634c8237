"""Reads the checkpoints of a run: the arrays that Orbax wrote, by slices, with their checksums verified.

They are read through TensorStore, because Orbax does not detect a flipped bit, and does not name what is damaged.
"""

import functools
import json
import math
import os
import re
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from camelid.checkpoint import layout
from camelid.checkpoint.integrity import checksum, checksum_arrays, count_not_finite, describe_counts
from camelid.checkpoint.layout import Table, aligned, chunk_indices
from camelid.checkpoint.tensors import Index, Tensor, cast
from camelid.errors import UserError
from camelid.model.pytree import path_name
from camelid.parallel.hosts import any_true

ITEM = "default"  # the folder, in that of a step, in which Orbax keeps the state
METADATA, CHECKSUMS = "_CHECKPOINT_METADATA", "checksums"  # Orbax's file about a step, and our entry in it
PLAIN = re.compile(r"(/[A-Za-z0-9_.+=,@-]+(?<!\.__lock))+")
"""paths that `SafePath` need not replace"""
DESCRIPTORS = Path("/proc/self/fd")
ZARR = "/.zarray"  # after the name of each array, the file that describes it
CHUNK = 32 * 2**20  # bytes of a chunk, the part of an array that is stored and read as one
CHANGED = "differs from what was saved: its checksum does not match"

ArraySpecs = Mapping[str, tuple[tuple[int, ...], str]]
"""the shape and the name of the dtype of each array, by path"""
_T = TypeVar("_T")


class DamagedState(ValueError):
    """A checkpoint is damaged, as the message describes."""


@dataclass(frozen=True)
class SavedArray(Tensor):
    """An array in the folder of a step."""

    store: ts.TensorStore
    address: "SafePath | None" = None
    """keeps the path of `store` valid"""
    checksum: int | None = None
    """that `integrity.checksum` computes of the saved array; None in checkpoints of older versions"""
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    def read_into(self, out: np.ndarray, index: Index) -> None:
        """As Tensor.read_into; the first call verifies the checksum of the entire array.

        Raises UserError if the array is damaged, which names the steps of the run that are intact.
        """
        held = out if out.dtype == self.dtype else np.empty(out.shape, self.dtype)
        try:
            with self.lock:
                _ = self.not_finite
            self._read(held, index)
        except DamagedState as error:
            raise damage_error(self.file, str(error), other_intact_steps(self.file)) from error
        if held is not out:
            cast(self, held, out)

    @functools.cached_property
    def not_finite(self) -> int:
        """The number of infinite or NaN values; raises DamagedState if the checksum of the array does not match."""
        total = count = 0
        for index in chunk_indices(self.shape) if self.shape else [()]:
            values = np.empty([s.stop - s.start for s in index], self.dtype)
            self._read(values, index)
            total, count = (total + checksum(values)) % 2**32, count + count_not_finite(values)
        if self.checksum not in (None, total):
            raise DamagedState(f"{self.name} {CHANGED}")
        return count

    def on_devices(self, target: jax.ShapeDtypeStruct) -> jax.Array:
        """The array in the sharding of `target`, not verified; raises DamagedState if it cannot be read."""
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
        """Reads the slice `index` into `out`, which has the array's dtype; raises DamagedState."""
        try:
            ts.array(out).write(self.store[index].translate_to[(0,) * len(index)]).result()
        except (OSError, ValueError) as error:
            raise DamagedState(f"{self.name} cannot be read: {first_line(error)}") from error


def load(
    table: Table, tensors: Mapping[str, Tensor], targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Reads the parameters of `targets` as `layout.load` does; checksums of a run's arrays are verified on the devices.

    Raises UserError if an array is damaged.
    """
    arrays = {path: tensor for path, tensor in tensors.items() if path in targets and isinstance(tensor, SavedArray)}
    if not arrays or any(array.dtype != targets[path].dtype for path, array in arrays.items()):
        return layout.load(table, tensors, targets)  # `SavedArray.read_into` verifies arrays that are cast
    try:
        return on_devices(arrays, targets)[0]
    except DamagedState as error:
        place = next(iter(arrays.values())).file
        raise damage_error(place, str(error), other_intact_steps(place)) from error


def on_devices(
    arrays: Mapping[str, SavedArray], targets: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[dict[str, jax.Array], dict[str, int]]:
    """The arrays in the shardings of `targets`, and the number of infinite or NaN values of those that have any.

    Each shard is read once for its device, and the devices compute the checksums. Every process that has a shard calls
    this. Raises DamagedState in all of these processes if an array is damaged.
    """

    def read() -> dict[str, jax.Array]:
        return {name: array.on_devices(targets[name]) for name, array in arrays.items()}

    alone = all(target.sharding.is_fully_addressable for target in targets.values())
    loaded = read() if alone else on_all_processes(read)
    checksums, not_finite = checksum_arrays(loaded)
    if odd := [name for name, array in arrays.items() if array.checksum not in (None, checksums[name])]:
        raise DamagedState(f"{odd[0]} {CHANGED}")
    return loaded, not_finite


def on_all_processes(read: Callable[[], _T]) -> _T:
    """Returns what `read` returns; raises DamagedState in every process if it does in one. Every process calls this."""
    result: list[_T] = []
    problem = "another process cannot read its part"
    try:
        result.append(read())
    except DamagedState as error:
        problem = str(error)
    if any_true(not result):
        raise DamagedState(problem)
    return result[0]


# Steps ------------------------------------------------------------------------------------


def is_step(name: str) -> bool:
    """Whether a name in the folder of checkpoints is that of a complete step."""
    return name.isascii() and name.isdigit()


def steps_in(folder: Path) -> list[int]:
    """The steps of a run's complete checkpoints, sorted; they include those that were damaged later."""
    if not folder.is_dir():
        return []
    return sorted(int(place.name) for place in folder.iterdir() if is_step(place.name) and place.is_dir())


def newest(folder: Path) -> int | None:
    """The last step of a run's complete checkpoints; None if there are none."""
    return max(steps_in(folder), default=None)


def open_step(folder: Path, step: int) -> Mapping[str, Tensor]:
    """The arrays of a step by path, such as `params.layers.attn.q_proj`; raises UserError if the step is damaged."""
    place = folder.resolve() / str(step)
    try:
        return open_arrays(place)
    except DamagedState as error:
        raise damage_error(place, str(error), other_intact_steps(place)) from error


def open_arrays(place: Path) -> dict[str, SavedArray]:
    """The arrays of a step by path; raises DamagedState if some are missing."""
    checksums = _saved_checksums(place)
    try:
        address = SafePath(place / ITEM)
        stores = _stores(address, _keys(address), 0)
        # A slice of a layer may need all of its chunks, which stay in the cache, so that each is read once.
        layers = [x.dtype.numpy_dtype.itemsize * math.prod(x.shape[1:]) for name, x in stores.items() if _stacked(name)]
        stores = _stores(address, _keys(address), 2 * max([CHUNK, *layers]))
    except (OSError, ValueError) as error:
        raise DamagedState(first_line(error)) from error
    if missing := checksums.keys() - stores.keys():
        raise DamagedState(f"{min(missing)} is missing")
    return {
        name: SavedArray(place, name, 0, x.shape, np.dtype(x.dtype.numpy_dtype), x, address, checksums.get(name))
        for name, x in stores.items()
    }


def _saved_checksums(place: Path) -> dict[str, int]:
    """The checksums of a step's arrays by path; empty in checkpoints of older versions. Raises DamagedState."""
    try:
        return json.loads((place / METADATA).read_bytes())["custom_metadata"].get(CHECKSUMS, {})
    except OSError as error:
        raise DamagedState(f"{METADATA} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedState(f"{METADATA} is not in Orbax's format: {first_line(error)}") from error


# Damage -----------------------------------------------------------------------------------


def other_intact_steps(place: Path) -> list[int]:
    """The other steps of a run that are intact, the last first. Reads all of them, which may take minutes."""
    others = [step for step in reversed(steps_in(place.parent)) if step != int(place.name)]
    return [step for step in others if verify_step(place.parent / str(step)) is None]


def damage_error(place: Path, problem: str, intact: list[int], resuming: bool = False) -> UserError:
    """The error for a damaged step, if the steps `intact` of the same run are not damaged."""
    if not intact:
        advice = "No other step of this run is intact: copy the folder again, or start another run."
    elif resuming:
        advice = (
            f"{_listed(intact)} intact. To resume from step {intact[0]}, add --from-step {intact[0]} (in Python, "
            "from_step); later steps are moved aside, not deleted."
        )
    else:
        advice = f"{_listed(intact)} intact. To open step {intact[0]}, give {place.parent / str(intact[0])}."
    return UserError(f"the checkpoint of step {place.name} in {place.parent} is damaged: {problem}", advice)


def _listed(steps: list[int]) -> str:
    return f"Step {steps[0]} is" if len(steps) == 1 else f"Steps {', '.join(map(str, steps))} are"


def verify_step(place: Path) -> str | None:
    """Reads all arrays of a step; returns what is wrong with them, or None if they are intact and finite."""
    try:
        counts = {name: array.not_finite for name, array in open_arrays(place).items()}
    except DamagedState as error:
        return str(error)
    odd = {name: count for name, count in counts.items() if count}
    return f"infinite or NaN values in {describe_counts(odd)}" if odd else None


def check_step(place: Path) -> None:
    """Reads all arrays of a step, including the optimizer state; raises UserError if one is damaged."""
    if (problem := verify_step(place)) is not None:
        raise damage_error(place, problem, other_intact_steps(place))


def find_damage(folder: Path, step: int, expected: ArraySpecs) -> str | None:
    """Checks that a step has all chunks of the arrays in `expected`; returns what is wrong, or None.

    No values are read, so this takes well under a second for a model of any size.
    """
    try:
        address = SafePath(folder.resolve() / str(step) / ITEM)
        keys = _keys(address)
        stores = _stores(address, keys, 0)
    except (OSError, ValueError) as error:
        return first_line(error)
    chunks = Counter(key.rpartition("/")[0] for key in keys if not key.endswith(ZARR))
    for name, (shape, dtype) in expected.items():
        if (store := stores.get(name)) is None:
            return f"{name} is missing"
        if (found := (store.shape, store.dtype.numpy_dtype.name)) != (shape, dtype):
            return f"{name} is {found[1]} {found[0]}, not {dtype} {shape}"
        chunk_shape = store.chunk_layout.write_chunk.shape or ()  # None for a scalar
        count = math.prod(-(-n // (length or 1)) for n, length in zip(shape, chunk_shape, strict=True))
        if chunks[name] != count:
            return f"{name} has {chunks[name]} of its {count} chunks"
    return None


# How Orbax writes -------------------------------------------------------------------------


class SafePath:
    """An absolute path of a folder that Orbax and TensorStore accept, whatever the folder's name.

    They pass paths to glob and through JSON, and interpret names such as `[...]`, `..`, `gs:` and `x.__lock`. A path
    with other than plain characters is therefore replaced by that of an open descriptor of the folder, which is valid
    in this process as long as the object exists, and which other processes cannot affect.
    """

    def __init__(self, folder: Path):
        self.path = str(folder)
        if PLAIN.fullmatch(self.path):
            return
        if not DESCRIPTORS.is_dir():
            raise UserError(
                f"{folder} has characters in its path that Orbax does not support on this system",
                "Use names of letters, digits, and the characters _ . + = , @ -",
            )
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        weakref.finalize(self, os.close, descriptor)
        self.path = str(DESCRIPTORS / str(descriptor))


def _keys(address: SafePath) -> list[str]:
    """The keys of all arrays and chunks in a folder that Orbax wrote."""
    return [key.decode() for key in ts.KvStore.open(_files(address)).result().list().result()]


def _files(address: SafePath) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{address.path}/"}}


def _stores(address: SafePath, keys: list[str], cache_bytes: int) -> dict[str, ts.TensorStore]:
    """Opens every array that Orbax wrote into a folder, by name."""
    names = [key.removesuffix(ZARR) for key in keys if key.endswith(ZARR)]
    if not names:
        raise ValueError("it holds no arrays")
    # A missing chunk is an error, instead of zeros.
    spec = {"driver": "zarr", "open": True, "fill_missing_data_reads": False}
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    files = _files(address)
    opening = {name: ts.open(spec | {"kvstore": files | {"path": f"{name}/"}}, context=context) for name in names}
    return {name: future.result() for name, future in opening.items()}


def save_args(path: Any, leaf: Any) -> ocp.SaveArgs:
    """How Orbax splits an array into chunks: layers separately, as they are read."""
    stacked = _stacked(path_name(path))
    return ocp.SaveArgs(chunk_byte_size=CHUNK, shard_axes=(0,) if stacked else ())


def _stacked(name: str) -> bool:
    return "layers" in name.split(".")


def first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def array_specs(tree: Any) -> ArraySpecs:
    """The shape and dtype of each leaf of a tree by path, whatever the types of the tree's nodes."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in leaves}
