"""Training state on disk, through Orbax: asynchronous, atomic, restored onto any mesh."""

import contextlib
import math
import shutil
from collections.abc import Iterator
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

ZARR = "/.zarray"  # after the name of each array, what describes it
CHUNK = 32 * 2**20  # bytes of an array that lie together on disk, and are read together
DAMAGED = "Open the step before, or copy the folder again."
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

        Raises UserError where the disk is full; the checkpoints before stay.
        """
        if step == self.latest():
            return
        with _full_disk_told(self._folder):
            self._manager.wait_until_finished()  # what it writes is not yet missing from the free space
            need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            if (free := shutil.disk_usage(self._folder).free) < need:
                raise UserError(
                    f"{self._folder} has {in_units(free)} free, and a checkpoint of {in_units(need)} is due",
                    MORE_SPACE,
                )
            self._manager.save(step, args=ocp.args.StandardSave(state, jax.tree.map_with_path(_cut, state)))

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
        """Returns when everything is on disk; raises UserError where the disk is full."""
        with _full_disk_told(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Ends the writing; call `wait` before where it matters."""
        self._manager.close()


# Reading without a run --------------------------------------------------------------------


@dataclass(frozen=True)
class Stored(Tensor):
    """An array of a checkpoint, in its folder."""

    store: ts.TensorStore

    def read_into(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """Fills `out`, contiguous and of the shape that `index` cuts, casting to its dtype."""
        held = out if out.dtype == self.dtype else np.empty(out.shape, self.dtype)
        try:
            ts.array(held).write(self.store[index].translate_to[(0,) * len(index)]).result()
        except (OSError, ValueError) as error:
            raise UserError(f"{self.name} in {self.file} cannot be read: {_first_line(error)}", DAMAGED) from error
        if held is not out:
            cast(self, held, out)


def newest(folder: Path) -> int | None:
    """The step of the newest complete checkpoint among those of a run."""
    return max(ocp.utils.checkpoint_steps(folder.absolute()), default=None)


def open_step(folder: Path, step: int) -> dict[str, Tensor]:
    """The arrays of a step by path, say `params.layers.attn.q_proj`; raises UserError where they are not whole."""
    place = folder.absolute() / str(step)
    try:
        stores = _stores(place / "default", 0)
        # Slices of a layer may cross all of its chunks, which are kept until the next: each is read once.
        layers = [x.dtype.numpy_dtype.itemsize * math.prod(x.shape[1:]) for name, x in stores.items() if _stacked(name)]
        stores = _stores(place / "default", 2 * max([CHUNK, *layers]))
    except (OSError, ValueError) as error:
        raise UserError(f"{place} is no whole checkpoint: {_first_line(error)}", DAMAGED) from error
    return {name: Stored(place, name, 0, x.shape, np.dtype(x.dtype.numpy_dtype), x) for name, x in stores.items()}


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


def _describe(tree: Any) -> dict[str, tuple]:
    """Shape and dtype of each leaf by path, however the tree's nodes are made."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in leaves
    }
