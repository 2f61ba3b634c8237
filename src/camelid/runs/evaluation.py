"""The losses of a model outside of a run, computed as the validation of a run computes them."""

import math
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from camelid.api import Model
from camelid.data.config import DataConfig, Source
from camelid.data.detection import detect
from camelid.data.rows.loader import Loader
from camelid.data.rows.stores import Split, open_stores, store_names
from camelid.errors import UserError
from camelid.evaluate.perplexity import perplexity_of
from camelid.inputs import read_text
from camelid.model.finite import not_finite
from camelid.parallel.batch_sharding import data_parallel_size
from camelid.parallel.hosts import is_main, main_first
from camelid.runs.file_names import RECIPE
from camelid.runs.finetune import choose_templates
from camelid.runs.notes import truncation_note
from camelid.runs.recipe import Recipe, recipe_of, structure
from camelid.runs.renamed import with_new_names
from camelid.runs.validation import means_of, validation_sums
from camelid.train.config import LossConfig
from camelid.train.loggers import Terminal, tokenizing
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


def evaluate_rows(model: Model, recipe: Recipe, sources: Sequence[Source] | None = None) -> dict[str, float]:
    """Returns the means over the validation data of a recipe, or over `sources`, in rows and batches of the recipe.

    `loss` is in nats per token that has a loss; `perplexity` is its exponential, unless the recipe averages over rows.
    Further metrics are those of the validation of a run. The model is computed as it is configured itself. Every
    process calls this. Raises UserError if there is no data, or the recipe trains on preferences.
    """
    _check_losses(recipe)
    if model.tokenizer is None:
        raise UserError("the model has no tokenizer", "Load it with one: camelid.load(path, tokenizer=...).")
    data = recipe.data if sources is None else _with(recipe.data, sources)
    # Those that are given are opened like training data: a model may be evaluated on what it was trained on.
    given = None if sources is None else replace(data, validation=(), max_validation_tokens=None)
    progress = tokenizing() if is_main() else None
    with main_first("evaluation data"):
        stores = None if given is None else open_stores(given, model.tokenizer, "train", progress)
        loader = Loader(data, model.tokenizer, "validation", progress, stores)
    rows, accuracy = recipe.data.batch_size // recipe.train.accumulate, "accuracy" in recipe.train.metrics
    with Terminal(0, 1).progress("validation rows", _count(loader)) if is_main() else nullcontext(None) as show:
        means = means_of(_sums(model, loader, recipe.loss, rows, show, accuracy), store_names(data, "validation"))
    perplexity = _perplexity(means["loss"], recipe.loss)
    return means if perplexity is None else means | {"perplexity": perplexity}


def _with(data: DataConfig, sources: Sequence[Source]) -> DataConfig:
    """The same rows, of other sources."""
    own = tuple(sources)
    packing = data.packing_method  # by default, it depends on the training data
    return replace(data, train=own, validation=own, validation_fraction=0.0, stages=(), packing=packing)


def evaluate_recipe(model: Model, path: Path, progress: Callable[[int, int], None]) -> Evaluation:
    """The loss of a model on the validation data of a recipe, or of the recipe in the folder of a run."""
    recipe = _read(path)
    _check_losses(recipe)
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


def _check_losses(recipe: Recipe) -> None:
    if recipe.dpo is not None:
        raise UserError(
            "the recipe has [dpo], whose loss compares the model with the reference of its run",
            "The metrics.jsonl of the run has its validation losses; without dpo, the loss of tokens is evaluated.",
        )


def pairs_error(data: str | Path) -> UserError:
    """The error if data that is evaluated consists of pairs of answers."""
    return UserError(
        f"{data} holds pairs of a chosen and a rejected answer, and preferences cannot be evaluated outside of a run",
        "The metrics.jsonl of a run with dpo has its validation losses. To evaluate the chosen answers alone, leave "
        "out dpo, and set kind = 'fields' and fields = '[prompt],chosen'.",
    )


def _evaluate(
    model: Model,
    data: DataConfig,
    split: Split,
    loss: LossConfig,
    progress: Callable[[int, int], None],
    notes: tuple[str, ...] = (),
) -> Evaluation:
    assert model.tokenizer is not None
    loader = Loader(data, model.tokenizer, split, tokenizing())
    count = _count(loader)
    rows = ROWS * data_parallel_size(model.mesh)
    found = _sums(model, loader, loss, rows, lambda done: progress(done, count))
    total, weight = np.sum([sums["loss"] for sums in found if sums], 0)
    if not weight:
        raise UserError("no row has a token with a loss", "Use longer rows: prompts may fill them.")
    mean = float(total / weight)
    notes = (*notes, *loader.notes, *_truncation_notes(loader))
    return Evaluation(mean, _perplexity(mean, loss), float(weight), count, notes)


def _truncation_notes(loader: Loader) -> Iterator[str]:
    """A note if rows hold truncated examples."""
    if truncated := sum(packing.plan.truncated for packing in loader.packings if packing.plan is not None):
        lengths = np.concatenate([np.diff(store.offsets) for store in loader.stores])
        length = loader.config.sequence_length
        yield truncation_note(truncated, len(lengths), "example", length, int(lengths.max()))


def _sums(
    model: Model,
    loader: Loader,
    loss: LossConfig,
    rows: int,
    show: Callable[[int], None] | None,
    accuracy: bool = False,
) -> list[dict[str, np.ndarray]]:
    """As `validation_sums`. Raises UserError if the rows exceed the model, or if its loss is NaN or infinite."""
    length = loader.config.sequence_length
    if length > model.config.max_length:
        raise UserError(
            f"rows of {length} tokens exceed the context of {model.config.max_length}",
            f"Use rows of {model.config.max_length} tokens or less.",
        )
    if loader.pairs:
        raise pairs_error(loader.stores[0].folder)
    loader.check_ids(model.config.vocab_size)
    objective = NextTokenLoss(config=model.config, compute=model.compute, loss=loss, accuracy=accuracy)
    with jax.set_mesh(model.mesh):
        found = validation_sums(objective, loader, rows, model.mesh, model.params, show or (lambda done: None))
        if not all(math.isfinite(sums["loss"][0]) for sums in found if sums):
            raise not_finite(model.params, model.compute, "the loss is")
    return found


def _count(loader: Loader) -> int:
    return sum(map(len, loader.validation_rows()))


def _perplexity(loss: float, config: LossConfig) -> float | None:
    return None if config.average == "rows" else perplexity_of(loss)
