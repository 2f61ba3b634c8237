"""config.json as ModelConfig and back, strictly, by the tables of checkpoint/formats/hf_families.py."""

from collections.abc import Mapping, Set
from dataclasses import MISSING, fields, replace
from dataclasses import Field as DataclassField
from types import NoneType
from typing import Any, get_args, get_type_hints

from camelid.checkpoint.formats.hf_families import FAMILIES, FIXED, REQUIRED, Family, Field
from camelid.checkpoint.formats.hf_ignored_fields import ROPE_LEFTOVERS, is_harmless, way_on
from camelid.errors import UserError
from camelid.model.config import ModelConfig, RopeScaling

ORIGINAL = "original_max_position_embeddings"
# Every family has these, and functions below read them.
SPECIAL = frozenset({"model_type", "eos_token_id", "rope_theta", "rope_scaling", "rope_parameters", ORIGINAL})
HINTS = get_type_hints(ModelConfig)
LAYER_TYPES = {True: "sliding_attention", False: "full_attention"}
MAX_LAYERS = 10_000
ADVICE = "Download or copy the file again."


# Reading --------------------------------------------------------------------------------


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """config.json as ModelConfig; raises UserError for every field that is not understood."""
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"config.json has model_type = {name!r}", f"camelid computes {', '.join(FAMILIES)}.")
    family = FAMILIES[name]
    mapped = {field.theirs for field in family.fields}
    fixed = {name: values for name, values in {**FIXED, **family.fixed}.items() if name not in mapped}
    repeated = {"layer_types": _layer_types, **family.repeated} if _lacks_layer_types(family) else family.repeated
    _refuse_unknown(hf, family, mapped | fixed.keys() | repeated.keys())
    _check_fixed(hf, fixed)
    hf = {**family.defaults, **hf}
    values: dict[str, Any] = {"family": name}
    for field in family.fields:
        values |= dict.fromkeys(field.ours, _value(field, hf, family))
    for ours, implied in family.implied.items():
        values[ours] = implied(values) if callable(implied) else implied
    eos = hf.get("eos_token_id")
    ids = [_id("eos_token_id", item) for item in (eos if isinstance(eos, list) else [eos])]
    values["eos_ids"] = tuple(item for item in ids if item is not None)
    if values["num_layers"] > MAX_LAYERS:  # for which tables would be made
        raise UserError(f"config.json has {values['num_layers']:,} layers; camelid takes {MAX_LAYERS:,}", ADVICE)
    try:
        values |= _rope(hf, family, values["context_length"])
        values |= _windows(hf, family, values["num_layers"])
        config = ModelConfig(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"config.json: {error}", ADVICE) from error
    _check_fixed(hf, {theirs: (said(config), None) for theirs, said in repeated.items()})
    return config


def _lacks_layer_types(family: Family) -> bool:
    """Whether layer_types is not a field of the family; what some files have there may only repeat what is so."""
    return family.windows is None or not family.windows.layer_types


def _layer_types(config: ModelConfig) -> list[str]:
    return [LAYER_TYPES[local] for local in config.windowed]


def _refuse_unknown(hf: Mapping[str, Any], family: Family, known: Set[str]) -> None:
    known = known | SPECIAL
    if family.windows is not None:
        known |= {"sliding_window", *family.windows.settings, *(["layer_types"] if family.windows.layer_types else [])}
    if unknown := sorted(name for name in set(hf) - known if not is_harmless(name, hf[name])):
        raise UserError(
            "config.json has fields that camelid does not know: " + ", ".join(f"{n} = {hf[n]!r}" for n in unknown),
            way_on(*unknown),
        )


def _check_fixed(hf: Mapping[str, Any], fixed: Mapping[str, tuple]) -> None:
    for name, allowed in fixed.items():
        if name in hf and hf[name] not in allowed:
            raise UserError(
                f"config.json has {name} = {hf[name]!r}; camelid computes {' or '.join(repr(a) for a in allowed)}",
                way_on(name),
            )


def _value(field: Field, hf: Mapping[str, Any], family: Family) -> Any:
    value = hf.get(field.theirs, field.default)
    computed = field.computed_if_null or field.theirs not in family.defaults
    if callable(field.default) and (value is field.default or (value is None and computed)):
        value = field.default(hf)
    if value is REQUIRED or (value is None and field.default is REQUIRED):
        raise UserError(f"config.json has no {field.theirs}", "The checkpoint cannot be opened without it.")
    if field.theirs.endswith("_id"):
        return _id(field.theirs, value)
    if value is None and field.default is None:
        return None
    if field.names is not None:
        _check_fixed({field.theirs: value}, {field.theirs: tuple(field.names)})
        return field.names[value]
    return _checked(field.theirs, value, HINTS[field.ours[0]], field.least)


def _id(name: str, value: Any) -> int | None:
    """A token's id; -1 was an early word for none."""
    return None if value is None or _checked(name, value, int, least=-1) == -1 else value


def _checked(name: str, value: Any, hint: Any, least: int | None = None) -> Any:
    """`value`, if it is what `hint` asks, and positive or at least `least`; a float may be written as an int."""
    kind = next(kind for kind in get_args(hint) or (hint,) if kind is not NoneType)
    if kind is bool:
        fits = isinstance(value, bool)
    else:
        fits = isinstance(value, (kind, int)) and not isinstance(value, bool)
        fits = fits and value < 2**63 and (value > 0 if least is None else value >= least)
    if not fits:
        raise UserError(f"config.json has {name} = {value!r}", ADVICE)
    return kind(value)


def _windows(hf: Mapping[str, Any], family: Family, layers: int) -> dict[str, Any]:
    """Which layers have a window, from layer_types or from what the family says instead."""
    if family.windows is None:
        return {}
    for name, least in family.windows.settings.items():
        _checked(name, hf[name], type(least), least)
    types = hf.get("layer_types") if family.windows.layer_types else None
    window = hf.get("sliding_window")
    window = None if window is None else _checked("sliding_window", window, int)
    if types is None:
        pattern = family.windows.pattern(hf)
        windowed = [pattern[i % len(pattern)] for i in range(layers)]
    else:
        windowed = [kind == LAYER_TYPES[True] for kind in types] if isinstance(types, list) else []
        if [LAYER_TYPES[local] for local in windowed] != types or len(types) != layers:
            raise UserError(f"config.json has layer_types = {types!r} for {layers} layers", ADVICE)
    if any(windowed) and not (window and hf.get("use_sliding_window", True)):
        raise UserError("config.json has layers of sliding_attention, and no sliding_window for them", ADVICE)
    if not any(windowed):
        return {"sliding_window": None, "local_rope_theta": None}
    period = next(n for n in range(1, layers + 1) if all(windowed[i] == windowed[i % n] for i in range(layers)))
    return {"sliding_window": window, "window_pattern": tuple(windowed[:period])}


def _rope(hf: Mapping[str, Any], family: Family, context_length: int) -> dict[str, Any]:
    """Both spellings: rope_theta with rope_scaling, and rope_parameters, which holds both since transformers 5."""
    told = [name for name in ("rope_parameters", "rope_scaling") if hf.get(name)] or ["rope_scaling"]
    values, *others = (_rope_table(name, hf, family, context_length) for name in told)
    if others and others != [values]:
        raise UserError(
            f"config.json has rope_parameters = {hf['rope_parameters']!r} and rope_scaling = {hf['rope_scaling']!r}, "
            "which differ",
            "Ignore the one that is wrong: --ignore-config-field rope_parameters or --ignore-config-field rope_scaling "
            "(in Python ignore=).",
        )
    return values


def _rope_table(told: str, hf: Mapping[str, Any], family: Family, context_length: int) -> dict[str, Any]:
    """What the field `told` says of rotations, with rope_theta beside it where that is not inside."""
    rope, values = _table(told, hf.get(told)), {}
    if family.rope_by_layer and told == "rope_parameters":
        by_layer = {local: _table(f"{told}.{kind}", rope.pop(kind, None)) for local, kind in LAYER_TYPES.items()}
        if "rope_theta" in by_layer[True]:
            values["local_rope_theta"] = _checked("rope_theta", by_layer[True].pop("rope_theta"), float)
        if rope or by_layer[True] not in ({}, {"rope_type": "default"}):
            raise UserError(f"config.json has {told} = {hf[told]!r}; camelid scales full_attention only", way_on(told))
        told, rope = f"{told}.{LAYER_TYPES[False]}", by_layer[False]
    theta = rope.pop("rope_theta", hf.get("rope_theta", family.rope_theta))
    values["rope_theta"] = _checked("rope_theta", theta, float)
    fraction = rope.pop("partial_rotary_factor", None)
    if fraction is not None and any("rotary_fraction" in field.ours for field in family.fields):
        values["rotary_fraction"] = _checked("partial_rotary_factor", fraction, float)
    elif fraction not in (None, 1.0):
        raise UserError(
            f"config.json has {told}.partial_rotary_factor = {fraction!r}", way_on(f"{told}.partial_rotary_factor")
        )
    return values | {"rope_scaling": _scaling(told, rope, hf, family, context_length)}


def _table(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise UserError(f"config.json has {name} = {value!r}", ADVICE)
    return dict(value or {})


def _scaling(
    told: str, rope: dict[str, Any], hf: Mapping[str, Any], family: Family, context_length: int
) -> RopeScaling | None:
    beside = None if hf.get(ORIGINAL) is None else _checked(ORIGINAL, hf[ORIGINAL], int)
    said = dict(rope)
    kind = rope.pop("rope_type", rope.pop("type", "default"))  # some files give both names
    cls = family.rope_kinds.get(kind) if isinstance(kind, str) else None
    options = {} if cls is None else _options(cls)
    rope = {n: v for n, v in rope.items() if n in options or not (v is None or v is False or n in ROPE_LEFTOVERS)}
    if kind == "default" and not rope:
        return None
    # A null stands for the default, but of truncate for false.
    given = {name: False if name == "truncate" and value is None else value for name, value in rope.items()}
    given = {name: value for name, value in given.items() if value is not None}
    if ORIGINAL in options:
        inside = given.get(ORIGINAL)
        if not family.original_context_beside and None not in (inside, beside) and inside != beside:
            raise UserError(f"config.json has {ORIGINAL} = {beside!r}, and {inside!r} in {told}", ADVICE)
        given[ORIGINAL] = next(value for value in (beside, inside, context_length) if value is not None)
    lacks = [name for name, option in options.items() if option.default is MISSING and name not in given]
    if cls is None or lacks:
        raise UserError(
            f"config.json has {told} = {said!r}; camelid computes "
            + (f"{kind!r} with {', '.join(options)}" if cls else ", ".join(family.rope_kinds)),
            way_on(told),
        )
    if unknown := [f"{told}.{name}" for name in rope if name not in options]:
        values = ", ".join(f"{told}.{name} = {value!r}" for name, value in rope.items() if name not in options)
        raise UserError(
            f"config.json has {values}; camelid computes {kind!r} with {', '.join(options)}", way_on(*unknown)
        )
    hints = get_type_hints(cls)
    return cls(**{options[name].name: _option(name, value, hints[options[name].name]) for name, value in given.items()})


def _options(cls: type[RopeScaling]) -> dict[str, DataclassField]:
    """The fields of a kind of scaling, by their names in config.json."""
    return {(ORIGINAL if f.name == "original_context" else f.name): f for f in fields(cls) if f.name != "kind"}


def _option(name: str, value: Any, hint: Any) -> Any:
    if hint == tuple[float, ...]:
        return tuple(_checked(name, item, float) for item in (value if isinstance(value, list) else [value]))
    return _checked(name, value, hint)


# Writing --------------------------------------------------------------------------------


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json for transformers of this year and of 2023; `dtype` is that of the tensors beside it.

    Raises UserError where no family, or not the one of `config`, can say all of it.
    """
    if config.family not in (None, *FAMILIES):
        raise UserError(f"family = {config.family!r} is not known", f"Known are {', '.join(FAMILIES)}.")
    refusals: dict[str, tuple[int, str]] = {}
    for name in FAMILIES if config.family is None else [config.family]:
        hf = _written(_plain(config), name, dtype)
        try:
            lacks = _differences(config, config_from_hf(hf))
        except UserError as error:
            refusals[name] = (len(HINTS), f"it: {error.problem}")
            continue
        if not lacks:
            return hf
        refusals[name] = (len(lacks), ", ".join(lacks))
    name = min(refusals, key=lambda name: refusals[name][0])
    raise UserError(
        f"a config.json of model_type {name!r} cannot say {refusals[name][1]}",
        "Change that, or the family." if config.family else "No family of Hugging Face computes this model.",
    )


def _written(config: ModelConfig, name: str, dtype: str) -> dict[str, Any]:
    family, hf = FAMILIES[name], {}
    for field in family.fields:
        value = getattr(config, field.ours[0])
        if field.names is not None:
            value = next((theirs for theirs, ours in field.names.items() if ours == value), value)
        if value is not None or field.default is None:
            hf[field.theirs] = value
    if (windows := family.windows) is not None:
        hf |= {"sliding_window": config.sliding_window, **windows.write(config)}
        hf |= {"layer_types": _layer_types(config)} if windows.layer_types else {}
    eos = config.eos_ids
    return {
        **hf,
        **family.written,
        **_rope_to_hf(config, family),
        "architectures": [family.architecture],
        "model_type": name,
        "attention_dropout": 0.0,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _rope_to_hf(config: ModelConfig, family: Family) -> dict[str, Any]:
    if (scaling := config.rope_scaling) is None:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    kind = next((name for name, cls in family.rope_kinds.items() if cls is type(scaling)), scaling.kind)
    # The kinds that transformers knew in 2023 were named by `type`, and nothing else was allowed beside the factor.
    later = family.rope_by_layer or scaling.kind in ("llama3", "yarn")
    rope: dict[str, Any] = {"rope_type" if later else "type": kind}
    for name, option in _options(type(scaling)).items():
        value = getattr(scaling, option.name)
        # A factor that is left to the two contexts stands there as null in YaRN, and not at all in LongRoPE.
        if value != option.default or (name, kind) == ("factor", "yarn"):
            rope[name] = list(value) if isinstance(value, tuple) else value
    beside = {ORIGINAL: rope.pop(ORIGINAL)} if family.original_context_beside and ORIGINAL in rope else {}
    return {"rope_theta": config.rope_theta, "rope_scaling": rope, **beside}


def _plain(config: ModelConfig) -> ModelConfig:
    """The same model, of the ways to say it the one without omissions and repetitions."""
    config = replace(config, query_pre_attn_scalar=config.query_pre_attn_scalar or config.head_dim)
    if True in config.windowed:
        return replace(config, window_pattern=config.windowed)
    return replace(config, sliding_window=None, window_pattern=(True,), local_rope_theta=None)


def _differences(config: ModelConfig, other: ModelConfig) -> list[str]:
    """The fields of `config` that mean something else in `other`."""
    one, two = _plain(config), _plain(other)
    names = [f.name for f in fields(ModelConfig) if f.compare and getattr(one, f.name) != getattr(two, f.name)]
    return [f"{name} = {getattr(config, name)!r}" for name in names]
