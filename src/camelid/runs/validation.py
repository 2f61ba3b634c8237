"""The losses of the validation data."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.data.rows.loader import Loader
from camelid.data.rows.stores import store_names
from camelid.errors import UserError
from camelid.model.decoder import Decoder
from camelid.parallel.batch_sharding import BatchSharding
from camelid.parallel.hosts import is_main, to_host
from camelid.runs.best import BestCheckpoint
from camelid.runs.recipe import Recipe
from camelid.train.config import TrainConfig
from camelid.train.loggers import Terminal
from camelid.train.metrics_log import MetricsLog
from camelid.train.objective import Arrays, Objective, Sum
from camelid.train.state import TrainState
from camelid.train.trainable import combine

Validate = Callable[[TrainState], Mapping[str, float]]
"""The means over the validation data, by name: `loss`, and those of the objective's metrics."""


def is_validated(step: int, config: TrainConfig) -> bool:
    """Whether the recipe asks for a validation after this step."""
    return step % (config.evaluate_every or config.steps) == 0 or step == config.steps


def validate_step(
    validate: Validate,
    state: TrainState,
    step: int,
    log: MetricsLog,
    checkpoints: RunCheckpoints,
    best: BestCheckpoint | None,
) -> None:
    """Validates the state after a step, also with the average of its parameters, and keeps it if it is the best."""
    with log.paused():
        means = validate(state)
        averaged = None if state.ema is None else validate(replace(state, trainable=state.ema))
        if not math.isfinite(means["loss"]):
            checkpoints.discard(step)  # earlier ones are good, and it must not replace them
    log.validation(step, means, averaged)
    if best is not None and not log.skipping:
        with log.paused():
            best.offer(step, means["loss"], state)


def mean_losses(
    objective: Objective,
    loader: Loader,
    recipe: Recipe,
    mesh: Mesh,
    frozen: Any,
    terminal: Terminal,
    state: TrainState,
) -> dict[str, float]:
    """The mean `loss` over the validation data in nats per token, and the means of the objective's metrics.

    With several stores, `loss/NAME` is that of each one that has a token with a loss.
    """
    rows = recipe.data.batch_size // recipe.train.accumulate
    total = sum(map(len, loader.validation_rows()))
    with terminal.progress("validation rows", total) if is_main() else nullcontext(lambda done: None) as show:
        sums = validation_sums(objective, loader, rows, mesh, combine(state.trainable, frozen), show)
    return means_of(sums, store_names(recipe.data, "validation"))


def validation_sums(
    objective: Objective,
    loader: Loader,
    rows: int,
    mesh: Mesh,
    params: Decoder,
    show: Callable[[int], None] = lambda done: None,
) -> list[dict[str, np.ndarray]]:
    """For each store, the sum and the weight of the loss and of each metric of the objective, by name.

    `rows` are computed at once; `show` is called with the number of rows that are done.
    """
    sharding, done = BatchSharding(rows, mesh), 0
    sums: list[dict[str, np.ndarray]] = [{} for _ in loader.packings]
    total = sum(map(len, loader.validation_rows()))
    for store, batch in loader.for_validation(rows):
        for name, pair in to_host(_sums(params, sharding.place(vars(batch)), objective)).items():
            sums[store][name] = sums[store].get(name, np.zeros(2)) + np.array(pair, np.float64)
        show(done := min(done + rows, total))
    return sums


def means_of(sums: Sequence[Mapping[str, np.ndarray]], names: Sequence[str]) -> dict[str, float]:
    """The means of all stores together, and the loss of each; `sums` has the sum and the weight of each metric."""
    present = {name: found["loss"] for name, found in zip(names, sums, strict=True) if found and found["loss"][1] > 0}
    if not present:
        raise UserError("no row that is validated has a token with a loss", "Increase data.max_validation_tokens.")
    metrics = sorted(next(filter(None, sums)), key=lambda name: name != "loss")  # the loss comes first
    together = {name: np.sum([found[name] for found in sums if found], 0) for name in metrics}
    separate = {f"loss/{name}": pair for name, pair in present.items()} if len(sums) > 1 else {}
    return {name: float(total / weight) for name, (total, weight) in (together | separate).items()}


@partial(jax.jit, static_argnames="objective")
def _sums(params: Decoder, batch: Arrays, objective: Objective) -> dict[str, Sum]:
    total, weight, metrics = objective(params, batch, None)
    return {"loss": (total, weight), **metrics}
