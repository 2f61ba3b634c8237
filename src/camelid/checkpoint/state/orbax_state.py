"""Saves and restores training state through Orbax: asynchronously, atomically, and onto any mesh."""

import contextlib
import dataclasses
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from camelid.checkpoint.integrity import checksum_arrays, describe_counts
from camelid.checkpoint.state.saved_state import (
    CHECKSUMS,
    ITEM,
    ArraySpecs,
    DamagedState,
    SafePath,
    array_specs,
    damage_error,
    find_damage,
    newest,
    on_all_processes,
    on_devices,
    open_arrays,
    other_intact_steps,
    save_args,
    steps_in,
)
from camelid.disk.space import format_bytes
from camelid.errors import UserError
from camelid.model.pytree import path_name
from camelid.parallel.hosts import broadcast_from_main, is_main, wait_for_all

REMOVED = ".orbax-checkpoint-tmp"  # after the name of a checkpoint that is being removed; Orbax removes what is left
MORE_SPACE = "Free some space; the same command resumes from the previous checkpoint."


class RunCheckpoints:
    """The checkpoints of one run, by step.

    The last `keep` are kept, that of the step `best`, and those of multiples of `milestones_every`; others are removed.

    A checkpoint counts as saved only after its files have been opened again and all arrays were found in them. This
    happens in the next call of `save` or `wait`; until then, no older checkpoint is removed.
    """

    def __init__(self, folder: Path, keep: int, milestones_every: int | None = None, without: Collection[str] = ()):
        """`without` names fields of the state, a dataclass, that are not saved."""
        self._without = without
        self._folder, self._keep, self._milestones_every = folder.resolve(), keep, milestones_every
        self.best: int | None = None
        """a step whose checkpoint is kept, too; one that is being written replaces it when it is complete"""
        self._opened: ocp.CheckpointManager | None = None
        self._written: tuple[int, ArraySpecs] | None = None

    @property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager, which creates the folder on first use."""
        if self._opened is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._address = SafePath(self._folder)
            # Orbax would remove old checkpoints before the new one is verified: it removes none, `_settle` does.
            options = ocp.CheckpointManagerOptions(cleanup_tmp_directories=True, create=True)
            handler = ocp.StandardCheckpointHandler()  # without it, item_metadata of earlier processes' steps is empty
            self._opened = ocp.CheckpointManager(self._address.path, options=options, item_handlers=handler)
        return self._opened

    def latest(self) -> int | None:
        """The last step that was saved or is being written; None if there is none."""
        return newest(self._folder) if self._written is None else self._written[0]

    def save(self, step: int, state: Any) -> None:
        """Copies the state, and writes it in the background; every process calls this at the same step.

        Raises UserError if the disk is full, if a value of the state is infinite or NaN, or if the previous checkpoint
        was not written completely; earlier checkpoints are kept.
        """
        if step == broadcast_from_main(self.latest):
            return
        if self._without:
            state = dataclasses.replace(state, **dict.fromkeys(self._without))
        checksums, not_finite = checksum_arrays(state)
        if not_finite:
            raise UserError(
                f"the state after step {step} has infinite or NaN values in {describe_counts(not_finite)}; "
                "it is not saved",
                self.recovery_advice(),
            )
        with _full_disk_as_user_error(self._folder):
            self._settle()  # also because a checkpoint that is being written has not taken its space yet
            manager = self._manager
            need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            if (free := broadcast_from_main(lambda: shutil.disk_usage(self._folder).free)) < need:
                raise UserError(
                    f"{self._folder} has {format_bytes(free)} free, and a checkpoint of {format_bytes(need)} is due",
                    MORE_SPACE,
                )
            args = ocp.args.StandardSave(state, jax.tree.map_with_path(save_args, state))
            manager.save(step, args=args, custom_metadata={CHECKSUMS: checksums})
            self._written = step, array_specs(state)

    def _settle(self) -> None:
        """Waits for the checkpoint that is being written, verifies it, and removes old ones."""
        if self._written is None:
            return
        self._manager.wait_until_finished()
        written = self._written
        broadcast_from_main(lambda: self._verify(*written))
        self._written = None
        if is_main():
            self._remove_old()

    def _verify(self, step: int, expected: ArraySpecs) -> None:
        """Raises UserError if the checkpoint of a step does not hold the arrays of `expected`."""
        if (damage := find_damage(self._folder, step, expected)) is None:
            return
        others = [str(other) for other in steps_in(self._folder) if other != step]
        kept = f"it resumes from step {others[-1]}" if others else "it starts over"
        raise UserError(
            f"the checkpoint of step {step} in {self._folder} was not written completely: {damage}",
            f"Check the disk, remove {self._folder / str(step)}, and start the same command again: {kept}.",
        )

    def _remove_old(self) -> None:
        """Removes all checkpoints except for those that are kept; only the main process calls this."""
        for old in steps_in(self._folder)[: -self._keep]:
            is_milestone = self._milestones_every is not None and old % self._milestones_every == 0
            if old != self.best and not is_milestone:
                self._remove(old)

    def _remove(self, step: int) -> None:
        place = self._folder / str(step)
        if (place / ITEM).is_dir():  # otherwise it is not a checkpoint
            # Renamed first, so that a step under its own name is complete; Orbax removes leftovers.
            shutil.rmtree(place.rename(place.with_name(f"{step}{REMOVED}")))

    def discard(self, step: int) -> None:
        """Removes the checkpoint of a step if it was the last to be saved in this process; earlier ones are kept.

        Every process calls this.
        """
        if self._written is None or self._written[0] != step:
            return
        self._manager.wait_until_finished()
        self._written = None
        if is_main():
            self._remove(step)
        wait_for_all("a checkpoint is discarded")

    def recovery_advice(self) -> str:
        """Advice for a run that stopped because of infinite or NaN values."""
        self.wait()
        if (step := self.latest()) is None:
            return "There is no checkpoint yet. Start again with a lower learning rate, or with other data."
        moments = "" if "opt_state" in self._without else "with AdamW also init_optimizer = true, "
        return (
            f"The last checkpoint, of step {step}, is kept. The same command would stop here again: start another run "
            f"from it with init = {str(self._folder / str(step))!r}, {moments}and a lower learning rate or another "
            "data.seed."
        )

    def holds(self, step: int, field: str) -> bool:
        """Whether the checkpoint of a step has arrays of a field of the state; every process calls this.

        True if the step is damaged, which `restore` reports.
        """

        def found() -> bool:
            try:
                return any(name.partition(".")[0] == field for name in open_arrays(self._folder / str(step)))
            except DamagedState:
                return True

        return broadcast_from_main(found)

    def restore(
        self, step: int, target: Any, initial: Mapping[str, Any] | None = None, ignore: Collection[str] = ()
    ) -> Any:
        """Restores the state of a step in the shardings of `target`; every process calls this.

        `initial` holds values, by path, of arrays that checkpoints of an older camelid may lack. `ignore` names
        fields of the state that `target` has not, and that are not read.

        Raises UserError if the step is damaged, or has other shapes or dtypes than `target`.
        """
        place = self._folder / str(step)
        targets = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(target)}
        try:
            arrays = on_all_processes(lambda: open_arrays(place))
            arrays = {name: array for name, array in arrays.items() if name.partition(".")[0] not in ignore}
            theirs = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
            added = {name: np.asarray(value) for name, value in (initial or {}).items() if name not in arrays}
            _check_same(step, {**theirs, **array_specs(added)}, array_specs(target))
            restored, not_finite = on_devices(arrays, targets)
            if not_finite:
                raise DamagedState(f"infinite or NaN values in {describe_counts(not_finite)}")
        except DamagedState as error:
            # Every process is here; the main one reads the other steps.
            intact = broadcast_from_main(lambda: other_intact_steps(place))
            raise damage_error(place, str(error), intact, resuming=True) from error
        restored |= {name: jax.device_put(value, targets[name].sharding) for name, value in added.items()}
        return jax.tree.map_with_path(lambda path, _: restored[path_name(path)], target)

    def wait(self) -> None:
        """Waits until the last checkpoint is written and verified; raises UserError as `save` does."""
        with _full_disk_as_user_error(self._folder):
            self._settle()

    def close(self) -> None:
        """Closes Orbax's manager; call `wait` first to be sure that the last checkpoint is complete."""
        if self._opened is not None:
            self._opened.close()


@contextlib.contextmanager
def _full_disk_as_user_error(folder: Path) -> Iterator[None]:
    """Raises one UserError for the different errors that Orbax raises if the disk is full."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if "No space left" not in str(error):
            raise
        raise UserError(f"the disk of {folder} is full", MORE_SPACE) from error


def _check_same(step: int, theirs: ArraySpecs, ours: ArraySpecs) -> None:
    """Raises UserError if the arrays of a checkpoint differ from those of the requested state."""
    if odd := sorted(path for path in theirs.keys() | ours.keys() if theirs.get(path) != ours.get(path)):
        raise UserError(
            f"the checkpoint of step {step} has {odd[0]} as {theirs.get(odd[0])}, not as {ours.get(odd[0])}",
            "Resume with the recipe that the run was started with.",
        )
