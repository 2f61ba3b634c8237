"""Samples: completions of the prompts of `[samples]` in the course of training."""

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from camelid.api import Model
from camelid.completion import Completion
from camelid.data.preparation.store import Store
from camelid.errors import UserError
from camelid.generate.decode import check_prompts
from camelid.model.config import ModelConfig
from camelid.model.decoder import Decoder
from camelid.parallel.hosts import broadcast_from_main, is_main
from camelid.runs.file_names import SAMPLES
from camelid.runs.recipe import Recipe
from camelid.text.chat import ChatTemplate, load_template
from camelid.text.tokenizer import Tokenizer
from camelid.train.config import SamplesConfig
from camelid.train.loggers import MetricsFile, Terminal, read_metrics
from camelid.train.state import TrainState
from camelid.train.trackers import Tracker
from camelid.train.trainable import combine


def encode_prompts(
    samples: SamplesConfig, config: ModelConfig, tokenizer: Tokenizer, stores: Sequence[Store]
) -> list[list[int]]:
    """The token ids of each prompt; `stores` are those of the training data.

    Raises UserError if a prompt and its sample do not fit the context, or if there is no one template for the chats.
    """
    template = _template(samples, tokenizer, stores)
    if template is None:
        ids = [tokenizer.encode(prompt, specials=True) for prompt in samples.prompts]
    else:
        ids = template.encode_questions(samples.prompts, tokenizer, samples.system)
    try:
        check_prompts(ids, samples.max_new_tokens, config)
    except UserError as error:
        raise UserError(f"[samples]: {error.problem}", error.advice) from error
    return ids


def _template(samples: SamplesConfig, tokenizer: Tokenizer, stores: Sequence[Store]) -> ChatTemplate | None:
    """The chat template of the prompts; None if they are plain texts."""
    names = set[str | None]().union(*(store.templates for store in stores))
    if samples.chat is None:
        if len(names) == 1 and all(store.templates for store in stores):
            with contextlib.suppress(UserError):  # a store may have been prepared with a template that is not here
                return load_template(names.pop(), tokenizer)
    elif samples.chat:
        if len(names) > 1:
            listed = ", ".join(sorted(name or "that of the tokenizer" for name in names))
            raise UserError(
                f"samples.chat = true, and the training data have several chat templates: {listed}",
                "Leave it out, so that the prompts are plain texts.",
            )
        return load_template(names.pop() if names else None, tokenizer)
    if samples.system is not None:
        raise UserError(
            f"samples.system = {samples.system!r}, and the prompts are plain texts, because the training data do not "
            "have one chat template",
            "Remove it, or set samples.chat = true for the template of the tokenizer.",
        )
    return None


class Samples:
    """Completes the prompts after some steps, into samples.jsonl, on the terminal and to the trackers.

    Every process calls all methods: the parameters stay where they are, sharded. If the run keeps a moving average of
    the parameters, the completions are those of the average.
    """

    def __init__(
        self,
        recipe: Recipe,
        make_model: Callable[[Decoder], Model],
        prompts: Sequence[Sequence[int]],
        frozen: Any,
        folder: Path,
        terminal: Terminal,
        trackers: Sequence[Tracker],
        resume_from: int,
    ):
        """`make_model` gives parameters the tokenizer and the settings of the run; `prompts` are those of
        `encode_prompts`. Lines of steps after `resume_from` are removed from samples.jsonl."""
        assert recipe.samples is not None
        self._config, self._train = recipe.samples, recipe.train
        self._make_model, self._prompts, self._frozen = make_model, prompts, frozen
        self._terminal, self._trackers = terminal, trackers
        self._path = folder / SAMPLES
        self._file = MetricsFile(self._path, resume_from) if is_main() else None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def is_due(self, step: int) -> bool:
        """Whether the recipe asks for samples after this step."""
        every = self._config.every or self._train.evaluate_every or self._train.steps
        return step % every == 0 or step == self._train.steps

    def write(self, state: TrainState, step: int) -> None:
        """Writes the samples of a step that samples.jsonl does not have; a run that was resumed may have them."""
        if not (missing := broadcast_from_main(lambda: self._missing(step))):
            return
        completions = self._complete(state)
        rows = [self._row(step, number, completions[number]) for number in missing]
        if self._file is None:
            return
        for row in rows:
            self._file.write(row)
        self._terminal.print(_shown(rows, state.ema is not None))
        for tracker in self._trackers:
            tracker.write_samples(step, rows)

    def _missing(self, step: int) -> list[int]:
        """The numbers of the prompts without a completion of this step in samples.jsonl."""
        present = {(row["prompt"], row["seed"]) for row in read_metrics(self._path) if row["step"] == step}
        seed = self._config.seed
        return [i for i, prompt in enumerate(self._config.prompts) if (prompt, seed + i) not in present]

    def _complete(self, state: TrainState) -> list[Completion]:
        """All prompts, always: so one program is compiled."""
        params = combine(state.trainable if state.ema is None else state.ema, self._frozen)
        config = self._config
        try:
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # of logits that are not finite
                return self._make_model(params).generate(
                    self._prompts,
                    max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature,
                    seed=config.seed,
                )
        except UserError:  # all logits are NaN or infinite: the loss tells, and train.max_skipped ends the run
            return [Completion(prompt, "", [], "error") for prompt in config.prompts]

    def _row(self, step: int, number: int, completion: Completion) -> dict[str, Any]:
        return {
            "step": step,
            "prompt": self._config.prompts[number],
            "completion": completion.text,
            "finish_reason": completion.finish_reason,
            "seed": self._config.seed + number,
        }


def _shown(rows: Sequence[Mapping[str, Any]], averaged: bool) -> str:
    """The samples of a step for a person, without characters that a terminal would interpret."""
    text = f"step {rows[0]['step']}: samples{' of the moving average' if averaged else ''}"
    for row in rows:
        end = {"stop": "", "length": " ...", "error": "(the logits are NaN or infinite)"}[row["finish_reason"]]
        for mark, part in (("> ", row["prompt"]), ("  ", row["completion"] + end)):
            lines = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in part).split(
                "\n"
            )
            text += "".join(f"\n  {mark if number == 0 else '  '}{line}" for number, line in enumerate(lines))
    return text
