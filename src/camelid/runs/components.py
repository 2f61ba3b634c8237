"""What a run is made of: model, tokenizer and text, from the recipe or from the folder of a run that goes on."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from camelid.checkpoint.checkpoint import Checkpoint, companions_in
from camelid.checkpoint.formats import hf
from camelid.checkpoint.formats.config_source import read_model_config
from camelid.checkpoint.formats.hf_config import config_to_hf
from camelid.checkpoint.registry import open_checkpoint
from camelid.data.config import Source
from camelid.data.preparation.store import Store, is_store
from camelid.data.readers.sources import source_files
from camelid.data.rows.loader import Loader
from camelid.data.rows.stores import Split, mark_used
from camelid.disk.json_files import hf_json
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import map_specs
from camelid.parallel.hosts import is_main, main_first
from camelid.parallel.rules import check_divides
from camelid.runs.recipe import Recipe
from camelid.runs.resume import FILES, Data, kept_data
from camelid.text.chat import load_template
from camelid.text.templates import NAMED
from camelid.text.tokenizer import CHAT_TEMPLATE, Tokenizer, load_tokenizer, vocabulary_notes
from camelid.train.loggers import tokenizing
from camelid.train.optimizer import learning_rate, make_optimizer
from camelid.train.step import Trainer
from camelid.train.trackers import check_installed


@dataclass(frozen=True)
class Parts:
    """What a run is made of, read and checked before anything is written."""

    source: Checkpoint | None
    """where the parameters come from; None where they are fresh, or those of the run's own checkpoints"""
    inherited: Sequence[Path]
    """the files that go wherever the model of `init` goes"""
    config: ModelConfig
    tokenizer: Tokenizer
    loader: Loader
    validation: Loader | None
    trainer: Trainer
    notes: tuple[str, ...] = ()

    @property
    def companions(self) -> dict[str, Path]:
        """By name: the files that go wherever the model goes."""
        return {file.name: file for file in [*self.inherited, *self.tokenizer.files]}

    @property
    def files(self) -> dict[str, bytes]:
        """By name: all of a checkpoint but its numbers."""
        config = hf_json(config_to_hf(self.config, self.trainer.compute.param_dtype)).encode()
        template = {} if self.chat_template is None else {CHAT_TEMPLATE: self.chat_template.encode()}
        inherited = {name: file.read_bytes() for name, file in self.companions.items()}
        return {**inherited, **template, "config.json": config}

    @property
    def chat_template(self) -> str | None:
        """The template that the model learns to answer in, where it is not what its tokenizer comes with."""
        names = set().union(*(packing.store.templates for packing in self.loader.packings))
        name = names.pop() if len(names) == 1 else None
        return load_template(name, self.tokenizer).text if name in (*NAMED, *self.tokenizer.chat_templates) else None

    @property
    def data(self) -> Data:
        """What the batches are made of, and the files of text that were there."""
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
        config = self.loader.config
        return stores | {FILES: _text_files((*config.train, *config.validation))}


def prepare(recipe: Recipe, mesh: Mesh, begun: bool = False) -> Parts:
    """Opens and checks everything that a recipe names, and writes nothing but prepared text in the cache.

    A run that has `begun` needs nothing but its own folder, and the text or the stores that were prepared from it.
    Raises UserError for what is missing, damaged or does not fit together.
    """
    source, config, inherited = _model(recipe, begun)
    if source is not None and recipe.init_optimizer and not begun:
        _check_training(source, recipe)
    tokenizer = _tokenizer(recipe, begun, source)
    check_divides(config.axis_sizes, mesh, recipe.compute.replicate)
    hf.table_of(config)  # what could not be saved is not trained
    if recipe.data.sequence_length > config.max_length:
        raise UserError(
            f"data.sequence_length = {recipe.data.sequence_length} exceeds the context of {config.max_length}",
            "Use shorter rows.",
        )
    if any(text.kind == "preference" for text in _texts(recipe)):
        raise UserError(
            "kind = 'preference' is not trained on: that needs a loss that compares the two answers",
            "`camelid data prepare` and `inspect` take it; to imitate the good answers, give them as kind = 'chat'.",
        )
    for name in recipe.train.trackers:
        check_installed(name)
    progress = tokenizing() if is_main() else None
    stores, gone = _kept_stores(recipe, tokenizer) if begun else ({}, None)
    notes = () if source is None else source.notes
    if gone is not None:
        notes = (*notes, f"{gone} is gone; the run goes on with the tokens that were prepared from it")

    def loader(split: Split) -> Loader:
        made = Loader(recipe.data, tokenizer, split, progress, stores.get(split))
        made.check_ids(config.vocab_size)
        return made

    with main_first("data"):
        train, validation = loader("train"), loader("validation") if _validates(recipe) else None
    notes = (*notes, *tokenizer.notes, *vocabulary_notes(tokenizer, config.vocab_size), *train.notes)
    return Parts(source, inherited, config, tokenizer, train, validation, _trainer(recipe, config), notes)


def _model(recipe: Recipe, begun: bool) -> tuple[Checkpoint | None, ModelConfig, Sequence[Path]]:
    """The checkpoint that training begins from, the model, and the files that go with it."""
    if recipe.init is None:
        assert recipe.model is not None, "a Recipe has init or model"
        return None, recipe.model, ()
    folder = Path(recipe.run)
    if begun and (folder / "config.json").is_file():  # not of a run that an older camelid began
        return None, read_model_config(folder), companions_in(folder)
    source = open_checkpoint(recipe.init, config=recipe.model, ignore=recipe.init_ignore)
    return source, source.config, source.other_companions


def _tokenizer(recipe: Recipe, begun: bool, source: Checkpoint | None) -> Tokenizer:
    """The tokenizer that the recipe names, or that of `init`; of a run that has begun, the copy in its folder."""
    if recipe.tokenizer is not None and (not begun or Path(recipe.tokenizer).exists()):
        return load_tokenizer(recipe.tokenizer)
    if source is not None:
        return load_tokenizer(source.tokenizer_folder)
    folder = Path(recipe.run)
    copy = folder / Path(recipe.tokenizer or "").name  # where the recipe names a file
    tokenizer = load_tokenizer(copy if copy.is_file() else folder)
    # A template that the tokenizer has under a name is the default of the folder, where the model learns no other.
    names = {text.template for text in recipe.data.train} - {None, *NAMED, *tokenizer.chat_templates}
    if len(names) == 1 and "default" in tokenizer.chat_templates:
        templates = tokenizer.chat_templates | {names.pop(): tokenizer.chat_templates["default"]}
        tokenizer = replace(tokenizer, chat_templates=templates)
    return tokenizer


def _kept_stores(recipe: Recipe, tokenizer: Tokenizer) -> tuple[Mapping[str, Sequence[Store]], str | None]:
    """The stores that a run was trained on so far, and a file of its text that is gone.

    They are taken where the text is as it was, as far as it is still there, so that nothing is tokenized again. Returns
    no stores where a file changed or came, or the stores are gone too: then the text decides.
    """
    kept = kept_data(Path(recipe.run)) or {}
    if FILES not in kept:
        return {}, None  # an older camelid began the run
    before, now = ({file["path"]: file for file in files} for files in (kept[FILES], _text_files(_texts(recipe))))
    if any(before.get(path) != file for path, file in now.items()):
        return {}, None
    splits = [split for split in kept if split != FILES]
    try:
        found = {split: [Store.open(store["folder"]) for store in kept[split]] for split in splits}
    except UserError:
        return {}, None
    for store, was in ((store, was) for split in splits for store, was in zip(found[split], kept[split], strict=True)):
        store.check_tokenizer(tokenizer.fingerprint, tokenizer.files[0])
        if store.fingerprint != was["fingerprint"]:
            return {}, None
        mark_used(store, recipe.data)
    return found, next((path for path in before if path not in now), None)


def _texts(recipe: Recipe) -> tuple[Source, ...]:
    return (*recipe.data.train, *recipe.data.validation)


def _text_files(sources: Sequence[Source]) -> list[dict[str, Any]]:
    """The files of text that are there, stores left out: path, size, and time of the last change."""
    found = []
    for one in (replace(source, files=(name,)) for source in sources for name in source.files):
        with contextlib.suppress(UserError):  # what is not there
            for path in source_files(one):
                if path.is_file() and not is_store(path.parent):
                    stat = path.stat()
                    found.append({"path": str(path.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns})
    return found


def _validates(recipe: Recipe) -> bool:
    return bool(recipe.data.validation or recipe.data.validation_fraction)


def _check_training(source: Checkpoint, recipe: Recipe) -> None:
    """Raises UserError where there is nothing to go on from, or no step to make."""
    if source.training is None:
        raise UserError(
            f"init = {recipe.init!r} holds no step and no moments of AdamW",
            "Train states of EasyLM and runs' checkpoints do; without init_optimizer, training begins at step 0.",
        )
    if (made := source.training.step) >= recipe.train.steps:
        raise UserError(
            f"init has made {made} steps already, the recipe asks for {recipe.train.steps}",
            "train.steps counts them too: ask for more.",
        )


def _trainer(recipe: Recipe, config: ModelConfig) -> Trainer:
    specs = declare_decoder(config)
    steps = recipe.train.steps
    return Trainer(
        config,
        recipe.compute,
        make_optimizer(recipe.optimizer, steps, map_specs(lambda spec: spec.is_matrix, specs)),
        learning_rate(recipe.optimizer, steps),
        recipe.optimizer.clip_norm,
        recipe.train.accumulate,
    )
