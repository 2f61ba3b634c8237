"""The metrics of a run's steps: read from the devices one step late, checked, and written."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np

from camelid.errors import UserError
from camelid.parallel.hosts import is_main, to_host
from camelid.train.callbacks import Callback, TrainEvent
from camelid.train.config import TrainConfig
from camelid.train.loggers import Speed, Terminal, rewards


class Sink(Protocol):
    """What receives rows of metrics: metrics.jsonl or a tracker."""

    def write(self, row: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class MetricsLog(contextlib.AbstractContextManager):
    """Writes metrics to the sinks, shows them on the terminal, and calls the callbacks.

    As a context manager, it closes the sinks.

    Reading the metrics of a step waits until the devices have computed it. `add` therefore only takes them, and `flush`
    reads them when the next step is running. Every process calls all methods in the same order.
    """

    def __init__(
        self,
        config: TrainConfig,
        terminal: Terminal,
        speed: Speed,
        sinks: Sequence[Sink],
        tokens_per_step: int,
        advice: Callable[[], str],
        steps_per_epoch: float | None = None,
        perplexity: bool = True,
        callbacks: Sequence[Callback] = (),
        folder: Path = Path(),
    ):
        """`advice` is what to do when training stops because losses or gradients are infinite or NaN.

        `steps_per_epoch` is the number of steps in which as many rows are read as there are; None: it is not written.
        `perplexity` is whether the exponential of the validation loss is the perplexity of a token, and shown.
        `folder` is that of the run, of which the callbacks are told; unlike the sinks, every process has them.
        """
        self._config, self._terminal, self._speed, self._sinks = config, terminal, speed, sinks
        self._tokens_per_step, self._steps_per_epoch, self._advice = tokens_per_step, steps_per_epoch, advice
        self._perplexity, self._callbacks, self._folder = perplexity, callbacks, folder
        self._pending: list[tuple[int, Mapping[str, jax.Array]]] = []
        self.skipping = False
        """whether the update of the last step that was read was skipped, because its loss or gradient was not finite"""

    def __exit__(self, *error: object) -> None:
        with contextlib.ExitStack() as closing:
            for sink in self._sinks:
                closing.callback(sink.close)

    def add(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a step, without waiting for them."""
        self._pending.append((step, metrics))

    def flush(self) -> None:
        """Writes all metrics that were added; raises UserError if too many updates in a row were skipped."""
        pending, self._pending = self._pending, []
        for step, metrics in pending:
            self._write_step(step, {name: value.item() for name, value in to_host(metrics).items()})

    def validation(self, step: int, means: Mapping[str, float], averaged: Mapping[str, float] | None = None) -> None:
        """Writes the means over the validation data after a step: `loss` as validation_loss, and so on.

        `averaged` are those of the moving average of the parameters, whose names end in `_ema`; None if there is none.
        Raises UserError if the loss is infinite or NaN.
        """
        ema = {} if averaged is None else {f"validation_{name}_ema": value for name, value in averaged.items()}
        metrics = {f"validation_{name}": value for name, value in means.items()} | ema
        self._write({"step": step, **metrics})
        loss = means["loss"]
        if not math.isfinite(loss):
            raise UserError(f"after step {step} the validation loss is {loss}", self._advice())
        if averaged is not None and not math.isfinite(averaged["loss"]):
            problem = f"after step {step} the validation loss of the moving average is {averaged['loss']}"
            raise UserError(problem, self._advice())
        if is_main():
            average = "" if averaged is None else f"; of the moving average {averaged['loss']:.4f}"
            with np.errstate(over="ignore"):
                about = rewards(means) or (f"perplexity {np.exp(loss):.2f}" if self._perplexity else "")
            self._terminal.print(f"step {step}: validation loss {loss:.4f}{about and f', {about}'}{average}")
        self._call("evaluate", step, metrics)

    def saved(self, step: int) -> None:
        """Tells the callbacks that the checkpoint of a step is being written."""
        self._call("save", step, {})

    def paused(self) -> AbstractContextManager[None]:
        """While the block runs, no time is counted as that of steps: for validation and checkpoints."""
        return self._speed.paused()

    def _write_step(self, step: int, metrics: Mapping[str, float]) -> None:
        loss, norm = metrics["loss"], metrics["gradient_norm"]
        finite = math.isfinite(loss) and math.isfinite(norm)
        in_a_row = int(metrics["skipped_in_a_row"])
        self.skipping = in_a_row > 0
        spike = finite and metrics["loss_deviation"] > self._config.spike_sigma
        if finite and not spike and step % self._config.log_every and step != self._config.steps:
            return
        seen: dict[str, float] = {"tokens": step * self._tokens_per_step}
        if self._steps_per_epoch is not None:
            seen["epoch"] = step / self._steps_per_epoch
        row = {"step": step, **metrics, **seen, **self._speed.read(step, self._tokens_per_step)}
        if not spike:
            del row["loss_deviation"]
        self._write(row)
        # A run that ends among skipped updates has probably diverged: its model does not count as finished.
        if in_a_row > self._config.max_skipped or (step == self._config.steps and in_a_row > 1):
            before = f", and the {in_a_row - 1} updates before it were skipped" if in_a_row > 1 else ""
            raise UserError(f"step {step} has loss {loss} and gradient norm {norm}{before}", self._advice())
        if is_main():
            self._terminal.show(step, row)
            if (note := _note(metrics, finite, spike)) is not None:
                self._terminal.print(f"step {step}: {note}")
        self._call("log", step, {name: value for name, value in row.items() if name != "step"})

    def _write(self, row: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.write(row)

    def _call(self, kind: Literal["log", "evaluate", "save"], step: int, metrics: Mapping[str, Any]) -> None:
        if not self._callbacks:
            return
        event = TrainEvent(kind, step, metrics, self._folder)
        with self.paused():
            for callback in self._callbacks:
                callback(event)


def _note(metrics: Mapping[str, float], finite: bool, spike: bool) -> str | None:
    """What is said about a step whose update was skipped or whose loss is a spike; None for other steps."""
    if spike:
        return f"loss {metrics['loss']:.4f} is {metrics['loss_deviation']:.1f} standard deviations above its mean"
    if finite:
        return None
    if not metrics["skipped_in_a_row"]:
        return f"the update is skipped: gradients overflow float16; the loss scale is now {metrics['loss_scale']:g}"
    return (
        f"the update is skipped: loss {metrics['loss']}, gradient norm {metrics['gradient_norm']} "
        f"({metrics['skipped_in_a_row']:.0f} in a row, {metrics['skipped']:.0f} in the run)"
    )
