"""Training state on disk, through Orbax: asynchronous, atomic, restored onto any mesh."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from camelid.checkpoint.folder import in_units
from camelid.checkpoint.integrity import described, path_name, survey
from camelid.checkpoint.state.stored import (
    CHECKSUMS,
    ITEM,
    Address,
    Damage,
    Outline,
    damaged,
    find_damage,
    how_cut,
    newest,
    on_devices,
    open_arrays,
    outline,
    steps_in,
    together,
    whole_steps_beside,
)
from camelid.errors import UserError
from camelid.parallel.hosts import broadcast_from_main, is_main

REMOVED = ".orbax-checkpoint-tmp"  # after the name of a checkpoint that is being removed; Orbax removes what is left
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

        Raises UserError if the disk is full, if a value of the state is infinite or NaN, or if the checkpoint before
        was not written completely; the checkpoints before that one are kept.
        """
        if step == broadcast_from_main(self.latest):
            return
        checksums, not_finite = survey(state)
        if not_finite:
            raise UserError(
                f"the state after step {step} has infinite or NaN values in {described(not_finite)}; it is not saved",
                self.way_on(),
            )
        with _full_disk_told(self._folder):
            self._settle()  # also, what is still being written is not yet missing from the free space
            manager = self._manager
            need = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            if (free := broadcast_from_main(lambda: shutil.disk_usage(self._folder).free)) < need:
                raise UserError(
                    f"{self._folder} has {in_units(free)} free, and a checkpoint of {in_units(need)} is due",
                    MORE_SPACE,
                )
            args = ocp.args.StandardSave(state, jax.tree.map_with_path(how_cut, state))
            manager.save(step, args=args, custom_metadata={CHECKSUMS: checksums})
            self._written = step, outline(state)

    def _settle(self) -> None:
        """Waits for the checkpoint that is being written, verifies it, and removes those that are too old."""
        if self._written is None:
            return
        self._manager.wait_until_finished()
        written = self._written
        broadcast_from_main(lambda: self._verify(*written))
        self._written = None
        if is_main():
            self._remove_old()

    def _verify(self, step: int, expected: Outline) -> None:
        """Raises UserError if the checkpoint of a step does not hold the arrays of `expected`."""
        if (damage := find_damage(self._folder, step, expected)) is None:
            return
        others = [str(other) for other in steps_in(self._folder) if other != step]
        kept = f"it goes on from step {others[-1]}" if others else "it begins anew"
        raise UserError(
            f"the checkpoint of step {step} in {self._folder} was not written completely: {damage}",
            f"Check the disk, remove {self._folder / str(step)}, and start the same command again: {kept}.",
        )

    def _remove_old(self) -> None:
        """Removes all checkpoints but the newest; the main process alone calls this."""
        for old in steps_in(self._folder)[: -self._keep]:
            place = self._folder / str(old)
            if (place / ITEM).is_dir():  # otherwise it is not a checkpoint
                # A checkpoint never lacks a part while it has its name; what a killed process left is removed later.
                shutil.rmtree(place.rename(place.with_name(f"{old}{REMOVED}")))

    def way_on(self) -> str:
        """What to do after training ended with infinite or NaN values, for messages."""
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

        Raises UserError if the step is damaged, or of other shapes or dtypes.
        """
        place = self._folder / str(step)
        targets = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(target)}
        try:
            arrays = together(lambda: open_arrays(place))
            theirs = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
            _check_same(step, theirs, outline(target))
            restored, not_finite = on_devices(arrays, targets)
            if not_finite:
                raise Damage(f"infinite or NaN values in {described(not_finite)}")
        except Damage as error:
            # Every process is here, and the main one reads the other steps for all.
            whole = broadcast_from_main(lambda: whole_steps_beside(place))
            raise damaged(place, str(error), whole, resuming=True) from error
        return jax.tree.map_with_path(lambda path, _: restored[path_name(path)], target)

    def wait(self) -> None:
        """Returns when everything is on disk and verified; raises UserError as `save` does."""
        with _full_disk_told(self._folder):
            self._settle()

    def close(self) -> None:
        """Ends the writing; call `wait` before where it matters."""
        if self._opened is not None:
            self._opened.close()


@contextlib.contextmanager
def _full_disk_told(folder: Path) -> Iterator[None]:
    """The many errors in which a full disk comes out of Orbax, as one."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if "No space left" not in str(error):
            raise
        raise UserError(f"the disk of {folder} is full", MORE_SPACE) from error


def _check_same(step: int, theirs: Outline, ours: Outline) -> None:
    """Raises UserError if a checkpoint is not one of the state that is asked for."""
    if odd := sorted(path for path in theirs.keys() | ours.keys() if theirs.get(path) != ours.get(path)):
        raise UserError(
            f"the checkpoint of step {step} has {odd[0]} as {theirs.get(odd[0])}, not as {ours.get(odd[0])}",
            "Resume with the recipe that the run began with.",
        )
