"""The loss of a model on the answers of examples, or on the validation data of a recipe, outside of a run."""

import math
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from camelid.api import Model
from camelid.data.config import DataConfig
from camelid.data.detection import detect
from camelid.data.rows.loader import Loader
from camelid.data.rows.stores import Split
from camelid.errors import UserError
from camelid.inputs import read_text
from camelid.model.finite import not_finite
from camelid.parallel.batch_sharding import data_parallel_size
from camelid.runs.file_names import RECIPE
from camelid.runs.finetune import choose_templates
from camelid.runs.recipe import Recipe, recipe_of, structure
from camelid.runs.renamed import with_new_names
from camelid.runs.validation import validation_sums
from camelid.train.config import LossConfig
from camelid.train.loggers import tokenizing
from camelid.train.objective import NextTokenLoss

ROWS = 8  # per device in one forward pass


@dataclass(frozen=True)
class Evaluation:
    """The loss of a model on tokens with a weight, such as those of answers."""

    loss: float
    """mean cross-entropy, in nats: the validation loss of a run with this model and data"""
    perplexity: float | None
    """exp(loss), infinity if that overflows; None for a mean over rows, which is none over tokens"""
    weight: float
    """the sum of the weights of the tokens that are scored, which is their number if all weights are 1; of a mean over
    rows, the number of rows"""
    rows: int
    """number of rows, which may hold several examples"""
    notes: tuple[str, ...] = ()


def evaluate_recipe(model: Model, path: Path, progress: Callable[[int, int], None]) -> Evaluation:
    """The loss of a model on the validation data of a recipe, or of the recipe in the folder of a run."""
    recipe = _read(path)
    if recipe.dpo is not None:
        raise UserError(
            f"{path} compares pairs of answers, whose loss depends on a reference",
            "The metrics.jsonl of the run has its validation loss.",
        )
    if not (recipe.data.validation or recipe.data.validation_fraction):
        raise UserError(f"{path} has no validation data", "Set data.validation or data.validation_fraction.")
    return _evaluate(model, recipe.data, "validation", recipe.loss, progress)


def evaluate_examples(
    model: Model,
    files: Sequence[str],
    length: int,
    template: str | None,
    name: str,
    progress: Callable[[int, int], None],
) -> Evaluation:
    """The loss of a model, called `name`, on the answers in files of chats, instructions or questions.

    Their kind is detected, and they are rendered as `camelid finetune` renders them, in rows of `length` tokens; None
    is the chat template of the model.
    """
    assert model.tokenizer is not None
    given = {} if template is None else {"template": template}
    options: list[dict[str, Any]] = [detect(file) | given for file in files]
    notes = tuple(choose_templates(options, model.tokenizer, name))
    sources = [{"files": file, **each} for file, each in zip(files, options, strict=True)]
    data = {"train": sources, "sequence_length": length, "batch_size": 1, "packing": "best_fit", "overlong": "truncate"}
    config = recipe_of({"run": "-", "init": "-", "train": {"steps": 1}, "data": data}).data
    return _evaluate(model, config, "train", LossConfig(), progress, notes)


def _read(path: Path) -> Recipe:
    text = read_text(path / RECIPE if path.is_dir() else path, "a recipe (.toml)")
    try:
        return structure(with_new_names(tomllib.loads(text)))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}", "Give a recipe, or the folder of a run.") from error


def _evaluate(
    model: Model,
    data: DataConfig,
    split: Split,
    loss: LossConfig,
    progress: Callable[[int, int], None],
    notes: tuple[str, ...] = (),
) -> Evaluation:
    assert model.tokenizer is not None
    if data.sequence_length > model.config.max_length:
        raise UserError(
            f"rows of {data.sequence_length} tokens exceed the context of {model.config.max_length}",
            f"Use rows of {model.config.max_length} tokens or less.",
        )
    loader = Loader(data, model.tokenizer, split, tokenizing())
    loader.check_ids(model.config.vocab_size)
    rows = ROWS * data_parallel_size(model.mesh)
    count = sum(map(len, loader.validation_rows()))
    objective = NextTokenLoss(config=model.config, compute=model.compute, loss=loss)
    with jax.set_mesh(model.mesh):
        found = validation_sums(objective, loader, rows, model.mesh, model.params, lambda done: progress(done, count))
        total, weight = np.sum([sums["loss"] for sums in found if sums], 0)
        if not math.isfinite(total):
            raise not_finite(model.params, model.compute, "the loss is")
    if not weight:
        raise UserError("no row has a token with a loss", "Use longer rows: prompts may fill them.")
    mean = float(total / weight)
    perplexity = None if loss.average == "rows" else math.exp(mean) if mean < 709 else math.inf
    return Evaluation(mean, perplexity, float(weight), count, (*notes, *loader.notes))
