"""Which parameters of a model the [lora] table of a recipe means, and the rank and alpha of each."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from camelid.checkpoint.formats import hf
from camelid.errors import UserError
from camelid.model.adapters import LoRAPlan, MatrixPlan
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import Spec, named
from camelid.train.lora_config import GROUPS, LoRAConfig, is_expression
from camelid.train.patterns import matches_name

Key = tuple[str, int | None]
"""path and layer of a matrix; the layer is None if it is not stacked"""
OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "wq": ("q_proj",),
    "wk": ("k_proj",),
    "wv": ("v_proj",),
    "wo": ("o_proj",),
    "w1": ("gate_proj",),
    "w2": ("down_proj",),
    "w3": ("up_proj",),
    "w_qkv": ("q_proj", "k_proj", "v_proj"),
    "w_gate_hidden": ("gate_proj", "up_proj"),
}
"""names of modules in Meta's files and in MindFormers, and the names here; suggested, never accepted"""


def plan_adapters(lora: LoRAConfig, config: ModelConfig) -> LoRAPlan:
    """The adapters that a recipe requests for a model.

    Raises UserError if a target or a pattern matches nothing, if a rank exceeds a matrix, or if DoRA or dropout does
    not apply to a target.
    """
    modules, specs = _modules(config), named(declare_decoder(dataclasses.replace(config, tie_embeddings=False)))
    chosen: set[Key] = set()
    for target in lora.targets:
        found = {key for name in GROUPS.get(target, (target,)) for key in _matching(name, modules)}
        if not found:
            raise UserError(
                f"lora.targets has {target!r}, which matches no module of the model", _advice(modules, target)
            )
        chosen.update(found)
    ranks = _by_pattern("rank_pattern", lora.rank_pattern, lora.rank, modules, chosen)
    alphas = _by_pattern("alpha_pattern", lora.alpha_pattern, lora.usual_alpha, modules, chosen)
    matrices = {}
    for path in dict.fromkeys(path for path, _ in modules):
        keys = [key for key in modules if key[0] == path]
        if chosen.isdisjoint(keys):
            continue
        own = tuple(ranks.get(key, 0) for key in keys)
        if max(own) > (most := _largest_rank(specs[path])):
            raise UserError(
                f"lora has rank {max(own)} for {path}, whose matrices have at most rank {most}",
                "Set a smaller lora.rank, or one for this module in lora.rank_pattern.",
            )
        matrices[path] = MatrixPlan(own, tuple(float(alphas.get(key, 0.0)) for key in keys))
    plan = LoRAPlan(matrices, lora.kind == "dora", lora.rank_stabilized)
    _check_dora(plan, config)
    if lora.dropout and matrices.keys() == {"embed"}:
        raise UserError(
            f"lora.dropout = {lora.dropout} has no effect: lora.targets adapts the embedding table alone, whose inputs "
            "are tokens",
            "Leave it out, or add targets; dropout.embedding drops elements of the embeddings.",
        )
    return plan


def _modules(config: ModelConfig) -> dict[Key, tuple[str, str]]:
    """The names of each matrix of each layer: that of its module in transformers, and its path in camelid."""
    rows = hf.table_of(dataclasses.replace(config, tie_embeddings=False))
    found: dict[Key, tuple[str, str]] = {}
    for name, members in rows.tensors.items():
        for part, layer in members:
            if part.spec.is_matrix:
                path = part.rule.path
                ours = path if layer is None else path.replace("layers.", f"layers.{layer}.", 1)
                found[path, layer] = name.removesuffix(".weight"), ours
    paths = list(rows.entries)
    return dict(sorted(found.items(), key=lambda item: (paths.index(item[0][0]), item[0][1] or 0)))


def _matching(pattern: str, modules: Mapping[Key, tuple[str, str]]) -> set[Key]:
    """The modules that a pattern chooses.

    It is a regular expression that matches the end of a name, as the keys of PEFT's rank_pattern do. One that matches
    no module, such as layers.0-3.mlp or *_proj, is a pattern of parameters, as in train.freeze.
    """
    found = set()
    if is_expression(pattern):
        ending = re.compile(rf"(.*\.)?({pattern})$")
        found = {key for key, names in modules.items() if any(map(ending.match, names))}
    return found or {key for key, names in modules.items() if any(matches_name(pattern, name) for name in names)}


def _by_pattern(
    field: str, patterns: Mapping[str, Any], default: Any, modules: Mapping[Key, tuple[str, str]], chosen: set[Key]
) -> dict[Key, Any]:
    """The value for each module that has an adapter."""
    found = {pattern: _matching(pattern, modules) for pattern in patterns}
    for pattern in patterns:
        if found[pattern].isdisjoint(chosen):
            targeted = {key: names for key, names in modules.items() if key in chosen}
            raise UserError(
                f"lora.{field} has {pattern!r}, which matches no module with an adapter", _advice(targeted, pattern)
            )
    return {
        key: next((value for pattern, value in patterns.items() if key in found[pattern]), default) for key in chosen
    }


def _advice(modules: Mapping[Key, tuple[str, str]], pattern: str) -> str:
    """The names here of the modules in a pattern that has other names, and the modules that there are."""
    ends = dict.fromkeys(name.rpartition(".")[2] for names in modules.values() for name in names)
    example = max((name for name, _ in modules.values()), key=len)
    others = [word for word in re.findall(r"\w+", pattern) if word in OTHER_NAMES]
    return (
        "".join(f"{word} is named {', '.join(OTHER_NAMES[word])} here. " for word in others)
        + f"The modules are {', '.join(ends)}, with paths such as {example}; {' and '.join(GROUPS)} are groups."
    )


def _largest_rank(spec: Spec) -> int:
    """The largest rank of a matrix of this shape."""
    first, middle = len(spec.stacked), len(spec.stacked) + len(spec.outputs)
    return min(math.prod(spec.shape[first:middle]), math.prod(spec.shape[middle:]))


def _check_dora(plan: LoRAPlan, config: ModelConfig) -> None:
    """Raises UserError if the adapter could not be saved in PEFT's form."""
    if not plan.dora:
        return
    if "embed" in plan.matrices:
        raise UserError(
            "lora.kind = 'dora' does not apply to the embedding table: PEFT rescales its columns, and camelid its rows",
            "Leave embed out of lora.targets, or set lora.kind = 'lora'.",
        )
    for name, members in hf.table_of(dataclasses.replace(config, tie_embeddings=False)).tensors.items():
        ranks = [
            0 if part.rule.path not in plan.matrices else plan.matrices[part.rule.path].ranks[layer or 0]
            for part, layer in members
        ]
        if any(ranks) and not all(ranks):
            paths = ", ".join(part.rule.path.rpartition(".")[2] for part, _ in members)
            raise UserError(
                f"lora.kind = 'dora' and lora.targets names a part of {name}, one matrix in PEFT, only",
                f"Name all of its parts: {paths}.",
            )
