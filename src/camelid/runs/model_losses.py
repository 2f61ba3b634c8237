"""The losses of a model on data, computed as the validation of a run computes them."""

import math
from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from camelid.api import Model
from camelid.data.config import DataConfig, Source
from camelid.data.rows.loader import Loader
from camelid.data.rows.stores import open_stores
from camelid.errors import UserError
from camelid.parallel.hosts import is_main, main_first
from camelid.runs.recipe import Recipe
from camelid.runs.validation import mean_losses
from camelid.train.loggers import Terminal, tokenizing
from camelid.train.objective import NextTokenLoss
from camelid.train.state import TrainState


def model_losses(model: Model, recipe: Recipe, sources: Sequence[Source] | None = None) -> dict[str, float]:
    """Returns the means over the validation data of a recipe, or over `sources`, in rows and batches of the recipe.

    `loss` is in nats per token that has a loss; `perplexity` is its exponential, unless the recipe averages over rows.
    Further metrics are those of the validation of a run. The model is computed as it is configured itself. Every
    process calls this. Raises UserError if there is no data, or the recipe trains on preferences.
    """
    if recipe.dpo is not None:
        raise UserError(
            "the recipe has [dpo], whose loss compares the model with the reference of its run",
            "The metrics of the run have its validation losses; leave out dpo to evaluate the loss of tokens.",
        )
    if model.tokenizer is None:
        raise UserError("the model has no tokenizer", "Load it with one: camelid.load(path, tokenizer=...).")
    data = recipe.data if sources is None else _with(recipe.data, sources)
    # Those that are given are opened like training data: a model may be evaluated on what it was trained on.
    given = None if sources is None else replace(data, validation=(), max_validation_tokens=None)
    progress = tokenizing() if is_main() else None
    with main_first("evaluation data"):
        stores = None if given is None else open_stores(given, model.tokenizer, "train", progress)
        loader = Loader(data, model.tokenizer, "validation", progress, stores)
        loader.check_ids(model.config.vocab_size)
    accuracy = "accuracy" in recipe.train.metrics
    objective = NextTokenLoss(config=model.config, compute=model.compute, loss=recipe.loss, accuracy=accuracy)
    state, recipe = TrainState(jnp.int32(0), model.params, ()), replace(recipe, data=data)
    with jax.set_mesh(model.mesh):
        means = mean_losses(objective, loader, recipe, model.mesh, None, Terminal(0, 1), state)
    if recipe.loss.average == "tokens":
        means["perplexity"] = math.exp(means["loss"]) if means["loss"] < 709 else math.inf
    return means


def _with(data: DataConfig, sources: Sequence[Source]) -> DataConfig:
    """The same rows, of other sources."""
    own = tuple(sources)
    packing = data.packing_method  # by default, it depends on the training data
    return replace(data, train=own, validation=own, validation_fraction=0.0, stages=(), packing=packing)
