"""A trace of some steps by JAX's profiler, for TensorBoard's profile plugin (XProf)."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import jax

from camelid.train.config import ProfileConfig
from camelid.train.objective import Arrays
from camelid.train.state import TrainState

Step = Callable[[TrainState, Arrays], tuple[TrainState, Arrays]]


class Profiled:
    """A step that is traced while the chosen steps run; as a context manager, it ends a trace that is not complete.

    Every process traces its own devices. The devices are idle before the first step that is traced and after the last
    one, so that the trace holds these steps alone.
    """

    def __init__(self, step: Step, config: ProfileConfig, folder: Path, made: int):
        """The trace is written to `folder`; `made` is the number of steps that were made before."""
        self._step, self._folder, self._made = step, folder, made
        self._chosen = range(config.first_step, config.first_step + config.steps)
        self._tracing = False

    def __call__(self, state: TrainState, batch: Arrays) -> tuple[TrainState, Arrays]:
        self._made += 1
        if self._made not in self._chosen:
            return self._step(state, batch)
        if not self._tracing:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=self._made):
            state, metrics = self._step(state, batch)
        if self._made == self._chosen[-1]:
            jax.block_until_ready(state)
            self._stop()
        return state, metrics

    def __enter__(self) -> "Profiled":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
