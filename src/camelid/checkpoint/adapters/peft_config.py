"""Reads and writes PEFT's adapter_config.json (huggingface/peft, LoraConfig): target modules, ranks and scales."""

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from camelid.checkpoint.hub import split_revision
from camelid.errors import UserError

NAME = "adapter_config.json"
# Fields that change what is computed, with the values that are supported.
FIXED: Mapping[str, tuple] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    "runtime_config": (None, {}, {"ephemeral_gpu_offload": False}),
    **dict.fromkeys("use_qalora lora_bias ensure_weight_tying".split(), (False, None)),
    **dict.fromkeys(
        """
        layer_replication trainable_token_indices target_parameters alora_invocation_tokens megatron_config
        use_bdlora arrow_config kasa_config velora_config monteclora_config
        """.split(),
        (None, [], {}),
    ),
}
# Initializations that do not change the base; PiSSA, OLoRA, LoftQ and others subtract a part of it.
STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
# Ignored fields: settings of training and initialization, and the origin of the adapter. fan_in_fan_out is included
# because PEFT itself sets it to false for every torch Linear, which all layers here are.
HARMLESS = frozenset(
    """
    auto_mapping peft_version inference_mode fan_in_fan_out megatron_core qalora_group_size loftq_config eva_config
    corda_config lora_ga_config
    """.split()
)
NOT_READ = "camelid supports LoRA adapters only; merge this one with PEFT's merge_and_unload, and open the result."
MEND = f"Correct {NAME}, or save the adapter again."


@dataclass(frozen=True)
class Settings:
    """The content of adapter_config.json."""

    base: str | None
    revision: str | None
    rank: int
    alpha: float
    rslora: bool
    dora: bool
    dropout: float
    ranks: Mapping[str, int]
    """rank of modules whose names end in a match of this regular expression; the first match counts"""
    alphas: Mapping[str, float]
    targets: str | tuple[str, ...]
    """suffixes of names, or a regular expression"""
    excluded: str | tuple[str, ...]
    saved: tuple[str, ...]
    """suffixes of the names of modules that are saved entirely"""
    layers: tuple[int, ...] | None
    layers_in: tuple[str, ...]

    def targeted(self, module: str) -> bool:
        """Whether an adapter applies to a module."""
        saved = any(re.search(rf"(^|\.){re.escape(name)}($|\.)", module) for name in self.saved)
        if saved or _fits(self.excluded, module):
            return False
        if isinstance(self.targets, str):
            every = self.targets.lower() == "all-linear" and not module.endswith(("embed_tokens", "lm_head"))
            return every or _fits(self.targets, module)
        if self.layers is None or module in self.targets:
            return _fits(self.targets, module)
        kinds = self.layers_in or (r"[^.]*",)
        found = next(filter(None, (re.match(rf"(?:^|.*?\.){kind}\.(\d+)\.", module) for kind in kinds)), None)
        return _fits(self.targets, module) and found is not None and int(found[1]) in self.layers

    def rank_of(self, module: str) -> int:
        """Returns the rank of the adapter of a module."""
        return next((rank for key, rank in self.ranks.items() if _ends(key, module)), self.rank)

    def alpha_of(self, module: str) -> float:
        """Returns lora_alpha of a module; the scale is alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return next((alpha for key, alpha in self.alphas.items() if _ends(key, module)), self.alpha)


def _fits(names: str | tuple[str, ...], module: str) -> bool:
    """Whether a module's name matches a regular expression, or ends in one of several names."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


def _ends(key: str, module: str) -> bool:
    """Whether a module's name matches a key of rank_pattern or alpha_pattern."""
    return re.match(rf"(.*\.)?({key})$", module) is not None


# Reading --------------------------------------------------------------------------------


def read_settings(hf: Mapping[str, Any]) -> Settings:
    """Returns adapter_config.json as Settings; raises UserError for fields that are unknown or not supported."""
    for name, allowed in FIXED.items():
        if name in hf and hf[name] not in allowed:
            raise UserError(f"{NAME} has {name} = {hf[name]!r}; camelid supports {allowed[0]!r}", NOT_READ)
    if "peft_type" not in hf:
        raise UserError(f"{NAME} has no peft_type", MEND)
    if (start := hf.get("init_lora_weights")) not in STARTS:
        raise UserError(
            f"{NAME} has init_lora_weights = {start!r}, which subtracts a part of the base",
            "Save it with PEFT's path_initial_model_for_weight_conversion, which makes it an ordinary LoRA adapter.",
        )
    unknown = sorted(name for name in set(hf) - FIXED.keys() - HARMLESS - READ.keys() - {"init_lora_weights"})
    if unknown := [name for name in unknown if hf[name] not in (None, False, "", [], {})]:
        raise UserError(
            f"{NAME} has unknown fields: " + ", ".join(f"{n} = {hf[n]!r}" for n in unknown),
            "They may change what the adapter computes; remove those that do not.",
        )
    values = {}
    for name, (ours, default, fits) in READ.items():
        given = hf.get(name)
        if given is None and default is REQUIRED:
            raise UserError(f"{NAME} has no {name}", MEND)
        if given is not None and not fits(given):
            raise UserError(f"{NAME} has {name} = {given!r}", MEND)
        value = default if given is None else given
        values[ours] = tuple(value) if isinstance(value, list) else value
    layers = values["layers"]
    values["layers"] = (layers,) if isinstance(layers, int) else layers or None
    within = values["layers_in"]
    values["layers_in"] = ((within,) if within else ()) if isinstance(within, str) else within
    values |= {name: float(values[name]) for name in ("alpha", "dropout")}
    values["alphas"] = {key: float(alpha) for key, alpha in values["alphas"].items()}
    patterns = [*values["ranks"], *values["alphas"], *values["layers_in"]]
    patterns += [value for value in (values["targets"], values["excluded"]) if isinstance(value, str)]
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{NAME} has {pattern!r}, which is not a regular expression: {error}", MEND) from error
    return Settings(**values)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_text, value)))


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_layers(value: Any) -> bool:
    return type(value) is int or (isinstance(value, list) and all(type(layer) is int for layer in value))


def _table_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


REQUIRED = object()
# By field: the attribute of Settings, its value if the field is absent or null, and a check of other values.
READ: Mapping[str, tuple[str, Any, Callable[[Any], bool]]] = {
    "base_model_name_or_path": ("base", None, _is_text),
    "revision": ("revision", None, _is_text),
    "r": ("rank", REQUIRED, _is_count),
    "lora_alpha": ("alpha", REQUIRED, _is_number),
    "use_rslora": ("rslora", False, lambda value: isinstance(value, bool)),
    "use_dora": ("dora", False, lambda value: isinstance(value, bool)),
    "lora_dropout": ("dropout", 0.0, _is_number),
    "rank_pattern": ("ranks", {}, _table_of(_is_count)),
    "alpha_pattern": ("alphas", {}, _table_of(_is_number)),
    "target_modules": ("targets", REQUIRED, _is_names),
    "exclude_modules": ("excluded", (), _is_names),
    "modules_to_save": ("saved", (), _is_list),
    "layers_to_transform": ("layers", None, _is_layers),
    "layers_pattern": ("layers_in", (), _is_names),
}


# Writing --------------------------------------------------------------------------------


def config_json(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    saved: Collection[str],
    modules: Collection[str],
    *,
    base: str | None,
    rslora: bool,
    dora: bool,
    dropout: float,
) -> dict[str, Any]:
    """Returns adapter_config.json for modules with these ranks and alphas, and for modules that are saved entirely.

    `modules` are all modules of the model.
    """
    name, revision = (None, None) if base is None else split_revision(base)
    alphas = {module: int(alpha) if alpha.is_integer() else alpha for module, alpha in alphas.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "alpha_pattern": _pattern(alphas, alpha, modules),
        "auto_mapping": None,
        "base_model_name_or_path": name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "modules_to_save": _ends_of(saved, modules) or None,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": _pattern(ranks, rank, modules),
        "revision": revision,
        "target_modules": _ends_of(ranks, modules),
        "task_type": "CAUSAL_LM",
        "use_dora": dora,
        "use_rslora": rslora,
    }


def _ends_of(chosen: Collection[str], modules: Collection[str]) -> list[str]:
    """Returns the shortest names that select these modules: q_proj if all of that name are chosen, else full names."""

    def name(module: str) -> str:
        end = module.rpartition(".")[2]
        return end if all(other in chosen for other in modules if other.endswith(end)) else module

    return sorted({name(module) for module in chosen})


def _pattern(values: Mapping[str, Any], default: Any, modules: Collection[str]) -> dict[str, Any]:
    """Returns the values that differ from the default, keyed by the shortest names that select their modules."""
    pattern = {}
    for value in sorted(set(values.values()) - {default}):
        for name in _ends_of([module for module, other in values.items() if other == value], modules):
            # PEFT before 2025 does not match a key with the prefix of the model.
            pattern[name.removeprefix("model.")] = value
    return pattern
