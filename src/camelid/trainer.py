"""`camelid.Trainer`: training, evaluation and generation from Python, by the recipes and the loop of the commands."""

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from camelid.api import Model, load
from camelid.checkpoint.integrity import checksum_arrays
from camelid.checkpoint.state.saved_state import steps_in
from camelid.completion import Completion
from camelid.data.config import SourceOptions
from camelid.data.preparation.partial_stores import refuse_unguarded
from camelid.disk.paths import cache_folder, make_writable
from camelid.errors import UserError, in_python, with_arguments
from camelid.generate.config import GenerationConfig
from camelid.inputs import expand_home
from camelid.parallel.batch_sharding import data_parallel_size
from camelid.parallel.failure import fail_together
from camelid.parallel.hosts import broadcast_from_main, is_main
from camelid.parallel.mesh import MeshConfig
from camelid.runs.arguments import as_table, with_model, without_none
from camelid.runs.datasets import Dataset, Rows, names_or_rows
from camelid.runs.evaluation import evaluate_rows, pairs_error
from camelid.runs.file_names import INPUTS, METRICS, STEPS
from camelid.runs.finetune import Request, as_sources, choose_templates, detected_options, make_plan
from camelid.runs.recipe import Recipe, laid_over, recipe_of
from camelid.runs.run import run
from camelid.runs.run_folder import check_is_own, kept_recipe
from camelid.text.chat import load_template
from camelid.train.callbacks import Callback
from camelid.train.loggers import read_metrics

IN_MEMORY = "model"
"""`init` of a model in memory, before it is saved; runs are named after it"""
ARGUMENTS = {"train": "train_dataset", "validation": "eval_dataset"}
ROWS = 8  # of a batch that is evaluated before a recipe sets it
LEAST: Mapping[str, Any] = {
    "run": "-",
    "init": "-",
    "data": {"train": [{"files": "-", "kind": "tokens"}], "sequence_length": 1, "batch_size": 1},
    "train": {"steps": 10**9, "evaluate_every": 1},
}
"""A recipe of what every recipe needs, over which fields are laid that are checked, or needed, before training."""


@dataclass(frozen=True)
class TrainResult:
    """What `Trainer.train` and `Trainer.finetune` return."""

    folder: Path
    """the folder of the run, with its recipe, checkpoints, metrics.jsonl, and the finished model or adapter"""
    steps: int
    """number of updates, including those of earlier starts"""
    finished: bool
    """False if a signal stopped the run after it saved a checkpoint; the same call resumes it"""
    saved: Sequence[Path]
    """the folders that were written for use elsewhere: model/ or adapter/"""
    mesh: MeshConfig
    """the devices that trained"""

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, in order; NaN and infinities are None."""
        return read_metrics(self.folder / METRICS)

    @property
    def metrics(self) -> dict[str, Any]:
        """The last metrics of a validation, such as `validation_loss`, and of a training step, such as `loss`."""
        rows = self.history
        validations, steps = ([row for row in rows if name in row] for name in ("validation_loss", "loss"))
        return {name: value for row in (*validations[-1:], *steps[-1:]) for name, value in row.items()}

    def model(self, dtype: str = "float32") -> Model:
        """Loads the newest model of the run, with its adapter if it trained one, on the devices that trained it."""
        return load(self.folder, dtype, self.mesh)


class Trainer:
    """Trains, evaluates and uses a model from Python.

    A Trainer makes a recipe from its arguments, which the loop of `camelid train` runs: runs have the same folders and
    metrics, and are resumed in the same way. With several processes, each makes the same calls.

    Example:
      ```python
      trainer = camelid.Trainer(model="./TinyLlama", train_dataset=rows, args={"run": "runs/chat", "lora": {}})
      result = trainer.finetune()
      print(result.metrics["loss"], trainer.predict("Who is Tim?", chat=True)[0].text)
      ```
    """

    @in_python
    def __init__(
        self,
        *,
        task: str = "text_generation",
        model: str | Path | Model | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        args: str | Path | Recipe | Mapping[str, Any] | None = None,
        overrides: Mapping[str, Any] | None = None,
        dataset_options: Mapping[str, Any] | None = None,
        callbacks: Callback | Sequence[Callback] = (),
    ):
        """Reads no data and loads no model yet.

        Args:
          task: "text_generation", the only task there is.
          model: A preset such as "llama_7b", which `train` initializes with random values; or a checkpoint in any
            format or its name on the Hugging Face Hub, from which training starts; or a `camelid.Model`, which is
            saved in `inputs/` in the folder of the run before it is trained. None: the `init` or `model` of `args`.
          train_dataset: The path of a file, a glob or `hf:NAME`, or a list of these; or rows, from a list or another
            iterable: texts, or dictionaries whose keys tell their kind, as for `camelid finetune`. Rows are written to
            `inputs/` in the folder of the run.
          eval_dataset: Data that are validated in the course of training, and by `evaluate`; in the same form.
          args: Fields of the recipe: a dictionary of tables and of dotted names, such as `{"train.steps": 100, "lora":
            {"rank": 8}}`; or a complete recipe, as the path of a TOML file, the name of one that is installed, or a
            `Recipe`, whose model and data are replaced by those that are given here. `run` is the folder of the run,
            by default `runs/` with the names of the model and of the data.
          overrides: Fields that replace those of `args`, in the form of a dictionary; None removes a field.
          dataset_options: How all files and rows are read, if it is not as detected: `kind`, `fields`, `text_key`,
            `template` and other fields of a source.
          callbacks: One or several functions that are called with a `TrainEvent` in the course of training.

        Raises:
          UserError: If an argument is not valid, or arguments contradict each other.
        """
        if task != "text_generation":
            raise UserError(f"task = {task!r} is unknown", 'camelid has the task "text_generation".')
        complete = args is not None and not isinstance(args, Mapping)
        table = as_table("args", args)
        if model is not None:
            table = with_model(table, IN_MEMORY if isinstance(model, Model) else model, complete)
        self._fields = without_none(laid_over(table, as_table("overrides", overrides)))
        least = LEAST if eval_dataset is None else laid_over(LEAST, {"data": {"validation": LEAST["data"]["train"]}})
        recipe_of(laid_over(least, self._fields))  # raises UserError for fields that do not exist or fit
        self._model = model if isinstance(model, Model) else None
        self._datasets: dict[str, tuple[str, ...] | Rows] = {}
        for name, dataset in {"train": train_dataset, "validation": eval_dataset}.items():
            argument = ARGUMENTS[name]
            if dataset is None:
                continue
            if not complete and name in self._fields.get("data", {}):
                raise UserError(f"args has data.{name}, and there is {argument}", "Leave out one of them.")
            self._datasets[name] = names_or_rows(dataset, argument)
        self._options = as_table("dataset_options", dataset_options)
        known = [field.name for field in fields(SourceOptions)]
        if unknown := next((name for name in self._options if name not in known), None):
            raise UserError(f"dataset_options has {unknown!r}", f"Its fields are {', '.join(known)}.")
        self._callbacks = (callbacks,) if callable(callbacks) else tuple(callbacks)
        if other := next((callback for callback in self._callbacks if not callable(callback)), None):
            raise UserError(f"callbacks has {other!r:.60}, which is no function", "Give functions of a TrainEvent.")
        self._result: TrainResult | None = None
        self._loaded: tuple[object, Model] | None = None

    @in_python
    def train(self, from_step: int | None = None) -> TrainResult:
        """Trains by the recipe, from random values or from the checkpoint; resumes the run if it has begun.

        Nothing is chosen: the recipe needs at least `train.steps`, `data.sequence_length` and `data.batch_size`, and
        for a preset `tokenizer`. Ctrl-C and SIGTERM save a checkpoint and return; handlers are as before afterwards.

        Args:
          from_step: Resume from the checkpoint of this step; checkpoints of later steps are moved aside.

        Returns:
          The folder, the metrics and the model of the run.

        Raises:
          UserError: If the recipe does not fit the data, the model, the devices or the folder, which are listed in
            docs/recipes.md; or if training diverges.
        """
        self._check_start()
        if "train" not in {**self._fields.get("data", {}), **self._datasets}:
            raise UserError("there is no training data", "Give train_dataset, or data.train in args.")
        data = {split: self._sources(names) for split, names in self._names().items()}
        own = {"run": self._run, "data": data} | self._saved_model()
        return self._train(recipe_of(laid_over(self._fields, own)), from_step)

    @in_python
    def finetune(self, from_step: int | None = None) -> TrainResult:
        """Finetunes the checkpoint as `camelid finetune` does: fields that `args` leaves open are chosen.

        They are chosen for the model, the data and the devices (docs/finetune.md); `lora` in `args` trains adapters,
        and `dpo` trains on pairs of answers. Resumes the run if it has begun, with its recipe.

        Args:
          from_step: Resume from the checkpoint of this step; checkpoints of later steps are moved aside.

        Returns:
          The folder, the metrics and the model of the run.

        Raises:
          UserError: If there is no checkpoint or no training data, their kind is not known, or as for `train`.
        """
        self._check_start()
        if "init" not in self._fields:
            raise UserError(
                "finetune starts from a checkpoint, and the model has random values",
                "Give the path of a checkpoint as model, or use train.",
            )
        if "train" not in self._datasets:
            raise UserError("finetune needs train_dataset", "train follows a recipe that names its data.")
        names = self._names()
        given = {name: value for name, value in self._fields.items() if name not in ("run", "init", "init_ignore")}
        if "data" in given:
            given["data"] = {name: value for name, value in given["data"].items() if name not in names}
        request = Request(
            model=(self._fields | self._saved_model())["init"],
            data=names["train"],
            validation=names.get("validation", ()),
            out=self._run,
            options=self._options,
            ignore=tuple(self._fields.get("init_ignore", ())),
            fields=given,
        )
        plan = make_plan(request)
        if is_main():
            for note in plan.notes:
                print(f"note: {with_arguments(note)}", file=sys.stderr)
        return self._train(plan.recipe, from_step)

    @in_python
    def evaluate(
        self, eval_dataset: Dataset | None = None, eval_checkpoint: bool | str | Path | None = None
    ) -> dict[str, float]:
        """Computes the loss of a model on data, as the validation of a run does.

        Args:
          eval_dataset: The data. None: that of the Trainer, or the validation data of the recipe.
          eval_checkpoint: True: the newest model of the run; False: the model from which it starts; or the path of a
            checkpoint. None: the model that this Trainer has trained; before that, the one from which it starts.

        Returns:
          `loss`, the mean over the tokens that have a loss, in nats; `perplexity`, its exponential; and the metrics
          that the validation of the recipe has.

        Raises:
          UserError: If there is no data or no such model, or if the data are pairs of answers.
        """
        model, dataset = self._choose(eval_checkpoint), self._datasets.get("validation")
        if eval_dataset is not None:
            dataset = names_or_rows(eval_dataset, "eval_dataset")
        if isinstance(dataset, Rows):  # a run may never begin, and its folder may belong to others
            make_writable(folder := cache_folder() / INPUTS)
            dataset = (dataset.file(folder),)
        tables = None if dataset is None else self._sources_to_evaluate(dataset, model)
        recipe = self._recipe_to_evaluate(model, tables)
        if dataset is None and not (recipe.data.validation or recipe.data.validation_fraction):
            raise UserError(
                "there is no validation data",
                "Give eval_dataset, or args with data.validation or data.validation_fraction.",
            )
        sources = None if tables is None else recipe_of(laid_over(LEAST, {"data": {"train": tables}})).data.train
        return evaluate_rows(model if model is self._model else replace(model, compute=recipe.compute), recipe, sources)

    @in_python
    def predict(
        self,
        input_data: str | Sequence[str] | Sequence[Sequence[int]],
        predict_checkpoint: bool | str | Path | None = None,
        *,
        chat: bool = False,
        options: GenerationConfig | None = None,
        **changes: Any,
    ) -> list[Completion]:
        """Generates a continuation of each prompt, or with `chat` the answer to it.

        Args:
          input_data: A prompt, or several: texts or rows of token ids.
          predict_checkpoint: As `eval_checkpoint` of `evaluate`.
          chat: Each prompt is the message of a user, which is rendered with the chat template of the model.
          options: How to generate. None: the defaults of GenerationConfig.
          **changes: Fields of GenerationConfig, as of `Model.generate`.

        Returns:
          One Completion for each prompt, in order.

        Raises:
          UserError: If there is no such model or template, or as for `Model.generate`.
        """
        model = self._choose(predict_checkpoint)
        return model.generate(_chats(input_data, model) if chat else input_data, options, **changes)

    # Training ---------------------------------------------------------------------------

    @property
    def _run(self) -> str:
        """The folder of the run, as it is written in the recipe."""
        if "run" in self._fields:
            return self._fields["run"]
        data = self._datasets.get("train")
        if data is None:
            raise UserError("the run has no folder", "Give one: args={'run': 'runs/NAME'}.")
        model = self._fields.get("init") or self._fields.get("model", {}).get("preset", "model")
        return Request(model=model, data=data if isinstance(data, tuple) else ("rows",), fields=self._fields).run

    def _check_start(self) -> None:
        """Raises UserError if training has nothing to start from, or would start in a worker of a run."""
        refuse_unguarded()
        self._check_model()

    def _check_model(self) -> None:
        if not self._fields.keys() & {"init", "model"}:
            raise UserError("there is no model", "Give a preset or a checkpoint as model, or init or model in args.")

    def _train(self, recipe: Recipe, from_step: int | None) -> TrainResult:
        self._loaded = None  # its memory is needed
        with fail_together(lambda error: error if isinstance(error, UserError) else None):
            outcome = run(recipe, from_step, self._callbacks)
        self._result = TrainResult(outcome.folder, outcome.steps, outcome.finished, outcome.saved, recipe.mesh)
        return self._result

    def _saved_model(self) -> dict[str, str]:
        """The field `init` of a model in memory, which is saved in the folder of the run, under a name of its content.

        So a run is resumed from the same model, and refuses another one.
        """
        if self._model is None:
            return {}
        run = Path(expand_home(self._run))
        broadcast_from_main(lambda: check_is_own(run))
        checksums, _ = checksum_arrays(self._model.params)
        tokenizer = self._model.tokenizer and self._model.tokenizer.fingerprint
        about = hashlib.sha256(repr((self._model.config, checksums, tokenizer)).encode()).hexdigest()
        folder = run / INPUTS / f"model-{about[:16]}"
        if not broadcast_from_main(folder.exists):
            self._model.save(folder)
        return {"init": str(folder)}

    # Data -------------------------------------------------------------------------------

    def _names(self) -> dict[str, tuple[str, ...]]:
        """The names of the files to train on, by split; rows are written to the folder of the run."""
        folder = Path(expand_home(self._run))

        def write() -> list[str]:
            check_is_own(folder)
            return [rows.file(folder / INPUTS) for rows in self._datasets.values() if isinstance(rows, Rows)]

        written = iter(broadcast_from_main(write))
        return {
            split: dataset if isinstance(dataset, tuple) else (next(written),)
            for split, dataset in self._datasets.items()
        }

    def _sources(self, names: Sequence[str], model: Model | None = None) -> list[dict[str, Any]]:
        """The tables of the sources that read files; chat templates are chosen if a `model` is given that has none."""
        options = detected_options(names, self._options, "dpo" in self._fields)
        if model is not None and model.tokenizer is not None:
            for _ in choose_templates(options, model.tokenizer, "the model"):
                pass
        return as_sources(names, options)

    def _sources_to_evaluate(self, names: Sequence[str], model: Model) -> list[dict[str, Any]]:
        """As `_sources`; raises UserError if they hold pairs of answers, of which the preference is not evaluated."""
        try:
            tables = self._sources(names, model)
        except UserError as error:
            if "pairs of a chosen and a rejected answer" not in error.problem:
                raise
            raise pairs_error(", ".join(names)) from error
        if any(table["kind"] == "preference" for table in tables):
            raise pairs_error(", ".join(names))
        return tables

    def _recipe_to_evaluate(self, model: Model, sources: Sequence[Mapping[str, Any]] | None) -> Recipe:
        """The recipe of the run; before it has begun, one of the given fields, with defaults for the others."""
        if (kept := self._kept()) is not None:
            return kept
        at_once = data_parallel_size(model.mesh)
        data: dict[str, Any] = {"sequence_length": min(2048, model.config.max_length)}
        data["batch_size"] = at_once * max(1, ROWS // at_once)
        if sources is not None:
            data |= {"train": sources, "validation": sources}
            if "validation_fraction" in self._fields.get("data", {}):
                del data["validation"]
        return recipe_of(laid_over(laid_over(LEAST, {"data": data}), self._fields))

    # Models -----------------------------------------------------------------------------

    def _kept(self) -> Recipe | None:
        """The recipe of the run; None if it has no checkpoint."""
        if self._result is not None:
            return kept_recipe(self._result.folder)
        named = "run" in self._fields or "train" in self._datasets
        return kept_recipe(Path(expand_home(self._run))) if named else None

    def _choose(self, checkpoint: bool | str | Path | None) -> Model:
        """The model that an argument `eval_checkpoint` or `predict_checkpoint` means."""
        refuse_unguarded()
        if isinstance(checkpoint, str | Path):
            return self._load(checkpoint)
        if not isinstance(checkpoint, bool | None):
            raise UserError(
                f"{checkpoint!r:.80} is not a checkpoint",
                "Give True, False or a path. Options of generation are given by name: options=GenerationConfig(...).",
            )
        if checkpoint or (checkpoint is None and self._result is not None):
            if self._kept() is None:
                raise UserError("there is no trained model yet", "Call train or finetune first.")
            return self._load(expand_home(self._run) if self._result is None else self._result.folder)
        if self._model is not None:
            return self._model
        self._check_model()
        if "init" not in self._fields:
            raise UserError(
                "the model has random values before it is trained",
                "Call train first. With True as the checkpoint, the model of an earlier run in the folder is used.",
            )
        names = self._fields.keys() & {"init", "init_ignore", "model", "tokenizer"}
        start = recipe_of(laid_over(LEAST, {name: self._fields[name] for name in names}))
        assert start.init is not None, "it is among the fields"
        return self._load(start.init, config=start.model, ignore=start.init_ignore, tokenizer=start.tokenizer)

    def _load(self, path: str | Path, **options: Any) -> Model:
        """Loads a checkpoint on the devices of the recipe. The last one is kept until a run has another step."""
        key = str(path), steps_in(Path(path) / STEPS)
        if self._loaded is None or self._loaded[0] != key:
            self._loaded = None
            about = {"mesh": self._fields["mesh"]} if "mesh" in self._fields else {}
            mesh = recipe_of(laid_over(LEAST, about)).mesh if self._result is None else self._result.mesh
            self._loaded = key, load(path, mesh=mesh, **options)
        return self._loaded[1]


def _chats(prompts: str | Sequence[Any], model: Model) -> list[list[int]]:
    """The tokens of chats that consist of the message of a user, with the start of the assistant's turn."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if other := next((text for text in texts if not isinstance(text, str)), None):
        raise UserError(f"with chat, {other!r:.60} is not a text", "Give the messages of users as texts.")
    if model.tokenizer is None or "default" not in model.tokenizer.chat_templates:
        raise UserError(
            "the model has no chat template", "Leave out chat, and write prompts as the texts that it was trained on."
        )
    return load_template(None, model.tokenizer).encode_questions(texts, model.tokenizer)
