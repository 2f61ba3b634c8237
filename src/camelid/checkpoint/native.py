"""Training state on disk, through Orbax: asynchronous, atomic, restored onto any mesh."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from camelid.errors import UserError


class RunCheckpoints:
    """The checkpoints of one run, by step; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True, create=True)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Copies the state and writes it in the background; every process calls this at the same step."""
        if step != self.latest():
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

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def _describe(tree: Any) -> dict[str, tuple]:
    """Shape and dtype of each leaf by path, however the tree's nodes are made."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (tuple(leaf.shape), str(leaf.dtype))
        for path, leaf in leaves
    }
