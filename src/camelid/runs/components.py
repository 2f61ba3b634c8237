"""What a run consists of: model, tokenizer and text, from the recipe, or from the folder of a run that is resumed."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from camelid.checkpoint.adapters.lora import AdaptedCheckpoint
from camelid.checkpoint.adapters.trained import read_run_adapter
from camelid.checkpoint.checkpoint import Checkpoint, companions_in
from camelid.checkpoint.formats import hf
from camelid.checkpoint.formats.config_source import read_model_config
from camelid.checkpoint.formats.hf_config import config_to_hf
from camelid.checkpoint.registry import open_checkpoint
from camelid.data.config import Source
from camelid.data.preparation.store import Store, is_store
from camelid.data.readers.sources import source_files
from camelid.data.rows.batch import Batch, PairBatch
from camelid.data.rows.loader import Loader
from camelid.data.rows.stores import Split, mark_used
from camelid.disk.json_files import hf_json
from camelid.errors import UserError
from camelid.model.adapters import LoRAPlan, declare_adapters
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.parallel.hosts import is_main, main_first
from camelid.parallel.rules import check_divides
from camelid.runs.file_names import FILES
from camelid.runs.lora import base_of, check_continues, is_gone
from camelid.runs.lora_targets import plan_adapters
from camelid.runs.recipe import Recipe
from camelid.runs.run_folder import Data, kept_data
from camelid.runs.samples import encode_prompts
from camelid.text.chat import load_template
from camelid.text.templates import NAMED
from camelid.text.tokenizer import CHAT_TEMPLATE, Tokenizer, load_tokenizer, vocabulary_notes
from camelid.train.loggers import tokenizing
from camelid.train.objective import NextTokenLoss, Objective
from camelid.train.optimizer import make_optimizer
from camelid.train.preference import DPOLoss
from camelid.train.schedules import learning_rate
from camelid.train.step import TrainStep
from camelid.train.trackers import check_installed
from camelid.train.trainable import make_mask


@dataclass(frozen=True)
class Components:
    """What a run consists of, read and checked before anything is written."""

    recipe: Recipe
    source: Checkpoint | None
    """the checkpoint `init`; None for new parameters, and for a run that resumes from its own checkpoints, unless it
    trains an adapter of `init`"""
    inherited: Sequence[Path]
    """the files of `init`, apart from its tokenizer, that are copied with a model"""
    config: ModelConfig
    tokenizer: Tokenizer
    loader: Loader
    validation: Loader | None
    step: TrainStep
    lora: LoRAPlan | None = None
    """the adapters that are trained; None if all parameters are"""
    notes: tuple[str, ...] = ()
    prompts: Sequence[Sequence[int]] = ()
    """the token ids of the prompts that are completed in the course of training"""

    @property
    def precomputes_reference(self) -> bool:
        """Whether the rows have the log-probabilities of the reference of a preference loss, as PairBatch.

        New adapters need none: their base is the reference, also while they are trained.
        """
        new_adapters = self.lora is not None and not isinstance(self.source, AdaptedCheckpoint)
        return self.recipe.dpo is not None and not new_adapters

    @property
    def batch_kind(self) -> type[Batch]:
        """The type of the batches that the step receives."""
        return PairBatch if self.precomputes_reference else Batch

    @property
    def companions(self) -> dict[str, Path]:
        """The files that are copied with the model, by name."""
        return {file.name: file for file in [*self.inherited, *self.tokenizer.files]}

    @property
    def files(self) -> dict[str, bytes]:
        """The content of all files of a checkpoint but its weights, by name."""
        config = hf_json(config_to_hf(self.config, self.recipe.compute.param_dtype)).encode()
        template = {} if self.chat_template is None else {CHAT_TEMPLATE: self.chat_template.encode()}
        inherited = {name: file.read_bytes() for name, file in self.companions.items()}
        return {**inherited, **template, "config.json": config}

    @property
    def chat_template(self) -> str | None:
        """The chat template of the training data; None if there are several, or it is the tokenizer's default."""
        names = set().union(*(packing.store.templates for packing in self.loader.packings))
        name = names.pop() if len(names) == 1 else None
        return load_template(name, self.tokenizer).text if name in (*NAMED, *self.tokenizer.chat_templates) else None

    @property
    def data(self) -> Data:
        """The stores that batches are read from, and the files of text that exist."""
        loaders = {"train": self.loader} | ({} if self.validation is None else {"validation": self.validation})
        stores = {
            split: [
                {
                    "folder": str(store.folder),
                    "fingerprint": store.fingerprint,
                    "sources": store.sources,
                    "row_order": order,
                }
                for store, order in zip(loader.stores, loader.mixture.row_orders, strict=True)
            ]
            for split, loader in loaders.items()
        }
        return stores | {FILES: _text_files(_sources(self.recipe))}


def build_components(recipe: Recipe, mesh: Mesh, started: bool = False) -> Components:
    """Opens and checks everything that a recipe names; writes nothing but prepared text in the cache.

    A run that has `started` needs only its own folder, and its text or the stores that were prepared from it. Raises
    UserError for what is missing, damaged or does not fit together.
    """
    source, config, inherited = _model(recipe, started)
    if source is not None and recipe.init_optimizer and not started:
        _check_training(source, recipe)
    tokenizer = _tokenizer(recipe, started, source)
    check_divides(config.axis_sizes, mesh, recipe.compute.replicate)
    hf.table_of(config)  # a model that could not be saved is not trained
    if recipe.data.sequence_length > config.max_length:
        raise UserError(
            f"data.sequence_length = {recipe.data.sequence_length} exceeds the context of {config.max_length}",
            "Use shorter rows.",
        )
    plan = None if recipe.lora is None else plan_adapters(recipe.lora, config)
    if plan is not None and isinstance(source, AdaptedCheckpoint) and not started:
        check_continues(recipe, source, plan)
    for name in recipe.train.trackers:
        check_installed(name)
    progress = tokenizing() if is_main() else None
    stores, gone = _kept_stores(recipe, tokenizer) if started else ({}, None)
    notes = () if source is None else source.notes
    if gone is not None:
        notes = (*notes, f"{gone} no longer exists; the tokens that were prepared from it are used")

    def loader(split: Split) -> Loader:
        created = Loader(recipe.data, tokenizer, split, progress, stores.get(split))
        created.check_ids(config.vocab_size)
        _check_pairs(created, recipe)
        return created

    validates = bool(recipe.data.validation or recipe.data.validation_fraction)
    with main_first("data"):
        train, validation = loader("train"), loader("validation") if validates else None
    notes = (*notes, *tokenizer.notes, *vocabulary_notes(tokenizer, config.vocab_size), *train.notes)
    if validation is not None and validation.pairs:
        notes = (*notes, *validation.notes)
    prompts = () if recipe.samples is None else encode_prompts(recipe.samples, config, tokenizer, train.stores)
    step = _train_step(recipe, config, plan)
    return Components(recipe, source, inherited, config, tokenizer, train, validation, step, plan, notes, prompts)


def _model(recipe: Recipe, started: bool) -> tuple[Checkpoint | None, ModelConfig, Sequence[Path]]:
    """The checkpoint that training starts from, the model, and the files that are copied with it."""
    if recipe.init is None:
        assert recipe.model is not None, "a Recipe has init or model"
        return None, recipe.model, ()
    folder = Path(recipe.run)
    # Runs that an older camelid started have no config.json; those that train an adapter need the base again.
    if started and recipe.lora is None and (folder / "config.json").is_file():
        return None, read_model_config(folder), companions_in(folder)
    about = read_run_adapter(folder) if started and recipe.lora is not None else None
    # An adapter that `init` continued from is not needed again; a base that was moved is found by `init`.
    init = recipe.init if about is None or is_gone(about.base) else about.base
    source = open_checkpoint(init, config=recipe.model, ignore=recipe.init_ignore)
    return source, (source if recipe.lora is None else base_of(source)).config, source.other_companions


def _tokenizer(recipe: Recipe, started: bool, source: Checkpoint | None) -> Tokenizer:
    """The tokenizer that the recipe names, or that of `init`; for a run that has started, the copy in its folder."""
    if recipe.tokenizer is not None and (not started or Path(recipe.tokenizer).exists()):
        return load_tokenizer(recipe.tokenizer)
    if source is not None:
        return load_tokenizer(source.tokenizer_folder)
    folder = Path(recipe.run)
    copy = folder / Path(recipe.tokenizer or "").name  # if the recipe names a file
    tokenizer = load_tokenizer(copy if copy.is_file() else folder)
    # In the folder of the run, the one template that the data use is the default, also if the tokenizer of the recipe
    # has it under a name.
    names = {source.template for source in recipe.data.train} - {None, *NAMED, *tokenizer.chat_templates}
    if len(names) == 1 and "default" in tokenizer.chat_templates:
        templates = tokenizer.chat_templates | {names.pop(): tokenizer.chat_templates["default"]}
        tokenizer = replace(tokenizer, chat_templates=templates)
    return tokenizer


def _kept_stores(recipe: Recipe, tokenizer: Tokenizer) -> tuple[Mapping[str, Sequence[Store]], str | None]:
    """The stores that the run has been trained on, by split, and the path of a file of text that no longer exists.

    Returns no stores if a file changed or was added, or if the stores no longer exist: then the text is read again.
    """
    kept = kept_data(Path(recipe.run)) or {}
    if FILES not in kept:
        return {}, None  # an older camelid started the run
    before, now = ({file["path"]: file for file in files} for files in (kept[FILES], _text_files(_sources(recipe))))
    if any(before.get(path) != file for path, file in now.items()):
        return {}, None
    splits = [split for split in kept if split != FILES]
    try:
        found = {split: [Store.open(store["folder"]) for store in kept[split]] for split in splits}
    except UserError:
        return {}, None
    for store, was in ((store, was) for split in splits for store, was in zip(found[split], kept[split], strict=True)):
        try:
            store.check_tokenizer(tokenizer.fingerprint, tokenizer.files[0])
        except UserError as error:
            raise UserError(
                f"{recipe.run} was trained on text of another tokenizer than {tokenizer.files[0]}",
                "Put the tokenizer back, of which the folder of the run has a copy, or begin another run.",
            ) from error
        if store.fingerprint != was["fingerprint"]:
            return {}, None
        mark_used(store, recipe.data)
    return found, next((path for path in before if path not in now), None)


def _sources(recipe: Recipe) -> tuple[Source, ...]:
    return (*recipe.data.train, *recipe.data.validation)


def _text_files(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """Path, size and modification time of each file of text that exists; stores are left out."""
    found = []
    for one in (replace(source, files=(name,)) for source in sources for name in source.files):
        with contextlib.suppress(UserError):  # it does not exist
            for path in source_files(one):
                if path.is_file() and not is_store(path.parent):
                    stat = path.stat()
                    found.append({"path": str(path.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns})
    return found


def _check_training(source: Checkpoint, recipe: Recipe) -> None:
    """Raises UserError if `init` has no optimizer state to continue from, or no step is left."""
    if recipe.lora is None and recipe.optimizer.name != "adamw":
        raise UserError(
            f"init_optimizer = true continues with moments of AdamW, and optimizer.name = {recipe.optimizer.name!r}",
            "Leave out init_optimizer, so that only the parameters are used, or use AdamW.",
        )
    step = step_of_init(source, recipe)
    if step is None:
        kind = "" if recipe.lora is None else " for an adapter"
        raise UserError(
            f"init = {recipe.init!r} has no step and no moments of AdamW{kind}",
            "Train states of EasyLM and checkpoints of runs have them; without init_optimizer, training starts at "
            "step 0.",
        )
    if step >= recipe.train.steps:
        raise UserError(
            f"init has already made {step} steps, and the recipe sets train.steps = {recipe.train.steps}",
            f"train.steps includes the steps of init: set it to more than {step}.",
        )


def step_of_init(source: Checkpoint, recipe: Recipe) -> int | None:
    """The step from which `init_optimizer` continues; None if `init` has no optimizer state that the run can use."""
    if recipe.lora is None:
        return None if source.training is None else source.training.step
    # Of all parameters, the moments are of no use.
    return int(source.step.name) if isinstance(source, AdaptedCheckpoint) and source.step is not None else None


def _check_pairs(loader: Loader, recipe: Recipe) -> None:
    """Raises UserError if a prepared store holds pairs of answers and the loss compares none, or the reverse."""
    if loader.pairs and recipe.dpo is None:
        raise UserError(
            f"{loader.stores[0].folder} holds pairs of answers, and the recipe has no loss that compares them",
            "Add a table [dpo], for example with beta = 0.1.",
        )
    if recipe.dpo is not None and not loader.pairs:
        raise UserError(
            f"[dpo] compares pairs of answers, and {loader.stores[0].folder} was not prepared with kind = 'preference'",
            "Use a source of kind = 'preference', or remove [dpo].",
        )


def _objective(recipe: Recipe, config: ModelConfig) -> Objective:
    compute, adapter_dropout = recipe.compute, 0.0 if recipe.lora is None else recipe.lora.dropout
    if recipe.dpo is not None:
        return DPOLoss(
            config=config, compute=compute, dpo=recipe.dpo, dropout=recipe.dropout, adapter_dropout=adapter_dropout
        )
    return NextTokenLoss(
        config=config,
        compute=compute,
        loss=recipe.loss,
        dropout=recipe.dropout,
        adapter_dropout=adapter_dropout,
        accuracy="accuracy" in recipe.train.metrics,
    )


def _train_step(recipe: Recipe, config: ModelConfig, lora: LoRAPlan | None = None) -> TrainStep:
    specs, freeze = declare_decoder(config) if lora is None else declare_adapters(lora, config), recipe.train.freeze
    return TrainStep(
        objective=_objective(recipe, config),
        optimizer=make_optimizer(recipe.optimizer, recipe.train.steps, specs, freeze),
        schedule=learning_rate(recipe.optimizer, recipe.train.steps),
        clip_norm=recipe.optimizer.clip_norm,
        accumulate=recipe.train.accumulate,
        seed=recipe.train.seed,
        ema_decay=None if recipe.ema is None else recipe.ema.decay,
        loss_scale=recipe.loss_scale,
        param_norm="param_norm" in recipe.train.metrics,
        mask=make_mask(freeze, specs),
    )
