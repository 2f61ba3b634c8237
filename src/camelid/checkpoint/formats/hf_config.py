"""Converts config.json to ModelConfig and back, strictly, with the tables of checkpoint/formats/hf_families.py."""

from collections.abc import Mapping, Set
from dataclasses import MISSING, fields, replace
from dataclasses import Field as DataclassField
from types import NoneType
from typing import Any, get_args, get_type_hints

from camelid.checkpoint.formats.hf_families import FAMILIES, FIXED, REQUIRED, Family, Field
from camelid.checkpoint.formats.hf_ignored_fields import ROPE_IGNORED, advice_to_ignore, is_ignored
from camelid.errors import UserError
from camelid.model.config import ModelConfig, RopeScaling

ORIGINAL = "original_max_position_embeddings"
# Fields of every family, which the functions below read.
SPECIAL = frozenset({"model_type", "eos_token_id", "rope_theta", "rope_scaling", "rope_parameters", ORIGINAL})
HINTS = get_type_hints(ModelConfig)
QUANTIZED = (
    "Quantized weights of this kind are not read: use the model that was quantized, also as the base of an adapter, or "
    "save model.dequantize() in transformers. If the files hold unquantized weights after all, add "
    "--ignore-config-field quantization_config (in Python ignore=['quantization_config'])."
)
LAYER_TYPES = {True: "sliding_attention", False: "full_attention"}
MAX_LAYERS = 10_000
ADVICE = "Download or copy the file again."


# Reading --------------------------------------------------------------------------------


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """Returns config.json as ModelConfig; raises UserError for fields that are unknown, missing or not supported."""
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"config.json has model_type = {name!r}", f"camelid supports {', '.join(FAMILIES)}.")
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
    if values["num_layers"] > MAX_LAYERS:  # before a table of that size is created
        raise UserError(
            f"config.json has {values['num_layers']:,} layers; camelid supports up to {MAX_LAYERS:,}", ADVICE
        )
    try:
        values |= _rope(hf, family, values["context_length"])
        values |= _windows(hf, family, values["num_layers"])
        config = ModelConfig(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"config.json: {error}", ADVICE) from error
    _check_fixed(hf, {theirs: (expected(config), None) for theirs, expected in repeated.items()})
    return config


def _lacks_layer_types(family: Family) -> bool:
    """Whether layer_types is not a field of the family; files that have it may only repeat the family's own pattern."""
    return family.windows is None or not family.windows.layer_types


def _layer_types(config: ModelConfig) -> list[str]:
    return [LAYER_TYPES[local] for local in config.windowed]


def _refuse_unknown(hf: Mapping[str, Any], family: Family, known: Set[str]) -> None:
    known = known | SPECIAL
    if family.windows is not None:
        known |= {"sliding_window", *family.windows.settings, *(["layer_types"] if family.windows.layer_types else [])}
    if unknown := sorted(name for name in set(hf) - known if not is_ignored(name, hf[name])):
        raise UserError(
            "config.json has unknown fields: " + ", ".join(f"{n} = {hf[n]!r}" for n in unknown),
            advice_to_ignore(*unknown),
        )


def _check_fixed(hf: Mapping[str, Any], fixed: Mapping[str, tuple]) -> None:
    for name, allowed in fixed.items():
        if name in hf and hf[name] not in allowed:
            raise UserError(
                f"config.json has {name} = {hf[name]!r}; camelid supports {' or '.join(repr(a) for a in allowed)}",
                QUANTIZED if name == "quantization_config" else advice_to_ignore(name),
            )


def _value(field: Field, hf: Mapping[str, Any], family: Family) -> Any:
    value = hf.get(field.theirs, field.default)
    computed = field.computed_if_null or field.theirs not in family.defaults
    if callable(field.default) and (value is field.default or (value is None and computed)):
        value = field.default(hf)
    if value is REQUIRED or (value is None and field.default is REQUIRED):
        raise UserError(f"config.json has no {field.theirs}", "Add it, or describe the model with --config.")
    if field.theirs.endswith("_id"):
        return _id(field.theirs, value)
    if value is None and field.default is None:
        return None
    if field.names is not None:
        _check_fixed({field.theirs: value}, {field.theirs: tuple(field.names)})
        return field.names[value]
    return _checked(field.theirs, value, HINTS[field.ours[0]], field.minimum)


def _id(name: str, value: Any) -> int | None:
    """Returns the id of a token, None if there is none; early versions wrote -1 for that."""
    return None if value is None or _checked(name, value, int, minimum=-1) == -1 else value


def _checked(name: str, value: Any, hint: Any, minimum: int | None = None) -> Any:
    """Returns `value` as the type of `hint`; raises UserError for another type, or for a number that is too small.

    Numbers must be positive, or at least `minimum`. Floats may be written as integers.
    """
    expected = next(member for member in get_args(hint) or (hint,) if member is not NoneType)
    if expected is bool:
        valid = isinstance(value, bool)
    else:
        valid = isinstance(value, (expected, int)) and not isinstance(value, bool)
        valid = valid and value < 2**63 and (value > 0 if minimum is None else value >= minimum)
    if not valid:
        raise UserError(f"config.json has {name} = {value!r}", ADVICE)
    return expected(value)


def _windows(hf: Mapping[str, Any], family: Family, layers: int) -> dict[str, Any]:
    """Returns the sliding window and the layers that have it, from layer_types or from the family's own fields."""
    if family.windows is None:
        return {}
    for name, minimum in family.windows.settings.items():
        _checked(name, hf[name], type(minimum), minimum)
    types = hf.get("layer_types") if family.windows.layer_types else None
    window = hf.get("sliding_window")
    window = None if window is None else _checked("sliding_window", window, int)
    if types is None:
        pattern = family.windows.pattern(hf)
        windowed = [pattern[i % len(pattern)] for i in range(layers)]
    else:
        windowed = [layer_type == LAYER_TYPES[True] for layer_type in types] if isinstance(types, list) else []
        if [LAYER_TYPES[local] for local in windowed] != types or len(types) != layers:
            raise UserError(f"config.json has layer_types = {types!r} for {layers} layers", ADVICE)
    if any(windowed) and not (window and hf.get("use_sliding_window", True)):
        raise UserError("config.json has layers with sliding_attention, but no sliding_window", ADVICE)
    if not any(windowed):
        return {"sliding_window": None, "local_rope_theta": None}
    period = next(n for n in range(1, layers + 1) if all(windowed[i] == windowed[i % n] for i in range(layers)))
    return {"sliding_window": window, "window_pattern": tuple(windowed[:period])}


def _rope(hf: Mapping[str, Any], family: Family, context_length: int) -> dict[str, Any]:
    """Reads rope_theta with rope_scaling, or rope_parameters, which contains both since transformers 5."""
    present = [name for name in ("rope_parameters", "rope_scaling") if hf.get(name)] or ["rope_scaling"]
    values, *others = (_rope_table(name, hf, family, context_length) for name in present)
    if others and others != [values]:
        raise UserError(
            f"config.json has rope_parameters = {hf['rope_parameters']!r} and rope_scaling = {hf['rope_scaling']!r}, "
            "which differ",
            "Ignore the wrong one: --ignore-config-field rope_parameters or --ignore-config-field rope_scaling "
            "(in Python ignore=).",
        )
    return values


def _rope_table(name: str, hf: Mapping[str, Any], family: Family, context_length: int) -> dict[str, Any]:
    """Reads rope_scaling or rope_parameters (`name`), and the field rope_theta if the table does not contain it."""
    rope, values = _table(name, hf.get(name)), {}
    if family.rope_by_layer and name == "rope_parameters":
        by_layer = {local: _table(f"{name}.{layer}", rope.pop(layer, None)) for local, layer in LAYER_TYPES.items()}
        if "rope_theta" in by_layer[True]:
            values["local_rope_theta"] = _checked("rope_theta", by_layer[True].pop("rope_theta"), float)
        if rope or by_layer[True] not in ({}, {"rope_type": "default"}):
            raise UserError(
                f"config.json has {name} = {hf[name]!r}; camelid supports scaling of full_attention only",
                advice_to_ignore(name),
            )
        name, rope = f"{name}.{LAYER_TYPES[False]}", by_layer[False]
    theta = rope.pop("rope_theta", hf.get("rope_theta", family.rope_theta))
    values["rope_theta"] = _checked("rope_theta", theta, float)
    fraction = rope.pop("partial_rotary_factor", None)
    if fraction is not None and any("rotary_fraction" in field.ours for field in family.fields):
        values["rotary_fraction"] = _checked("partial_rotary_factor", fraction, float)
    elif fraction not in (None, 1.0):
        raise UserError(
            f"config.json has {name}.partial_rotary_factor = {fraction!r}",
            advice_to_ignore(f"{name}.partial_rotary_factor"),
        )
    return values | {"rope_scaling": _scaling(name, rope, hf, family, context_length)}


def _table(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise UserError(f"config.json has {name} = {value!r}", ADVICE)
    return dict(value or {})


def _scaling(
    table: str, rope: dict[str, Any], hf: Mapping[str, Any], family: Family, context_length: int
) -> RopeScaling | None:
    """Returns the scaling of the field `table`, whose content without rope_theta is `rope`."""
    top_level = None if hf.get(ORIGINAL) is None else _checked(ORIGINAL, hf[ORIGINAL], int)
    as_written = dict(rope)
    rope_type = rope.pop("rope_type", rope.pop("type", "default"))  # some files have both keys
    cls = family.rope_types.get(rope_type) if isinstance(rope_type, str) else None
    options = {} if cls is None else _options(cls)
    rope = {n: v for n, v in rope.items() if n in options or not (v is None or v is False or n in ROPE_IGNORED)}
    if rope_type == "default" and not rope:
        return None
    # Null means the default, except for truncate, for which it means false.
    given = {name: False if name == "truncate" and value is None else value for name, value in rope.items()}
    given = {name: value for name, value in given.items() if value is not None}
    if ORIGINAL in options:
        nested = given.get(ORIGINAL)
        if not family.original_context_at_top and None not in (nested, top_level) and nested != top_level:
            raise UserError(f"config.json has {ORIGINAL} = {top_level!r}, and {nested!r} in {table}", ADVICE)
        given[ORIGINAL] = next(value for value in (top_level, nested, context_length) if value is not None)
    missing = [name for name, option in options.items() if option.default is MISSING and name not in given]
    if cls is None or missing:
        raise UserError(
            f"config.json has {table} = {as_written!r}; camelid supports "
            + (f"{rope_type!r} with {', '.join(options)}" if cls else ", ".join(family.rope_types)),
            advice_to_ignore(table),
        )
    if unknown := [f"{table}.{name}" for name in rope if name not in options]:
        values = ", ".join(f"{table}.{name} = {value!r}" for name, value in rope.items() if name not in options)
        raise UserError(
            f"config.json has {values}; camelid supports {rope_type!r} with {', '.join(options)}",
            advice_to_ignore(*unknown),
        )
    hints = get_type_hints(cls)
    return cls(**{options[name].name: _option(name, value, hints[options[name].name]) for name, value in given.items()})


def _options(cls: type[RopeScaling]) -> dict[str, DataclassField]:
    """Returns the fields of a type of scaling, by their names in config.json."""
    return {(ORIGINAL if f.name == "original_context" else f.name): f for f in fields(cls) if f.name != "kind"}


def _option(name: str, value: Any, hint: Any) -> Any:
    if hint == tuple[float, ...]:
        return tuple(_checked(name, item, float) for item in (value if isinstance(value, list) else [value]))
    return _checked(name, value, hint)


# Writing --------------------------------------------------------------------------------


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns a config.json for current versions of transformers and for those of 2023; `dtype` is that of the tensors.

    Raises UserError if neither the family of `config`, nor any family if it has none, can express the configuration.
    """
    if config.family not in (None, *FAMILIES):
        raise UserError(f"family = {config.family!r} is unknown", f"Choose one of {', '.join(FAMILIES)}.")
    refusals: dict[str, tuple[int, str]] = {}
    for name in FAMILIES if config.family is None else [config.family]:
        hf = _config_json(_normalized(config), name, dtype)
        try:
            lost = _differences(config, config_from_hf(hf))
        except UserError as error:
            refusals[name] = (len(HINTS), f"this model: {error.problem}")
            continue
        if not lost:
            return hf
        refusals[name] = (len(lost), ", ".join(lost))
    name = min(refusals, key=lambda name: refusals[name][0])
    raise UserError(
        f"a config.json of model_type {name!r} cannot express {refusals[name][1]}",
        "Change these fields, or the family." if config.family else "No supported model_type can express this model.",
    )


def _config_json(config: ModelConfig, name: str, dtype: str) -> dict[str, Any]:
    """Returns the config.json of one family; it may not express all of `config`."""
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
    rope_type = next((name for name, cls in family.rope_types.items() if cls is type(scaling)), scaling.kind)
    # transformers of 2023 named its types of scaling by the key `type`, and allowed only `factor` as another key.
    later = family.rope_by_layer or scaling.kind in ("llama3", "yarn")
    rope: dict[str, Any] = {"rope_type" if later else "type": rope_type}
    for name, option in _options(type(scaling)).items():
        value = getattr(scaling, option.name)
        # A factor that follows from the two context lengths is null for YaRN, and absent for LongRoPE.
        if value != option.default or (name, rope_type) == ("factor", "yarn"):
            rope[name] = list(value) if isinstance(value, tuple) else value
    top_level = {ORIGINAL: rope.pop(ORIGINAL)} if family.original_context_at_top and ORIGINAL in rope else {}
    return {"rope_theta": config.rope_theta, "rope_scaling": rope, **top_level}


def _normalized(config: ModelConfig) -> ModelConfig:
    """Returns the canonical form of a config, with implied values filled in and unused ones removed."""
    config = replace(config, query_pre_attn_scalar=config.query_pre_attn_scalar or config.head_dim)
    if True in config.windowed:
        return replace(config, window_pattern=config.windowed)
    return replace(config, sliding_window=None, window_pattern=(True,), local_rope_theta=None)


def _differences(config: ModelConfig, other: ModelConfig) -> list[str]:
    """Returns the fields of `config` whose meaning differs in `other`, as `name = value`."""
    one, two = _normalized(config), _normalized(other)
    names = [f.name for f in fields(ModelConfig) if f.compare and getattr(one, f.name) != getattr(two, f.name)]
    return [f"{name} = {getattr(config, name)!r}" for name in names]
