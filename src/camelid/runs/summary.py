"""What is printed when a run starts: model, devices and text, and how a resumed run differs from what it was."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh

from camelid.checkpoint.adapters.lora import AdaptedCheckpoint
from camelid.data.report import silent_among_first
from camelid.model.adapters import declare_adapters
from camelid.model.decoder import declare_decoder
from camelid.model.flops import count_parameters
from camelid.runs.components import Components
from camelid.runs.lora import base_dtype
from camelid.runs.notes import batch_notes, silent_row_notes, warmup_notes
from camelid.runs.recipe import Recipe
from camelid.runs.start import Start
from camelid.train.schedules import learning_rate
from camelid.train.trainable import count_trained


def start_summary(recipe: Recipe, components: Components, mesh: Mesh, start: Start) -> Iterator[str]:
    """The lines, in order."""
    silent = [silent_among_first(packing) for packing in components.loader.packings]
    few = batch_notes(recipe.data, sum(packing.rows_per_epoch for packing in components.loader.packings))
    for note in (*components.notes, *few, *silent_row_notes(silent), *warmup_notes(recipe)):
        yield f"note: {note}"
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    tokens_per_step = recipe.data.batch_size * recipe.data.sequence_length
    yield (
        f"{count_parameters(components.config):,} parameters on {sizes} ({jax.devices()[0].device_kind}); "
        f"{components.loader.num_tokens:,} tokens of text, {tokens_per_step:,} per step"
    )
    if components.validation is not None and recipe.data.max_validation_tokens is not None:
        rows, total = sum(map(len, components.validation.validation_rows())), components.validation.num_rows
        yield f"validates {rows:,} of {total:,} rows of validation data, chosen by data.seed"
    if recipe.lora is not None:
        yield _trained_adapters(recipe, components)
    elif recipe.train.freeze:
        total, count = (_count_trained(freeze, components) for freeze in ((), recipe.train.freeze))
        yield f"trains {count:,} of {total:,} parameters; {_frozen(recipe)}"
    if recipe.dpo is not None:
        yield f"{sum(store.num_documents for store in components.loader.stores) // 2:,} pairs of answers"
    step = int(start.state.step)
    if start.resumed is not None:
        if step < recipe.train.steps:
            yield f"resuming after step {step}"
    elif step:
        rate = np.asarray(components.step.schedule(step))
        yield f"continuing after step {step} of init, with a learning rate of {rate:.3g}"
    elif components.source is not None and (training := components.source.training) is not None:
        yield (
            f"note: the step ({training.step}) and the AdamW moments of init are not used; "
            "init_optimizer = true continues from them"
        )
    if isinstance(components.source, AdaptedCheckpoint) and recipe.lora is None:
        yield (
            "note: init is an adapter: it is merged into its base, and all parameters are trained; to train the "
            "adapter itself, add the table [lora] that it was trained with"
        )
    if start.aside is not None:
        yield f"note: checkpoints of later steps and a copy of metrics.jsonl were moved to {start.aside}"
    if start.previous is not None and (change := schedule_change(recipe, start.previous, step)) is not None:
        yield f"note: {change}"


def _trained_adapters(recipe: Recipe, components: Components) -> str:
    """What a run with adapters trains."""
    assert recipe.lora is not None
    assert components.lora is not None
    count = _count_trained(recipe.train.freeze, components)
    modules = ", ".join(path.rpartition(".")[2] for path in components.lora.matrices)
    continued = isinstance(components.source, AdaptedCheckpoint)
    held = recipe.lora.base or base_dtype(recipe)
    return (
        f"trains {count:,} parameters ({count / count_parameters(components.config):.2%}), adapters "
        f"{'of init ' if continued else ''}for {modules}; the others stay as they are, in {held}"
        f"{f'; {_frozen(recipe)}' if recipe.train.freeze else ''}"
    )


def _count_trained(freeze: Sequence[str], components: Components) -> int:
    config, lora = components.config, components.lora
    return count_trained(freeze, declare_decoder(config) if lora is None else declare_adapters(lora, config))


def _frozen(recipe: Recipe) -> str:
    return f"train.freeze keeps {', '.join(recipe.train.freeze)} as they are"


def schedule_change(recipe: Recipe, previous: Recipe, step: int) -> str | None:
    """How the learning rate of a run that is resumed after `step` changes with its length or schedule, if it does."""
    if not recipe.optimizer.has_end:
        return None
    before, now = (each.optimizer.end(each.train.steps) for each in (previous, recipe))
    was, rate = (
        np.asarray(learning_rate(replace(recipe.optimizer, decay_steps=steps), steps)(step)) for steps in (before, now)
    )
    if now != before:
        return (
            f"optimizer.decay_steps changes from {before} to {now}: the learning rate of step {step + 1} is "
            f"{rate:.3g} instead of {was:.3g}"
        )
    if recipe.train.steps in (previous.train.steps, now) or recipe.optimizer.final_fraction is None:
        return None
    final, steps = np.asarray(learning_rate(recipe.optimizer, now)(now)), recipe.train.steps
    changed = f"train.steps changes from {previous.train.steps} to {steps}; the learning rate still decays to"
    if steps < now:
        return (
            f"{changed} {final:.3g} at step {now}, which this run does not reach (optimizer.decay_steps = {steps} ends "
            f"the decay at step {steps})"
        )
    return f"{changed} {final:.3g} at step {now} and stays there (optimizer.decay_steps = {steps} stretches the decay)"
