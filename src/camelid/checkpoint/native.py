"""Training state on disk, through Orbax: asynchronous, atomic, restored onto any mesh."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from camelid.errors import UserError

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
                    f"{self._folder} has {free / 1e9:.1f} GB free, and a checkpoint of {need / 1e9:.1f} GB is due",
                    MORE_SPACE,
                )
            self._manager.save(step, args=ocp.args.StandardSave(state))

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
