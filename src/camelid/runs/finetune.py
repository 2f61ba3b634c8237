"""The recipe that `camelid finetune MODEL DATA...` makes, and how it continues a run that it began."""

import contextlib
import itertools
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camelid.data.config import Source
from camelid.data.detection import detect
from camelid.errors import UserError
from camelid.inputs import expand_home
from camelid.runs.finetune_choices import Chooser
from camelid.runs.recipe import Recipe, laid_over, overridden, recipe_of, write_recipe
from camelid.runs.recipe_differences import table_differences
from camelid.text.templates import NAMED

if TYPE_CHECKING:
    from camelid.text.tokenizer import Tokenizer

TEMPLATES = {"instruct": "alpaca", "chat": "zephyr", "preference": "zephyr"}
"""The chat template of a model that has none; their markers are text that any tokenizer can encode."""
UNNAMED = ("hf", "model", "adapter", "checkpoint", "checkpoints", "final")
"""Names of folders that do not name a model."""
IMPLIED = {"fields": "fields", "text_key": "text"}
"""The kind of a source that has an option of this kind alone."""
ENDINGS = re.compile(r"(\.(jsonl|ndjson|json|csv|tsv|txt|parquet|mindrecord|gz|zst))+$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command was asked to do."""

    model: str
    data: tuple[str, ...]
    """files, globs, and the other names that a source can have"""
    validation: tuple[str, ...] = ()
    """in the same form; if there are none, a part of the data is held out"""
    lora: bool = False
    dpo: bool = False
    out: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    """options of the sources that are given instead of detected: kind, fields, text_key, template, max_unreadable"""
    ignore: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    """fields of the recipe that are given, as tables"""
    overrides: tuple[str, ...] = ()
    """fields of the recipe that are given, as `--a.b value`, which replace those of `fields`"""

    @property
    def given(self) -> dict[str, Any]:
        """The table of the fields that are given, with empty tables [lora] and [dpo] if these are asked for."""
        asked = {name: {} for name in ("lora", "dpo") if getattr(self, name)}
        return overridden(laid_over(asked, self.fields), self.overrides)

    @property
    def run(self) -> str:
        """The folder of the run, which by default is named after the model, the data and the method."""
        return self.out or str(Path("runs", self._name()))

    def _name(self) -> str:
        model = [part for part in re.split(r"[/\\]|::", self.model) if part.strip(".")]
        while len(model) > 1 and model[-1].lower() in UNNAMED:
            model.pop()
        first = Path(self.data[0])
        data = ENDINGS.sub("", first.name)
        if not re.search(r"\w", data):  # a glob such as *.jsonl
            data = first.parent.name
        more = [f"{len(self.data) - 1} more"] if len(self.data) > 1 else []
        words = [*model[-1:], data, *more, *(name for name in ("lora", "dpo") if name in self.given)]
        return "-".join(filter(None, (re.sub(r"[^\w.-]+", "_", word).strip("_.-") for word in words)))


@dataclass(frozen=True)
class Plan:
    """The recipe for a request."""

    table: Mapping[str, Any]
    """the fields that were chosen or given; the others have their defaults"""
    recipe: Recipe
    notes: tuple[str, ...] = ()
    resumes: bool = False
    """whether the recipe is the one that a run in the folder began with"""


def make_plan(request: Request) -> Plan:
    """Returns the recipe for a request; the text is tokenized for it, and is then in the cache for training.

    If the folder of the run has a run of the same model, data and method, the recipe is the one that it began with, so
    that the same command resumes it, also on other devices. Raises UserError for data whose kind cannot be detected,
    for a folder with another run, and for fields that do not fit.
    """
    from camelid.runs.run_folder import kept_recipe

    folder = Path(expand_home(request.run))
    kept = kept_recipe(folder)
    if kept is not None:
        _check_kept(kept, request, folder)
        table, notes = tomllib.loads(write_recipe(kept)), ()
    else:
        table, notes = _new_table(request)
    # The choices are made around what is given, which is laid over them here, where mistakes name the option.
    table = laid_over(table, request.fields)
    return Plan(
        overridden(table, request.overrides), recipe_of(table, request.overrides), tuple(notes), kept is not None
    )


def _check_kept(kept: Recipe, request: Request, folder: Path) -> None:
    """Raises UserError if a run is not one of this model, data and method."""
    given = request.given
    there: dict[str, Any] = {"init": kept.init}
    here: dict[str, Any] = {"init": expand_home(request.model).rstrip("/") or "/"}
    there["data"] = {"train": {"files": _files(kept.data.train)}}
    here["data"] = {"train": {"files": sorted(map(expand_home, request.data))}}
    if request.validation:
        there["data"]["validation"] = {"files": _files(kept.data.validation)}
        here["data"]["validation"] = {"files": sorted(map(expand_home, request.validation))}
    kinds = ("lora", "dpo")
    there |= {name: {} for name in kinds if getattr(kept, name) is not None}
    here |= {name: {} for name in kinds if name in given}
    for source in kept.data.train:
        read = {name: getattr(source, name) for name in request.options}
        found = table_differences({**there, "data.train": read}, {**here, "data.train": dict(request.options)})
        if found:
            raise UserError(
                f"{folder} has a run with another recipe: {next(iter(found.values()))}",
                "Choose another --out for a new run, or repeat the command that began this one.",
            )


def _files(sources: Sequence[Source]) -> list[str]:
    return sorted(name for source in sources for name in source.files)


# A new recipe -------------------------------------------------------------------------------


def _new_table(request: Request) -> tuple[dict[str, Any], list[str]]:
    """The fields of a recipe that are chosen for a request, and notes on what was assumed."""
    from camelid.checkpoint.registry import open_checkpoint
    from camelid.text.tokenizer import load_tokenizer

    given = request.given
    if "train" in given.get("data", {}):
        raise UserError(
            "data.train is set by the arguments after MODEL",
            "Name the files there; --kind, --fields, --text-key and --template set how they are read.",
        )
    names = {"train": request.data} | ({"validation": request.validation} if request.validation else {})
    options = {split: detected_options(names[split], request.options, "dpo" in given) for split in names}
    table: dict[str, Any] = {"run": request.run, "init": request.model}
    if request.ignore:
        table["init_ignore"] = list(request.ignore)
    asked = {name: given[name] for name in ("lora", "dpo") if name in given}
    least = {split: as_sources(names[split], options[split]) for split in names}
    least_table = table | asked | {"data": least | {"sequence_length": 1, "batch_size": 1}, "train": {"steps": 1}}
    # What is given is checked before the model is opened and choices are made around it.
    recipe_of(laid_over(least_table, request.fields), request.overrides)
    source = open_checkpoint(request.model, ignore=request.ignore)
    tokenizer = load_tokenizer(source.tokenizer_folder)
    notes = [] if "dpo" in given or request.options.keys() & {"kind", *IMPLIED} else list(_ignored_pairs(request.data))
    notes += choose_templates(itertools.chain(*options.values()), tokenizer, request.model)
    data = {split: as_sources(names[split], options[split]) for split in names}
    train = data.pop("train")
    chosen = Chooser(source.config, tokenizer, laid_over(given, {"data": data}), notes).tables(train)
    return laid_over(table | chosen, {"data": data}), notes


def detected_options(names: Sequence[str], given: Mapping[str, Any], dpo: bool) -> list[dict[str, Any]]:
    """The options of the sources that read the names: those given, and the kind that is detected if it is not given."""
    return [_options(name, dict(given), dpo) for name in names]


def _options(name: str, given: dict[str, Any], dpo: bool) -> dict[str, Any]:
    kind = given.pop("kind", None) or next((kind for key, kind in IMPLIED.items() if key in given), None)
    found = detect(name, dpo) if kind is None else {"kind": kind}
    if dpo and found["kind"] not in ("preference", "tokens"):
        raise UserError(
            f"--dpo compares pairs of answers, and {name} is read as kind {found['kind']!r}",
            "Leave out --dpo, or give records with the keys prompt, chosen and rejected.",
        )
    return found | given


def _ignored_pairs(names: Iterable[str]) -> Iterator[str]:
    """A note on each name whose records have pairs of answers beside what they are detected as."""
    for name in names:
        with contextlib.suppress(UserError):  # most data hold no pairs
            if detect(name, preference=True)["kind"] == "preference":
                kind = detect(name)["kind"]
                yield f"{name} is read as kind {kind!r}: its keys chosen and rejected are ignored; --dpo trains on them"


def choose_templates(options: Iterable[dict[str, Any]], tokenizer: "Tokenizer", model: str) -> Iterator[str]:
    """Sets the template of sources that need one, if the model has none; yields notes on the choice.

    A template of camelid's that the model has as its own, because a run wrote it, is set by its name, which also says
    how the input of an instruction is written.
    """
    needing = [each for each in options if each["kind"] in TEMPLATES and "template" not in each]
    if (own := tokenizer.chat_templates.get("default")) is not None:
        if (name := next((name for name, named in NAMED.items() if named.text == own), None)) is not None:
            for each in needing:
                each["template"] = name
        return
    for each in needing:
        each["template"] = TEMPLATES[each["kind"]]
    for name in sorted({each["template"] for each in needing}):
        yield f"{model} has no chat template: {name!r} is used; --template chooses another"


def as_sources(names: Sequence[str], options: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sources that read the names; those with the same options are one."""
    files: dict[str, list[str]] = {}
    of: dict[str, dict[str, Any]] = {}
    for name, each in zip(names, options, strict=True):
        key = repr(sorted(each.items()))
        files.setdefault(key, []).append(name)
        of[key] = each
    return [{"files": found[0] if len(found) == 1 else found, **of[key]} for key, found in files.items()]
