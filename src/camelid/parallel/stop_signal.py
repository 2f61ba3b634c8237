"""Signals that stop a run after a step that all of its processes agree on."""

import os
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils

from camelid.interrupts import handling_signals


class StopSignal:
    """Stops all processes after the same step when one of them receives SIGTERM or Ctrl-C.

    A second Ctrl-C ends the process at once.
    """

    def __init__(self, first: int = 0, last: int | None = None):
        """`first` is the number of completed steps; training ends at step `last`."""
        self._requested = threading.Event()
        self._step, self._last = first, last
        self._agreed = False
        self._several = jax.process_count() > 1

    def __enter__(self) -> "StopSignal":
        # With several processes, JAX's runtime handles SIGTERM, so that all processes agree on a step.
        numbers = [signal.SIGINT] if self._several else [signal.SIGTERM, signal.SIGINT]
        self._handling = handling_signals(self._handle, *numbers)
        self._handling.__enter__()
        return self

    def _handle(self, number: int) -> None:
        if self._requested.is_set():
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return  # launchers may forward a SIGTERM that the process received itself
        self._requested.set()
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)
        where = "a step that all processes agree on" if self._several else f"step {self._stop_step}"
        text = f"stopping after saving {where}; press Ctrl-C again to stop without saving"
        # In a thread, because standard error may be blocked, or in use by the interrupted code.
        threading.Thread(target=print, args=(text,), kwargs={"file": sys.stderr}, daemon=True).start()

    @property
    def _stop_step(self) -> int:
        return self._step + 1 if self._last is None else min(self._step + 1, self._last)

    def __exit__(self, *error) -> None:
        self._handling.__exit__(*error)

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived; with several processes, whether they have agreed on a step. Equal in all."""
        return self._agreed if self._several else self._requested.is_set()

    def should_stop(self, step: int) -> bool:
        """Whether to stop after this step, the same in every process; every process has to call this at every step."""
        self._step = step
        if self._several:
            self._agreed = self._agreed or multihost_utils.reached_preemption_sync_point(step)
        return self.requested
