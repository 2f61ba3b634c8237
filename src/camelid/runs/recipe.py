"""Recipes: the description of a training run, as strict TOML with dotted overrides."""

import builtins
import collections.abc
import copy
import dataclasses
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import cattrs

from camelid.data.config import DataConfig, Source
from camelid.errors import UserError
from camelid.inputs import expand_home, named_path, read_text
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.presets import preset
from camelid.parallel.mesh import MeshConfig
from camelid.runs.renamed import renamed_advice
from camelid.runs.suggestions import as_option, suggest
from camelid.train.config import (
    CheckpointConfig,
    DPOConfig,
    DropoutConfig,
    EmaConfig,
    LossConfig,
    LossScaleConfig,
    ProfileConfig,
    SamplesConfig,
    TrainConfig,
)
from camelid.train.lora_config import LoRAConfig
from camelid.train.optimizer_config import OptimizerConfig

PRESET = "preset"  # in [model]: the name of a model whose fields are the defaults of the others


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run, which starts from the checkpoint `init`, or from scratch with `model` and `tokenizer`.

    With both `init` and `model`, `model` describes the checkpoint, in place of what its files specify.
    """

    run: str
    """folder of the run, for recipe, metrics, checkpoints and the final model"""
    init: str | None = None
    """checkpoint to start from, in any format, or its name on the Hugging Face Hub: model, tokenizer and parameters"""
    init_ignore: tuple[str, ...] = ()
    """fields of its config.json to ignore, such as "rope_scaling.alpha\""""
    init_optimizer: bool = False
    """also continue from its step and AdamW moments, which train states of EasyLM and folders of runs have"""
    model: ModelConfig | None = None
    tokenizer: str | None = None
    """folder with tokenizer.json or tokenizer.model; default: the tokenizer of `init`"""
    data: DataConfig
    train: TrainConfig
    loss: LossConfig = LossConfig()
    dpo: DPOConfig | None = None
    """train on pairs of answers, of sources of kind = "preference", by direct preference optimization"""
    dropout: DropoutConfig = DropoutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoRAConfig | None = None
    """adapters that are trained instead of all parameters; without the table, all parameters are trained"""
    ema: EmaConfig | None = None
    """a moving average of the parameters; None: none is kept"""
    loss_scale: LossScaleConfig | None = None
    """loss scaling, which only compute.dtype = "float16" has and needs; None: its defaults"""
    checkpoint: CheckpointConfig = CheckpointConfig()
    samples: SamplesConfig | None = None
    """prompts that are completed in the course of training; None: none are"""
    profile: ProfileConfig | None = None
    """steps that are traced by JAX's profiler, in profile/; None: none are"""
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        for name in ("run", "init", "tokenizer"):
            if (path := getattr(self, name)) is not None:
                named_path(path)  # raises UserError for an empty path
                object.__setattr__(self, name, expand_home(path).rstrip("/") or "/")
        if self.init is None and self.model is None:
            raise UserError(
                "the recipe has neither init nor model",
                "Set init to a checkpoint to finetune it, or add a [model] table to train from scratch.",
            )
        if self.init is None and self.init_optimizer:
            raise UserError(
                "the recipe has init_optimizer and no init",
                "Set init to a train state of EasyLM or to the folder of a run.",
            )
        if self.init is None and self.lora is not None:
            raise UserError(
                "the recipe has [lora] and no init",
                "Set init to the checkpoint whose parameters stay as they are, or remove [lora] to train from scratch.",
            )
        if self.init is None and self.tokenizer is None:
            raise UserError("the recipe has a model and no tokenizer", "Set tokenizer to a folder with tokenizer.json.")
        self._check_preference()
        if self.train.keep_best and not (self.data.validation or self.data.validation_fraction):
            raise UserError(
                "train.keep_best = true compares validation losses, and the recipe has no validation data",
                "Set data.validation or data.validation_fraction.",
            )
        self._check_export()
        if self.profile is not None and self.profile.first_step > self.train.steps:
            raise UserError(
                f"profile.first_step = {self.profile.first_step} exceeds train.steps = {self.train.steps}",
                "Choose a step of the run.",
            )
        if self.compute.param_dtype != "float32":
            raise UserError(
                f"compute.param_dtype = {self.compute.param_dtype!r} loses updates in training: most are smaller than "
                "the rounding error of a 16-bit parameter",
                "Leave it out, so that parameters are float32. compute.dtype = 'bfloat16' multiplies in 16 bits.",
            )
        if self.compute.dtype == "float16":
            object.__setattr__(self, "loss_scale", self.loss_scale or LossScaleConfig())
        elif self.loss_scale is not None:
            raise UserError(
                f"the recipe has a loss_scale and compute.dtype = {self.compute.dtype!r}",
                "Only float16 needs loss scaling: remove the table, or set compute.dtype = 'float16'.",
            )

    def _check_export(self) -> None:
        """Raises UserError if no milestone is written in the form that `checkpoint.export` names."""
        if (form := self.checkpoint.export) is None:
            return
        if self.train.milestones_every is None:
            raise UserError(
                f"checkpoint.export = {form!r} writes milestones, and the recipe has none",
                "Set train.milestones_every, for example to 1000.",
            )
        if self.lora is not None and not self.lora.merge and form != "hf":
            raise UserError(
                f"checkpoint.export = {form!r} writes entire models, and [lora] trains an adapter, which has PEFT's "
                "form",
                "Set checkpoint.export = 'hf' for adapters, or lora.merge = true for models.",
            )

    def _check_preference(self) -> None:
        """Raises UserError if the kinds of the sources do not fit the loss; stores are checked when they are opened."""
        kinds = {source.kind for source in (*self.data.train, *self.data.validation)}
        if self.dpo is None:
            if "preference" in kinds:
                raise UserError(
                    "kind = 'preference' holds pairs of answers, and the recipe has no loss that compares them",
                    "Add a table [dpo], for example with beta = 0.1. To train on the chosen answers alone, use "
                    "kind = 'fields' and fields = '[prompt],chosen'.",
                )
            return
        if others := sorted(kinds - {"preference", "tokens"}):
            raise UserError(
                f"[dpo] compares pairs of answers, and the data has a source of kind = {others[0]!r}",
                "Use kind = 'preference' for every source, or remove [dpo].",
            )
        if self.loss != LossConfig() or "accuracy" in self.train.metrics:
            field = "[loss]" if self.loss != LossConfig() else "train.metrics = 'accuracy'"
            raise UserError(
                f"{field} does not apply to the loss of [dpo], which is of pairs of answers and not of tokens",
                "Leave it out; dpo.label_smoothing is the one of [dpo].",
            )
        if self.init is None:
            raise UserError(
                "the recipe has [dpo] and no init",
                "Set init to the checkpoint to finetune, which is also the reference.",
            )


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a TOML file, in which `--a.b value` pairs replace fields; raises UserError for anything unknown."""
    return recipe_of(read_table(path), overrides)


def read_table(path: Path) -> dict[str, Any]:
    """The table in a TOML file, whose fields are not checked yet; raises UserError if it is not TOML."""
    try:
        return tomllib.loads(read_text(path, "a recipe (.toml)"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {_without_tuples(error)}", "docs/recipes.md has an example.") from error


def _without_tuples(error: tomllib.TOMLDecodeError) -> str:
    """The message, with the name of a table in place of a tuple such as `('data', 'stages')`."""
    return re.sub(r"\(('[^']*',? ?)+\)", lambda names: ".".join(re.findall(r"'([^']*)'", names[0])), str(error))


def recipe_of(table: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a table, in which `--a.b value` pairs replace fields; raises UserError for anything unknown."""
    changed = overridden(table, overrides)
    try:
        return structure(changed)
    except UserError as error:
        if any(repr(key) in error.problem for key, _ in _pairs(overrides)):
            raise UserError(error.problem, as_option(error.advice)) from error
        raise


def overridden(table: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the table, in which `--a.b value` pairs replace fields."""
    changed = copy.deepcopy(dict(table))
    for key, text in _pairs(overrides):
        _refuse_commas(key, text)
        _set(changed, key, _value(text, _type_of(key)))
    return changed


def laid_over(table: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the table, in which `fields` replace those of the same name, also in the tables in it."""
    both = copy.deepcopy(dict(table))
    for name, value in fields.items():
        below = both.get(name)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            both[name] = laid_over(below, value)
        else:
            both[name] = copy.deepcopy(value)
    return both


def structure(table: Mapping[str, Any]) -> Recipe:
    """The recipe of a table; raises UserError that names the first invalid field."""
    table = _with_preset(table)
    _refuse_unknown(table, Recipe, "")
    try:
        return _converter().structure(table, Recipe)
    except cattrs.BaseValidationError as error:
        raise _explain(error) from error


def write_recipe(recipe: Recipe) -> str:
    """The recipe as TOML, with the value of every field; those that are None are left out."""
    import tomli_w

    return tomli_w.dumps(_without_none(dataclasses.asdict(recipe)))


def completed(recipe: Recipe, kept: Recipe | None) -> Recipe:
    """The recipe with the fields that depend on how the run was started.

    `kept` is the recipe in the folder of a run that is resumed, and None for a new run. These fields are taken from it
    if they are not set, because their defaults may have changed:

    - `optimizer.decay_steps`, so that a run that is resumed with more steps keeps its learning rates. It stays None if
      it is equal to `train.steps`.
    - `data.packing`, whose default was `stream` for all kinds of sources when some runs were started.
    """
    steps, data = recipe.optimizer.decay_steps, recipe.data
    if steps is None and kept is not None and recipe.optimizer.has_end:
        steps = kept.optimizer.end(kept.train.steps)
    optimizer = dataclasses.replace(recipe.optimizer, decay_steps=None if steps == recipe.train.steps else steps)
    if data.packing is None:
        method = (data if kept is None else kept.data).packing_method
        data = dataclasses.replace(data, packing=method)
    return dataclasses.replace(recipe, optimizer=optimizer, data=data)


def _pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """Keys and values of words such as `--a.b value` or `--a.b=value`."""
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r} is neither an option nor its value", "Write overrides as --train.steps 100.")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest:
                raise UserError(f"{word} has no value", "Write overrides as --train.steps 100.")
            value = rest.pop(0)
        pairs.append((key.replace("-", "_"), value))
    return pairs


def _refuse_commas(key: str, text: str) -> None:
    """Raises UserError for items separated by commas in place of a list.

    In file names, patterns and the prompts of samples, commas are text.
    """
    if key == "samples.prompts":
        return
    items = [typing.get_args(arm)[0] for arm in _options(_type_of(key)) if typing.get_origin(arm) is tuple]
    if items and items[0] is not Source and "," in text and not any(character in text for character in "[{("):
        quote = "" if items[0] in (int, float) else '"'
        listed = ", ".join(quote + item.strip(' "') + quote for item in text.split(","))
        raise UserError(f"{key} = {text!r} is one text, not a list", f"Write --{key} '[{listed}]'.")


def _options(hint: Any) -> Sequence[Any]:
    """The types of a union, or the type itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _value(text: str, hint: Any) -> Any:
    """The value of an override: parsed as TOML if that gives a type that the field accepts, and the text otherwise.

    So a string field gets `2024`, `true` and `nan` as they are written; quotes around a string are removed.
    """
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    value = table["value"] if len(table) == 1 else text  # the text has several lines
    return text if _takes(hint, text) and not _takes(hint, value) else value


def _takes(hint: Any, value: Any) -> bool:
    """Whether a field of type `hint` accepts a value of this Python type."""
    match typing.get_origin(hint):
        case typing.Literal:
            return isinstance(value, str)
        case types.UnionType | typing.Union:
            return any(_takes(arm, value) for arm in typing.get_args(hint))
        case collections.abc.Mapping:
            return isinstance(value, Mapping)
        case builtins.tuple:
            inner = typing.get_args(hint)[0]
            return all(_takes(inner, item) for item in value) if isinstance(value, list) else _takes(inner, value)
    if typing.get_origin(hint) is collections.abc.Mapping:
        return isinstance(value, Mapping)
    if dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping) or (hint is Source and isinstance(value, str))
    return isinstance(value, hint)


def _type_of(key: str) -> Any:
    """The type of the field that a dotted key names; `object`, which accepts anything, for unknown keys."""
    hint: Any = Recipe
    for name in key.split("."):
        arms = [arm for arm in _arms(hint) if dataclasses.is_dataclass(arm)]
        fields = {field: kind for arm in arms for field, kind in get_type_hints(arm).items()}
        hint = str if name == PRESET and ModelConfig in arms else fields.get(name, object)
    return hint


def _arms(hint: Any) -> Iterator[Any]:
    """The types that a union or a list consists of."""
    if typing.get_origin(hint) in (types.UnionType, tuple):
        for arm in typing.get_args(hint):
            yield from _arms(arm)
    else:
        yield hint


def _set(table: dict, key: str, value: Any) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise UserError(f"{key}: {parent} is not a table", "docs/recipes.md lists every field.")
    table[name] = value


def _with_preset(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """`table` with the fields of model.preset as defaults of those of the model."""
    model = table.get("model")
    if not isinstance(model, Mapping) or PRESET not in model:
        return table
    own = {key: value for key, value in model.items() if key != PRESET}
    if not isinstance(name := model[PRESET], str):
        raise UserError(f"model.preset = {name!r} is not a name", "`camelid inspect --presets` lists them.")
    under = _without_none(dataclasses.asdict(preset(name)))
    return {**table, "model": under | {key: _with_defaults(value, under.get(key)) for key, value in own.items()}}


def _with_defaults(value: Any, below: Any) -> Any:
    """`value`, with the entries of `below` as defaults if both are tables of the same kind."""
    kind = below.get("kind") if isinstance(below, Mapping) else None
    if isinstance(value, Mapping) and isinstance(below, Mapping) and value.get("kind", kind) == kind:
        return {**below, **value}
    return value


def _refuse_unknown(table: Mapping[str, Any], cls: type, prefix: str) -> None:
    hints = get_type_hints(cls)
    known = [*hints, PRESET] if cls is ModelConfig else hints
    for key, value in table.items():
        if key not in hints:
            advice = renamed_advice(prefix + key) or suggest(prefix + key, known)
            raise UserError(f"the recipe has no field {prefix + key!r}", advice)
        for name, item, hint in _items(f"{prefix}{key}", value, hints[key]):
            if inner := _table_class(hint, item, name):
                _refuse_unknown(item, inner, f"{name}.")


def _items(name: str, value: Any, hint: Any) -> Iterator[tuple[str, Any, Any]]:
    """The value of a field, or the items of a list, with names and types; sources that are strings are left out."""
    if typing.get_origin(hint) is not tuple:
        yield name, value, hint
        return
    inner = typing.get_args(hint)[0]
    for number, item in enumerate(value if isinstance(value, list) else [value]):
        if not (inner is Source and isinstance(item, str)):
            yield f"{name}[{number}]" if isinstance(value, list) else name, item, inner


def _table_class(hint: Any, value: Any, name: str) -> type | None:
    """The dataclass for `value`, of several the one with its `kind`; None if `hint` has no dataclass."""
    classes: list[Any] = [arm for arm in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(arm)]
    if not classes:
        return None
    if not isinstance(value, Mapping):
        advice = "docs/recipes.md lists every field."
        if name == "model" and isinstance(value, str):
            advice = f"To start from a checkpoint, use init = {value!r}; for a preset, use model.preset."
        if name == "lora":
            advice = "Use --lora.rank 16, or a table [lora] with rank = 16."
        shown = str(value).lower() if isinstance(value, bool) else repr(value)
        raise UserError(f"{name} = {shown} is not a table", advice)
    if len(classes) == 1:
        return classes[0]
    kinds = {cls.kind: cls for cls in classes}
    if "kind" not in value:
        raise UserError(f"the recipe lacks the field '{name}.kind'", f"Choose one of {', '.join(kinds)}.")
    if not isinstance(kind := value["kind"], str) or kind not in kinds:
        raise UserError(f"{name}.kind = {kind!r} is unknown", f"Choose one of {', '.join(kinds)}.")
    return kinds[kind]


def _converter() -> cattrs.Converter:
    """A converter without implicit conversions: 3.7 is not an int, and "false" is not true."""
    converter = cattrs.Converter(forbid_extra_keys=True)

    def exactly(*kinds: type):
        def hook(value: Any, kind: type) -> Any:
            if type(value) not in kinds:
                wanted = "true or false" if kind is bool else f"of type {kind.__name__}"
                raise TypeError(f"{value!r} is not {wanted}")
            return kind(value)

        return hook

    def choice(value: Any, kind: Any) -> Any:
        if value not in (choices := typing.get_args(kind)):
            raise ValueError(f"{value!r} is not one of {', '.join(map(repr, choices))}")
        return value

    converter.register_structure_hook_func(lambda kind: typing.get_origin(kind) is typing.Literal, choice)

    for kind, kinds in {int: (int,), float: (float, int), bool: (bool,), str: (str,)}.items():
        converter.register_structure_hook(kind, exactly(*kinds))

    def items(value: Any, kind: Any) -> tuple:
        if isinstance(value, Mapping) and not dataclasses.is_dataclass(typing.get_args(kind)[0]):
            raise TypeError(f"{value!r} is not a list")
        inner = typing.get_args(kind)[0]
        return tuple(converter.structure(item, inner) for item in (value if isinstance(value, list) else [value]))

    converter.register_structure_hook_func(lambda kind: typing.get_origin(kind) is tuple, items)

    def optional(value: Any, kind: Any) -> Any:
        plain = next(arm for arm in typing.get_args(kind) if arm is not types.NoneType)
        return None if value is None else converter.structure(value, _table_class(kind, value, "") or plain)

    converter.register_structure_hook_func(lambda kind: typing.get_origin(kind) is types.UnionType, optional)

    of_table = converter.get_structure_hook(Source)

    def source(value: Any, kind: type) -> Source:
        return Source(files=(value,)) if isinstance(value, str) else of_table(value, kind)

    converter.register_structure_hook(Source, source)
    return converter


def _explain(error: BaseException) -> UserError:
    """The innermost error, with the path of its field."""
    path = []
    while isinstance(error, cattrs.BaseValidationError):
        error = error.exceptions[0]
        notes = getattr(error, "__notes__", [])
        path += [note.name for note in notes if isinstance(note, cattrs.AttributeValidationNote)]
    if isinstance(error, UserError):
        return error
    field = ".".join(path)
    problem = f"the recipe lacks the field {field!r}" if isinstance(error, KeyError) else f"{field}: {error}"
    return UserError(problem, "docs/recipes.md lists every field.")


def _without_none(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) for key, value in table.items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return _without_none(value)
    return list(map(_plain, value)) if isinstance(value, tuple) else value
