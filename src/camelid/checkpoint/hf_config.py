"""config.json as ModelConfig and back, strictly, by the tables of checkpoint/families.py."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, replace
from typing import Any, get_args, get_type_hints

from camelid.checkpoint.families import FAMILIES, FIXED, HARMLESS, REQUIRED, Family, Field
from camelid.errors import UserError
from camelid.model.config import ModelConfig, RopeScaling

# Every family has these, and functions below read them.
SPECIAL = frozenset(
    {"model_type", "eos_token_id", "rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings"}
)
HINTS = get_type_hints(ModelConfig)
LAYER_TYPES = {True: "sliding_attention", False: "full_attention"}
ADVICE = "Download or copy the file again."
UNSUPPORTED = "This model is not supported yet."


# Reading --------------------------------------------------------------------------------


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """config.json as ModelConfig; raises UserError for every field that is not understood."""
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"config.json has model_type = {name!r}", f"camelid computes {', '.join(FAMILIES)}.")
    family = FAMILIES[name]
    _refuse_unknown(hf, family)
    _check_fixed(hf, {**FIXED, **family.fixed})
    hf = {**family.defaults, **hf}
    values: dict[str, Any] = {"family": name}
    for field in family.fields:
        values |= dict.fromkeys(field.ours, _value(field, hf, family))
    for ours, implied in family.implied.items():
        values[ours] = implied(values) if callable(implied) else implied
    eos = hf.get("eos_token_id")
    ids = [_id("eos_token_id", item) for item in (eos if isinstance(eos, list) else [eos])]
    values["eos_ids"] = tuple(item for item in ids if item is not None)
    try:
        values |= _rope(hf, family, values["context_length"])
        values |= _windows(hf, family, values["num_layers"])
        config = ModelConfig(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"config.json: {error}", ADVICE) from error
    _check_fixed(hf, {theirs: (said(config), None) for theirs, said in family.repeated.items()})
    return config


def _refuse_unknown(hf: Mapping[str, Any], family: Family) -> None:
    known = {field.theirs for field in family.fields} | {*family.fixed, *family.repeated, *FIXED, *HARMLESS, *SPECIAL}
    if family.windows is not None:
        known |= {"sliding_window", *family.windows.settings, *(["layer_types"] if family.windows.layer_types else [])}
    if unknown := sorted(set(hf) - known):
        raise UserError(
            "config.json has fields that camelid does not know: " + ", ".join(f"{n} = {hf[n]!r}" for n in unknown),
            "They may change what the model computes; remove those that do not.",
        )


def _check_fixed(hf: Mapping[str, Any], fixed: Mapping[str, tuple]) -> None:
    for name, allowed in fixed.items():
        if name in hf and hf[name] not in allowed:
            raise UserError(
                f"config.json has {name} = {hf[name]!r}; camelid computes {' or '.join(repr(a) for a in allowed)}",
                UNSUPPORTED,
            )


def _value(field: Field, hf: Mapping[str, Any], family: Family) -> Any:
    value = hf.get(field.theirs, field.default)
    if callable(field.default) and (value is field.default or (value is None and field.theirs not in family.defaults)):
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
    return _checked(field.theirs, value, HINTS[field.ours[0]])


def _id(name: str, value: Any) -> int | None:
    """A token's id; -1 was an early word for none."""
    return None if value is None or _checked(name, value, int, least=-1) == -1 else value


def _checked(name: str, value: Any, hint: Any, least: int | None = None) -> Any:
    """`value`, where it is of the type that `hint` asks and at least `least`, or positive; a float may be written as an int."""
    kinds = get_args(hint) or (hint,)
    if bool in kinds:
        fits = isinstance(value, bool)
    else:
        fits = isinstance(value, (*kinds, int) if float in kinds else kinds) and not isinstance(value, bool)
        fits = fits and value < 2**63 and (value > 0 if least is None else value >= least)
    if not fits:
        raise UserError(f"config.json has {name} = {value!r}", ADVICE)
    return float(value) if float in kinds else value


def _windows(hf: Mapping[str, Any], family: Family, layers: int) -> dict[str, Any]:
    """Which layers have a window, from layer_types or from what the family says instead."""
    if family.windows is None:
        return {}
    for name, least in family.windows.settings.items():
        _checked(name, hf[name], type(least), least)
    types = hf.get("layer_types")
    window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
    if types is None:
        pattern = family.windows.pattern(hf)
        windowed = [pattern[i % len(pattern)] and window is not None for i in range(layers)]
    else:
        windowed = [kind == LAYER_TYPES[True] for kind in types] if isinstance(types, list) else []
        if [LAYER_TYPES[local] for local in windowed] != types or len(types) != layers:
            raise UserError(f"config.json has layer_types = {types!r} for {layers} layers", ADVICE)
        if any(windowed) and window is None:
            raise UserError(f"config.json has layer_types = {types!r} and no sliding_window", ADVICE)
    if not any(windowed):
        return {"sliding_window": None, "local_rope_theta": None}
    period = next(n for n in range(1, layers + 1) if all(windowed[i] == windowed[i % n] for i in range(layers)))
    return {"sliding_window": _checked("sliding_window", window, int), "window_pattern": tuple(windowed[:period])}


def _rope(hf: Mapping[str, Any], family: Family, context_length: int) -> dict[str, Any]:
    """Both spellings: rope_theta with rope_scaling, and rope_parameters, which holds both since transformers 5."""
    if hf.get("rope_parameters") and hf.get("rope_scaling"):
        raise UserError("config.json has both rope_parameters and rope_scaling", "Remove one of them.")
    name = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    rope, values = _table(name, hf.get(name)), {}
    if family.rope_by_layer and name == "rope_parameters":
        local, rope = (_table(f"{name}.{kind}", rope.pop(kind, None), rope) for kind in LAYER_TYPES.values())
    ...
