"""LoRA factors that MindFormers trained: beside the weights of their base in one file, or alone.

MindFormers has named them in four ways, where M is a module such as model.layers.0.attention.wq:

    M.tk_delta_lora_a        M.tk_delta_lora_b         mindpet 1.0.0
    M.mindpet_delta_lora_a   M.mindpet_delta_lora_b    later versions of mindpet
    M.lora_A.weight          M.lora_B.weight           parallel_core
    M.lora_a                 M.lora_b                  pynative

A is (rank, inputs) and B (outputs, rank), with the rows of M.weight. The update is alpha / rank * (B @ A); alpha is not
in the file, but in the YAML of the run, or in mindformers_adapter_config.json.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from camelid.checkpoint.adapters.lora import Adapter, Pair, ParameterKey
from camelid.checkpoint.adapters.peft import on_base
from camelid.checkpoint.checkpoint import Checkpoint, table_for
from camelid.checkpoint.formats import mindspore
from camelid.checkpoint.formats.mindspore import RopeLayout
from camelid.checkpoint.layout import Table, TensorRule, make_table, slice_reader
from camelid.checkpoint.tensors import CODES, Tensor, files_holding
from camelid.errors import UserError
from camelid.inputs import read_text
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import Spec, named

SUFFIXES: Mapping[str, str] = {
    "tk_delta_lora": r"\.tk_delta_lora_([abAB])",
    "mindpet_delta_lora": r"\.mindpet_delta_lora_([abAB])",
    "lora_A.weight": r"\.lora_([AB])\.weight",
    "lora_a": r"\.lora_([ab])",
}
"""the end of a factor's name, by a name for each of the four ways"""
AGAIN = "Copy the file again, or save it again in MindFormers."


def open_checkpoint(
    path: Path,
    config: ModelConfig | None = None,
    rope_layout: RopeLayout | None = None,
    lora_alpha: float | None = None,
) -> Checkpoint:
    """Opens a MindSpore checkpoint, see `mindspore.open_checkpoint`; LoRA factors in it are merged when it is read.

    `lora_alpha` is that of the factors; None reads it from a YAML file in the folder. Raises UserError if there are
    factors and no alpha, or an alpha and no factors.
    """
    tensors, aside = mindspore.open_tensors(path)
    factors, others = _split(tensors, aside)
    if factors and not others:
        raise UserError(
            f"{path} holds LoRA factors without the weights of their base",
            f"Add them to it: camelid convert BASE DESTINATION --adapter {path}",
        )
    if lora_alpha is not None and not factors:
        raise UserError(f"{path} has no LoRA factors, to which lora_alpha = {lora_alpha:g} applies", "Leave it out.")
    base = mindspore.from_tensors(path, others, aside, config, rope_layout)
    if not factors:
        return base
    adapter = _read(path, factors, base.config, mindspore.rope_layout_of(base), lora_alpha)
    opened = on_base(adapter, base, base.folder, base.format, files_holding(factors.values()))
    return replace(opened, assumed_layout=base.assumed_layout)


def matches(path: Path) -> bool:
    """Whether a file or folder may hold LoRA factors of MindFormers, by names and first bytes."""
    return (path.suffix == ".safetensors" and path.is_file()) or mindspore.matches(path)


def open_adapter(
    path: Path, base: Checkpoint, rope_layout: RopeLayout | None = None, lora_alpha: float | None = None
) -> tuple[Adapter, list[Path]]:
    """Reads the LoRA factors of a file, or of a folder with one, for a base of any format; also returns their files.

    `rope_layout` is that of the model for which MindFormers trained them; None: that of `base` if it is a MindSpore
    checkpoint, and otherwise the one of MindFormers since August 2023. Raises UserError if the file is damaged, has
    other tensors, or factors that do not fit the base; and if there is no `lora_alpha` (see `open_checkpoint`).
    """
    factors, others = _split(*mindspore.open_tensors(path))
    if not factors:
        raise UserError(f"{path} has no LoRA factors", "Give the file with the factors that MindFormers trained.")
    if others:
        raise UserError(
            f"{path} holds {next(iter(others))} besides LoRA factors, so it is not an adapter alone",
            "If it holds the base too, give it as SOURCE, without --adapter.",
        )
    adapter = _read(path, factors, base.config, rope_layout or mindspore.rope_layout_of(base), lora_alpha)
    return adapter, files_holding(factors.values())


def _split(tensors: Mapping[str, Tensor], aside: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The LoRA factors, and the weights; without the values of training `aside`."""
    held = {name: tensor for name, tensor in tensors.items() if name not in aside}
    factors = {name: tensor for name, tensor in held.items() if _parts(name)}
    return factors, {name: tensor for name, tensor in held.items() if name not in factors}


def _parts(name: str) -> tuple[str, str, str] | None:
    """The module of a factor, "a" or "b", and the way in which it is named."""
    for way, suffix in SUFFIXES.items():
        if match := re.fullmatch(f"(.+){suffix}", name):
            return match[1], match[2].lower(), way
    return None


def _read(
    path: Path,
    factors: Mapping[str, Tensor],
    config: ModelConfig,
    rope_layout: RopeLayout,
    lora_alpha: float | None,
) -> Adapter:
    modules = _by_module(path, factors)
    rules = mindspore.rows_for((f"{module}.weight" for module in modules), rope_layout)
    untied = replace(config, tie_embeddings=False)
    table = table_for(mindspore.WHAT, rules, untied, mindspore.SIZES)
    ranks = {module: _check(module, found, table) for module, found in modules.items()}
    alpha = _alpha(path, sorted(set(ranks.values())), lora_alpha)
    pairs: dict[ParameterKey, Pair] = {}
    for module, found in modules.items():
        name, rank = f"{module}.weight", ranks[module]
        a = found["a"].read((slice(0, rank), slice(0, found["a"].shape[1])), found["a"].dtype)
        read = slice_reader(_outputs(rules, untied, rank), {name: found["b"]})
        for entry, layer in table.tensors[name]:
            outputs = entry.spec.shape[len(entry.spec.stacked) :][: len(entry.spec.outputs)]
            index = tuple(slice(0, n) for n in (*outputs, rank))
            b = np.array(read(entry.rule.path, layer, index, found["b"].dtype)).reshape(-1, rank)
            pairs[entry.rule.path, layer] = Pair(a, b, alpha)
    return Adapter(untied if ("lm_head", None) in pairs else config, pairs)


def _by_module(path: Path, factors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The factors a and b of each module; raises UserError if one is missing, or if they are named in several ways."""
    modules: dict[str, dict[str, Tensor]] = {}
    ways: dict[str, str] = {}
    for name, tensor in factors.items():
        parts = _parts(name)
        assert parts is not None
        module, which, way = parts
        ways.setdefault(way, name)
        if len(ways) > 1:
            raise UserError(
                f"{path} holds LoRA factors that are named in two ways: {' and '.join(ways.values())}",
                "They are of different versions of MindFormers: keep those of one.",
            )
        if which in modules.setdefault(module, {}):
            raise UserError(f"{path} holds {modules[module][which].name} and {name}", AGAIN)
        modules[module][which] = tensor
    for module, found in modules.items():
        if missing := {"a", "b"} - found.keys():
            name = next(iter(found.values())).name
            raise UserError(f"{path} holds {name} without the factor {missing.pop()} of {module}", AGAIN)
    return modules


def _check(module: str, found: Mapping[str, Tensor], table: Table) -> int:
    """The rank of a module's factors; raises UserError if they do not fit the base."""
    name = f"{module}.weight"
    if name not in table.tensors or name == table.entries["embed"].rule.name or len(table.shape(name)) != 2:
        raise UserError(
            f"{found['a'].name} is a factor of {module}, which is not a matrix of this model",
            "The adapter is for another model, or of a type that camelid does not support.",
        )
    outputs, inputs = table.shape(name)
    a, b = found["a"].shape, found["b"].shape
    if len(a) != 2 or not a[0] or a[1] != inputs or b != (outputs, a[0]):
        raise UserError(
            f"the factors of {module} have shapes {a} and {b}; the base, {(outputs, inputs)}, requires "
            f"(rank, {inputs}) and ({outputs}, rank)",
            "The adapter is for another model.",
        )
    for tensor in found.values():
        if tensor.dtype not in CODES:
            raise UserError(f"{tensor.name} is {tensor.dtype}", f"Save it as {', '.join(d.name for d in CODES)}.")
    return a[0]


def _outputs(rules: Sequence[TensorRule], config: ModelConfig, rank: int) -> Table:
    """The table of the factors B: each is its matrix, with the rank in place of the inputs."""

    def first(axes: str, count: int) -> str:
        return " ".join([*re.findall(r"\([^)]*\)|\S+", axes)[:count], "rank"])

    matrices = {path: spec for path, spec in named(declare_decoder(config)).items() if spec.is_matrix}
    factors = {
        path: Spec(
            spec.stacked,
            spec.outputs,
            ("rank",),
            (*spec.shape[: len(spec.stacked) + len(spec.outputs)], rank),
            spec.init,
        )
        for path, spec in matrices.items()
    }
    own = [
        replace(
            rule,
            axes=first(rule.axes, 1),
            ours=first(rule.ours, len(matrices[rule.path].outputs)) if rule.ours else "",
        )
        for rule in rules
        if rule.path in matrices
    ]
    return make_table(own, factors, {**config.axis_sizes, **mindspore.SIZES, "rank": rank})


def _alpha(path: Path, ranks: Sequence[int], given: float | None) -> float:
    """The alpha of factors of these ranks: the one that is given, or else that of a configuration in the folder."""
    if given is not None:
        return given
    folder = path if path.is_dir() else path.parent
    files = [*folder.glob("*.yaml"), *folder.glob("*.yml"), *folder.glob("mindformers_adapter_config.json")]
    texts = {file: read_text(file) for file in sorted(files)}
    alphas = [(file, number) for file, text in texts.items() for number in sorted(_numbers("lora_alpha", file, text))]
    if len({number for _, number in alphas}) != 1:
        found = ", ".join(f"{alpha:g} in {file.name}" for file, alpha in alphas)
        raise UserError(
            f"{path} holds LoRA factors of rank {', '.join(map(str, ranks))}, and "
            + (f"their lora_alpha is ambiguous: {found}" if found else "not their lora_alpha, which scales them"),
            "It is in the pet_config of the YAML with which MindFormers trained them: give --lora-alpha NUMBER, or "
            f"copy that YAML to {folder}.",
        )
    file, alpha = alphas[0]
    if (configured := _numbers("lora_rank", file, texts[file])) and {int(rank) for rank in configured} != {*ranks}:
        raise UserError(
            f"{file} has lora_rank {', '.join(f'{rank:g}' for rank in configured)}, and the factors in {path} have "
            f"rank {', '.join(map(str, ranks))}",
            "It is of another run: copy the YAML of this one, or give --lora-alpha NUMBER.",
        )
    return alpha


def _numbers(field: str, file: Path, text: str) -> set[float]:
    """The values of a field in YAML or JSON; raises UserError for one that is not a number above 0."""
    found = re.findall(rf"^[^#\n]*\b{field}[\"']?\s*:\s*([0-9][^\s,}}#]*)", text, re.MULTILINE)
    try:
        numbers = set(map(float, found))
    except ValueError:
        numbers = {0.0}
    if not all(0 < number < math.inf for number in numbers):
        raise UserError(
            f"{file} has {field} = {', '.join(found)}",
            "It is a number above 0: correct it, or give --lora-alpha NUMBER.",
        )
    return numbers
