"""Training state on disk, through Orbax: asynchronous, atomic, restored onto any mesh."""

import contextlib
import math
import os
import re
import shutil
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from camelid.checkpoint.folder import in_units
from camelid.checkpoint.tensors import Tensor, cast
from camelid.errors import UserError
from camelid.parallel.hosts import any_true, is_main

ITEM = "default"  # the folder, in that of a step, in which Orbax keeps the state
PLAIN = re.compile(r"(/[A-Za-z0-9_.+=,@-]+(?<!\.__lock))+")
"""paths that need no replacement by `Address`"""
DESCRIPTORS = Path("/proc/self/fd")
ZARR = "/.zarray"  # after the name of each array, what describes it
CHUNK = 32 * 2**20  # bytes of an array that lie together on disk, and are read together
DAMAGED = "Open the step before, or copy the folder again."
MORE_SPACE = "Free some space; the same command goes on from the checkpoint before."


class RunCheckpoints:
    """The checkpoints of one run, by step. The newest `keep` are kept, and older ones are removed.

    A checkpoint counts as saved only after the files have been opened again and every array was found in them. This
    happens in the next call of `save` or `wait`; until then no older checkpoint is removed.
    """

    def __init__(self, folder: Path, keep: int):
        self._folder, self._keep = folder.resolve(), keep
        self._opened: ocp.CheckpointManager | None = None
        self._written: tuple[int, Outline] | None = None

    @property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's own manager, which makes the folder when it is first needed."""
        if self._opened is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._address = Address(self._folder)
            # Orbax would remove old checkpoints before the new one is verified: it removes none, `_settle` does.
            options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True, create=True)
            handler = ocp.StandardCheckpointHandler()  # without it, item_metadata of earlier processes' steps is empty
            self._opened = ocp.CheckpointManager(self._address.path, options=options, item_handlers=handler)
        return self._opened

    def latest(self) -> int | None:
        """The step of the newest checkpoint, be it complete or still being written."""
        return newest(self._folder) if self._written is None else self._written[0]

    def save(self, step: int, state: Any) -> None:
        """Copies the state and writes it in the background; every process calls this at the same step.

        Raises UserError if the disk is full, or if the checkpoint before was not written completely; the checkpoints
        before that one are kept.
        """
        if step == self.latest():
            return
        with _full_disk_told(self._folder):
            self._settle()  # also, what is still being written is not yet missing from the free space
            manager = self._manager
            need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            if (free := shutil.disk_usage(self._folder).free) < need:
                raise UserError(
                    f"{self._folder} has {in_units(free)} free, and a checkpoint of {in_units(need)} is due",
                    MORE_SPACE,
                )
            manager.save(step, args=ocp.args.StandardSave(state, jax.tree.map_with_path(_cut, state)))
            self._written = step, _describe(state)

    def _settle(self) -> None:
        """Waits for the checkpoint that is being written, verifies it, and removes those that are too old."""
        if self._written is None:
            return
        self._manager.wait_until_finished()
        step, outline = self._written
        damage = find_damage(self._folder, step, outline) if is_main() else None
        if any_true(damage is not None):
            others = [str(other) for other in self._manager.all_steps() if other != step]
            kept = f"it goes on from step {others[-1]}" if others else "it begins anew"
            raise UserError(
                f"the checkpoint of step {step} in {self._folder} was not written completely"
                + (f": {damage}" if damage else ""),
                f"Check the disk, remove {self._folder / str(step)}, and start the same command again: {kept}.",
            )
        self._written = None
        for old in sorted(self._manager.all_steps())[: -self._keep]:
            if (self._folder / str(old) / ITEM).is_dir():  # otherwise it is not a checkpoint
                self._manager.delete(old)

    def restore(self, step: int, target: Any) -> Any:
        """The state of a step, on the devices of `target`; raises UserError where shapes or dtypes differ from it."""
        saved = self._manager.item_metadata(step)
        theirs, ours = (_describe(tree) for tree in (saved, target))
        if odd := sorted(path for path in theirs.keys() | ours.keys() if theirs.get(path) != ours.get(path)):
            first = odd[0]
            raise UserError(
                f"the checkpoint of step {step} has {first} as {theirs.get(first)}, not as {ours.get(first)}",
                "Resume with the recipe that the run began with.",
            )
        return self._manager.restore(step, args=ocp.args.StandardRestore(target))

    def wait(self) -> None:
        """Returns when everything is on disk and verified; raises UserError as `save` does."""
        with _full_disk_told(self._folder):
            self._settle()

    def close(self) -> None:
        """Ends the writing; call `wait` before where it matters."""
        if self._opened is not None:
            self._opened.close()


# Reading without a run --------------------------------------------------------------------


@dataclass(frozen=True)
class Stored(Tensor):
    """An array of a checkpoint, in its folder."""

    store: ts.TensorStore
    address: "Address"
    """keeps the path of the store valid"""

    def read_into(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """Fills `out`, contiguous and of the shape that `index` cuts, casting to its dtype."""
        held = out if out.dtype == self.dtype else np.empty(out.shape, self.dtype)
        try:
            ts.array(held).write(self.store[index].translate_to[(0,) * len(index)]).result()
        except (OSError, ValueError) as error:
            raise UserError(f"{self.name} in {self.file} cannot be read: {_first_line(error)}", DAMAGED) from error
        if held is not out:
            cast(self, held, out)


def is_step(name: str) -> bool:
    """Whether a name in the folder of checkpoints is that of a complete one."""
    return name.isascii() and name.isdigit()


def newest(folder: Path) -> int | None:
    """The step of the newest complete checkpoint among those of a run."""
    if not folder.is_dir():
        return None
    return max((int(place.name) for place in folder.iterdir() if is_step(place.name) and place.is_dir()), default=None)


def open_step(folder: Path, step: int) -> dict[str, Tensor]:
    """The arrays of a step by path, say `params.layers.attn.q_proj`; raises UserError where they are not whole."""
    place = folder.resolve() / str(step)
    try:
        address = Address(place / ITEM)
        stores = _open_arrays(address, _keys(address), 0)
        # Slices of a layer may cross all of its chunks, which are kept until the next: each is read once.
        layers = [x.dtype.numpy_dtype.itemsize * math.prod(x.shape[1:]) for name, x in stores.items() if _stacked(name)]
        stores = _open_arrays(address, _keys(address), 2 * max([CHUNK, *layers]))
    except (OSError, ValueError) as error:
        raise UserError(f"{place} is no whole checkpoint: {_first_line(error)}", DAMAGED) from error
    return {
        name: Stored(place, name, 0, x.shape, np.dtype(x.dtype.numpy_dtype), x, address) for name, x in stores.items()
    }


Outline = Mapping[str, tuple[tuple[int, ...], str]]
"""shape and dtype of each array by path"""


def find_damage(folder: Path, step: int, outline: Outline) -> str | None:
    """What is wrong with the checkpoint of a step: an array or a part of one is missing, or not as in `outline`.

    Returns None if everything is there. No values are read, so this takes well under a second for a model of any size.
    """
    try:
        address = Address(folder.resolve() / str(step) / ITEM)
        keys = _keys(address)
        stores = _open_arrays(address, keys, 0)
    except (OSError, ValueError) as error:
        return _first_line(error)
    chunks = Counter(key.rpartition("/")[0] for key in keys if not key.endswith(ZARR))
    for name, (shape, dtype) in outline.items():
        if (store := stores.get(name)) is None:
            return f"{name} is missing"
        if (found := (store.shape, store.dtype.numpy_dtype.name)) != (shape, dtype):
            return f"{name} is {found[1]} {found[0]}, not {dtype} {shape}"
        chunk_shape = store.chunk_layout.write_chunk.shape or ()  # None for a scalar
        count = math.prod(-(-n // (length or 1)) for n, length in zip(shape, chunk_shape, strict=True))
        if chunks[name] != count:
            return f"{name} has {chunks[name]} of its {count} chunks"
    return None


class Address:
    """An absolute path of a folder that Orbax and TensorStore can take, whatever the folder's name.

    They pass paths to glob and through JSON, and give names such as `[...]`, `..`, `gs:` and `x.__lock` a meaning of
    their own. A path with anything but plain characters is therefore replaced by that of an open descriptor of the
    folder, which is valid in this process for as long as the object exists, and which no other process can disturb.
    """

    def __init__(self, folder: Path):
        self.path = str(folder)
        if PLAIN.fullmatch(self.path):
            return
        if not DESCRIPTORS.is_dir():
            raise UserError(
                f"{folder} has characters in its path that Orbax cannot handle on this system",
                "Use names of letters, digits, and the characters _ . + = , @ -",
            )
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        weakref.finalize(self, os.close, descriptor)
        self.path = str(DESCRIPTORS / str(descriptor))


def _keys(address: Address) -> list[str]:
    """The keys of all arrays and of their chunks in a folder that Orbax wrote."""
    return [key.decode() for key in ts.KvStore.open(_files(address)).result().list().result()]


def _files(address: Address) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{address.path}/"}}


def _open_arrays(address: Address, keys: list[str], cache_bytes: int) -> dict[str, ts.TensorStore]:
    """Every array that Orbax wrote into a folder, by its name there."""
    names = [key.removesuffix(ZARR) for key in keys if key.endswith(ZARR)]
    if not names:
        raise ValueError("it holds no arrays")
    # A piece that was lost is an error, and not zeros.
    spec = {"driver": "zarr", "open": True, "fill_missing_data_reads": False}
    context = ts.Context({"cache_pool": {"total_bytes_limit": cache_bytes}})
    files = _files(address)
    opening = {name: ts.open(spec | {"kvstore": files | {"path": f"{name}/"}}, context=context) for name in names}
    return {name: future.result() for name, future in opening.items()}


def _cut(path: Any, leaf: Any) -> ocp.SaveArgs:
    """How an array is cut on disk: each layer apart, as checkpoints are read."""
    stacked = _stacked(jax.tree_util.keystr(path, simple=True, separator="."))
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


def _describe(tree: Any) -> Outline:
    """Shape and dtype of each leaf by path, however the tree's nodes are made."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in leaves
    }
