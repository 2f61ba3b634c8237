"""After which steps of a run a checkpoint is saved."""

import math
import time
from collections.abc import Callable

from camelid.parallel.hosts import broadcast_from_main
from camelid.train.config import TrainConfig


class SaveSchedule:
    """Every `checkpoint_every` steps, at milestones, and when `checkpoint_minutes` have passed since the last one.

    Every process calls all methods at the same steps, and gets the same answers: the clock of the main process decides.
    To ask it after every step would make all processes wait for each other. So its answer also tells at which step it
    is asked again: after half of the steps that fit into the remaining time, at the speed since the last checkpoint.
    """

    def __init__(self, config: TrainConfig, step: int, clock: Callable[[], float] = time.monotonic):
        """`step` is the number of steps that were made before."""
        self._periods = [every for every in (config.checkpoint_every, config.milestones_every) if every is not None]
        self._seconds = math.inf if config.checkpoint_minutes is None else 60 * config.checkpoint_minutes
        self._clock = clock
        self.saved(step)

    def saved(self, step: int) -> None:
        """Tells that a checkpoint was saved after this step."""
        self._saved, self._time, self._next = step, self._clock(), step + 1

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, which no earlier call made due."""
        return any(step % every == 0 for every in self._periods) or self._is_time(step)

    def _is_time(self, step: int) -> bool:
        if self._seconds == math.inf or step < self._next:
            return False
        is_time, self._next = broadcast_from_main(lambda: self._decide(step))
        return is_time

    def _decide(self, step: int) -> tuple[bool, int]:
        """Whether it is time, and at which step to ask again."""
        passed = self._clock() - self._time
        if passed >= self._seconds:
            return True, step + 1
        steps_left = (self._seconds - passed) / passed * (step - self._saved) if passed > 0 else 1.0
        return False, step + max(1, int(steps_left / 2))
