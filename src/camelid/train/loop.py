"""The training loop: next batch, step, callbacks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import jax

from camelid.parallel.hosts import StopSignal, to_host
from camelid.train.state import TrainState
from camelid.train.step import Arrays


@dataclass(frozen=True)
class Callback:
    """`do(step, state)` after every `every` steps."""

    every: int
    do: Callable[[int, TrainState], None]
    at_end: bool = False
    """after the last step too, whatever its number"""
    at_stop: bool = False
    """and where a signal ends the run"""


def train(
    step: Callable[[TrainState, Arrays], tuple[TrainState, Arrays]],
    state: TrainState,
    batches: Iterable[Arrays],
    report: Callable[[int, dict], None],
    callbacks: Sequence[Callback],
    stop: StopSignal,
) -> tuple[int, TrainState]:
    """Trains until the batches end or a signal comes; returns the steps made, those before this start included.

    Every process runs this in step; `report` gets the metrics of a finished step as numbers, before its callbacks run.
    """
    first = made = int(state.step)
    stopped, waiting = False, []
    for batch in batches:
        state, metrics = step(state, batch)
        made += 1
        # The metrics of the step before: reading this step's would leave the devices idle until the next is sent.
        _report(report, waiting)
        waiting.append((made, metrics))
        stopped = stop.at(made)
        due = [callback for callback in callbacks if made % callback.every == 0]
        if due:
            _report(report, waiting)
        for callback in due:
            callback.do(made, state)
        if stopped:
            break
    _report(report, waiting)
    for callback in callbacks:
        if made > first and (callback.at_stop if stopped else callback.at_end) and made % callback.every:
            callback.do(made, state)
    jax.block_until_ready(state)
    return made, state


def _report(report: Callable[[int, dict], None], waiting: list[tuple[int, Arrays]]) -> None:
    for step, metrics in waiting:
        report(step, {name: value.item() for name, value in to_host(metrics).items()})
    waiting.clear()
