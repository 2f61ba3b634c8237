"""PEFT's LoRA adapters: adapter_config.json with adapter_model.safetensors or .bin, opened with the base they name.

    W + scale * (B @ A)     W (outputs, inputs), B (outputs, rank), A (rank, inputs)
    scale                   alpha / rank, or with rsLoRA alpha / sqrt(rank)

The names of tensors (peft/utils/save_and_load.py), where M is a module of the model in transformers:

    base_model.model.M.lora_A.weight        A, and lora_B.weight B
    base_model.model.M.lora_embedding_A     for the embedding table: B transposed; lora_embedding_B is A transposed
    base_model.model.M.weight               a module of modules_to_save, which replaces that of the base
    base_model.model.M.base_layer.weight    the same, if M has A and B too
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from camelid.checkpoint.adapters.peft_config import NAME, Settings, read_settings, written
from camelid.checkpoint.checkpoint import Checkpoint
from camelid.checkpoint.containers.safetensors import open_safetensors, safetensors_file
from camelid.checkpoint.containers.torch_files import open_torch
from camelid.checkpoint.files import PlannedFile, TensorPayload, json_file, raw_payload
from camelid.checkpoint.formats import hf
from camelid.checkpoint.formats.config_source import read_model_config
from camelid.checkpoint.hub import find_checkpoint_folder
from camelid.checkpoint.layout import (
    Index,
    ParameterEntry,
    SliceReader,
    Table,
    TensorRule,
    make_table,
    slice_reader,
    tensor_chunks,
)
from camelid.checkpoint.tensors import CODES, PlannedTensor, Tensor, rounded, same_values
from camelid.disk.json_files import read_json
from camelid.errors import UserError
from camelid.inputs import expand_home
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import named

FILES = {"adapter_model.safetensors": open_safetensors, "adapter_model.bin": open_torch}
START = "base_model.model."
KEY = re.compile(
    re.escape(START)
    + r"(?P<module>.+?)\.(?:(?P<factor>lora_[AB]\.weight|lora_embedding_[AB])|(?:base_layer\.)?(?P<whole>weight|bias))"
)
COPY = re.compile(
    re.escape(START) + r"(?P<module>.+)\.(?P<which>modules_to_save|original_module)\.(?P<whole>weight|bias)"
)
FACTORS = {False: ("lora_A.weight", "lora_B.weight"), True: ("lora_embedding_B", "lora_embedding_A")}
"""a and b of a pair, by whether it is the embedding table's, which PEFT transposes"""
HEAD = ("embed", "lm_head")
TILE = (256, 2048)
AGAIN = "Download or copy the adapter again."

ParameterKey = tuple[str, int | None]
"""a parameter's path and its layer, None for one without"""


@dataclass(frozen=True)
class Pair:
    """The factors of one matrix's update, scale * (b @ a)."""

    a: np.ndarray
    """(rank, inputs), with the matrix's input axes flattened"""
    b: np.ndarray
    """(outputs, rank), with the matrix's output axes flattened"""
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, keyed by camelid's parameters."""

    config: ModelConfig
    """of the adapted model: a tied head becomes untied if the adapter changes the head or the embedding table"""
    pairs: Mapping[ParameterKey, Pair]
    saved: Mapping[ParameterKey, Tensor] = field(default_factory=dict)
    """parameters that replace those of the base, one layer each, in camelid's axes"""
    rslora: bool = False
    dropout: float = 0.0
    """the dropout used in training"""
    base: str | None = None
    """a name on the Hub, or a path"""

    def scale(self, pair: Pair) -> float:
        """Returns the factor of b @ a."""
        return pair.alpha / (math.sqrt(pair.rank) if self.rslora else pair.rank)


# On a base ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Computed(Tensor):
    """A layer of a parameter whose values are computed on demand."""

    reader: SliceReader
    place: ParameterKey
    lies_in: frozenset[Path] = frozenset()

    @property
    def files(self) -> frozenset[Path]:
        """All files from which it is computed."""
        return self.lies_in

    def read_into(self, out: np.ndarray, index: Index) -> None:
        """Fills `out`, contiguous and of the shape that `index` cuts, with values of its dtype."""
        out[...] = self.reader(*self.place, index, out.dtype)


def held(array: np.ndarray) -> Tensor:
    """Returns an array as a tensor, for Adapter.saved."""
    return Computed(
        Path(),
        "",
        0,
        array.shape,
        array.dtype,
        lambda path, layer, index, dtype: rounded("the adapter", array[index], dtype),
        ("", None),
    )


@dataclass(frozen=True, kw_only=True)
class Adapted(Checkpoint):
    """A base with an adapter, which is added on demand."""

    adapter: Adapter
    base: Checkpoint

    @property
    def read_slice(self) -> SliceReader:
        """The values: sums are computed in float32 and rounded once, to the requested dtype."""
        return adapted(self.adapter, self.base)


def adapted(adapter: Adapter, base: Checkpoint) -> SliceReader:
    """Returns a reader of a base of any format with an adapter; sums are computed in float32 and rounded once."""
    specs, base_source = named(declare_decoder(adapter.config)), base.read_slice

    def source(path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
        pair, saved = adapter.pairs.get((path, layer)), adapter.saved.get((path, layer))
        asked = dtype if pair is None else np.dtype(np.float32)
        if saved is not None:
            values = saved.read(index, asked)
        else:
            tied = path == "lm_head" and base.config.tie_embeddings
            values = base_source("embed" if tied else path, layer, index, asked)
        if pair is None:
            return values
        spec = specs[path]
        shape, cut = spec.shape[len(spec.stacked) :], len(spec.outputs)
        added = _product(pair, _flat(index[:cut], shape[:cut]), _flat(index[cut:], shape[cut:]))
        added = added.reshape(-1, *shape[1:cut], index[cut].stop - index[cut].start, *shape[cut + 1 :])
        added = added[:, *index[1:cut], :, *index[cut + 1 :]]
        return rounded(path, values + np.float32(adapter.scale(pair)) * added, dtype)

    return source


def _flat(index: Index, shape: Sequence[int]) -> slice:
    """Returns the slice of the flattened axes that contains `index`, with all axes but the first complete."""
    width = math.prod(shape[1:])
    return slice(index[0].start * width, index[0].stop * width)


def _product(pair: Pair, rows: slice, columns: slice) -> np.ndarray:
    """Returns a slice of b @ a in float32, computed in tiles of a fixed grid so that no bit depends on the slice."""
    out = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.float32)
    for i in range(rows.start // TILE[0] * TILE[0], rows.stop, TILE[0]):
        for j in range(columns.start // TILE[1] * TILE[1], columns.stop, TILE[1]):
            factors = pair.b[i : i + TILE[0]], pair.a[:, j : j + TILE[1]]
            b, a = (np.ascontiguousarray(factor, np.float32) for factor in factors)
            top, left = max(i, rows.start), max(j, columns.start)
            tile = (b @ a)[top - i : rows.stop - i, left - j : columns.stop - j]
            out[top - rows.start :, left - columns.start :][: tile.shape[0], : tile.shape[1]] = tile
    return out


def on_base(adapter: Adapter, base: Checkpoint, folder: Path) -> Adapted:
    """Returns the checkpoint of a base, of any format, with an adapter; tensors are read on demand."""
    rows, source, dtypes = plain_table(adapter.config), adapted(adapter, base), base.dtypes
    notes, tensors = base.notes, {}
    files = frozenset({path for path in folder.iterdir() if path.name in (NAME, *FILES)})
    files |= frozenset(base.files)
    for name, [(part, layer)] in rows.tensors.items():
        place = part.rule.path, layer
        saved = adapter.saved.get(place)
        path = "embed" if place[0] == "lm_head" and base.config.tie_embeddings else place[0]
        dtype = dtypes[path] if saved is None else saved.dtype
        tensors[name] = Computed(folder / NAME, name, 0, rows.shape(name), dtype, source, place, files)
    if adapter.config.tie_embeddings != base.config.tie_embeddings:
        notes += ("the adapter changes the embedding table or the head, so the head is not tied any more",)
    beside = folder if any(folder.glob("tokenizer*")) else base.tokenizer_folder
    return Adapted("peft", beside, adapter.config, tensors, rows, notes, adapter=adapter, base=base)


def plain_table(config: ModelConfig) -> Table:
    """Returns a table with one tensor per layer of each parameter, with camelid's path and shape."""
    specs = named(declare_decoder(config))
    rows = [
        TensorRule(path, path + ".{layer}" * bool(spec.stacked), " ".join(spec.outputs + spec.inputs))
        for path, spec in specs.items()
    ]
    return make_table(rows, specs, config.axis_sizes)


# Reading --------------------------------------------------------------------------------


def matches(path: Path) -> bool:
    """Whether a folder has adapter_config.json."""
    return (path / NAME).is_file()


def open_checkpoint(folder: Path, config: ModelConfig | None = None, ignore: Sequence[str] = ()) -> Adapted:
    """Opens an adapter with the base that it names: a folder relative to its own, a path, or a name on the Hub.

    The fields of the base's config.json in `ignore` are treated as absent. Raises UserError if files are damaged or do
    not match, or if the adapter is not a LoRA adapter.
    """
    if config is not None:
        raise UserError(f"{folder} is an adapter, whose model is that of its base", "Remove the config.")
    if not matches(folder):
        raise UserError(f"{folder} has no {NAME}", "Give the folder of a PEFT adapter.")
    base = hf.open_checkpoint(_base_of(folder, ignore), ignore=ignore)
    return on_base(open_adapter(folder, base.config), base, folder)


def _base_of(folder: Path, ignore: Sequence[str]) -> Path:
    settings = read_settings(read_json(folder / NAME))
    if not settings.base:
        raise UserError(f"{folder / NAME} does not name the adapter's base", "Write it as base_model_name_or_path.")
    if (near := folder / expand_home(settings.base)).is_dir():
        return near
    try:
        name = f"{settings.base}@{settings.revision}" if settings.revision else settings.base
        return find_checkpoint_folder(name, partial(read_model_config, ignore=ignore))
    except UserError as error:
        raise UserError(
            f"the base of {folder} cannot be opened: {error.problem}",
            f"Correct base_model_name_or_path in {NAME}, or name the base in `camelid delta apply BASE ADAPTER`.",
        ) from error


def open_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """Reads an adapter for a base with this config; `pairs` are kept in memory, `saved` are read on demand.

    Raises UserError if the files are damaged, of another model, or inconsistent, or if it is not a LoRA adapter.
    """
    settings = read_settings(read_json(folder / NAME))
    tensors = _without_copies(_open_file(folder))
    rows = _names(config)
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = KEY.fullmatch(name)
        if key is None or f"{key['module']}.{key['whole'] or 'weight'}" not in rows.tensors:
            raise UserError(
                f"{tensor.file} contains {name}, which is not a LoRA tensor of this model",
                "The adapter is for another model, or of a type that camelid does not support.",
            )
        if tensor.dtype not in CODES:
            raise UserError(f"{name} is {tensor.dtype}", f"Save the adapter as {', '.join(d.name for d in CODES)}.")
        if key["whole"]:
            whole[f"{key['module']}.{key['whole']}"] = tensor
        else:
            factors.setdefault(key["module"], {})[key["factor"]] = tensor
    config = _as_changed(config, rows, factors, whole)
    rows = _names(config)
    _check_whole(settings, rows, whole)
    _check_targets(settings, rows, factors)
    pairs: dict[ParameterKey, Pair] = {}
    for module, found in factors.items():
        pair = _read_pair(module, found, settings, rows)
        for part, layer in rows.tensors[f"{module}.weight"]:
            pairs[part.rule.path, layer] = replace(pair, b=pair.b[part.start : part.start + _height(part)])
    source = slice_reader(rows, whole)
    saved = {
        (part.rule.path, layer): Computed(
            tensor.file,
            name,
            0,
            part.spec.shape[len(part.spec.stacked) :],
            tensor.dtype,
            source,
            (part.rule.path, layer),
        )
        for name, tensor in whole.items()
        for part, layer in rows.tensors[name]
    }
    return Adapter(config, pairs, saved, settings.rslora, settings.dropout, settings.base)


def _names(config: ModelConfig) -> Table:
    """Returns the tensors of a model in transformers, with a head."""
    return hf.table_of(replace(config, tie_embeddings=False))


def _height(part: ParameterEntry) -> int:
    """Returns the number of rows of a parameter in its tensor."""
    return math.prod(part.sizes[word] for word in part.file_axes[0])


def _open_file(folder: Path) -> dict[str, Tensor]:
    for name, open_file in FILES.items():
        if (folder / name).is_file():
            return open_file(folder / name)
    raise UserError(f"{folder} has neither {' nor '.join(FILES)}", AGAIN)


def _without_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Removes the copies that PEFT writes for an extended vocabulary: of saved modules, and of those they replace."""
    left = dict(tensors)
    for name, tensor in tensors.items():
        key = COPY.fullmatch(name)
        kept = tensors.get(f"{START}{key['module']}.{key['whole']}") if key else None
        if key and kept is not None and (key["which"] == "original_module" or same_values(tensor, kept)):
            del left[name]
    return left


def _as_changed(
    config: ModelConfig, rows: Table, factors: Mapping[str, object], whole: Mapping[str, Tensor]
) -> ModelConfig:
    """Returns the config of the adapted model, which may have more tokens and an untied head."""
    names = [rows.entries[path].rule.name for path in HEAD]
    if any(name in whole or name.removesuffix(".weight") in factors for name in names):
        config = replace(config, tie_embeddings=False)
    sizes = {whole[name].shape[0] for name in names if name in whole and whole[name].shape}
    if sizes - {config.vocab_size} and all(name in whole for name in names):
        config = replace(config, vocab_size=max(sizes))
    return config


def _check_whole(settings: Settings, rows: Table, whole: Mapping[str, Tensor]) -> None:
    for name, tensor in whole.items():
        if tensor.shape != rows.shape(name):
            raise UserError(
                f"{tensor.name} has shape {tensor.shape}, and the base asks for {rows.shape(name)}",
                "The adapter is of another model; one with more tokens must hold embed_tokens and lm_head whole.",
            )
    for end in settings.saved:
        asked = [name for name in rows.tensors if name.rpartition(".")[0].endswith(end)]
        if not asked:
            raise UserError(f"{NAME} has {end!r} in modules_to_save, and the base has no such module", AGAIN)
        if missing := [name for name in asked if name not in whole]:
            raise UserError(f"the adapter lacks {START}{missing[0]}, which modules_to_save asks for", AGAIN)


def _check_targets(settings: Settings, rows: Table, factors: Mapping[str, object]) -> None:
    matrices = [name.removesuffix(".weight") for name in rows.tensors if len(rows.shape(name)) == 2]
    asked = [module for module in matrices if settings.targeted(module)]
    if missing := [module for module in asked if module not in factors]:
        raise UserError(f"the adapter lacks {START}{missing[0]}.lora_A.weight, which target_modules asks for", AGAIN)
    if extra := [module for module in factors if module not in asked]:
        raise UserError(f"the adapter holds {START}{extra[0]}, which {NAME} does not target", AGAIN)


def _read_pair(module: str, found: Mapping[str, Tensor], settings: Settings, rows: Table) -> Pair:
    """The pair of a tensor of the base, checked."""
    name = f"{module}.weight"
    flipped, rank = name == rows.entries["embed"].rule.name, settings.rank_of(module)
    outputs, inputs = rows.shape(name)
    arrays = []
    for key, shape in zip(FACTORS[flipped], ((rank, inputs), (outputs, rank)), strict=True):
        if key not in found or len(found) != 2:
            raise UserError(
                f"{START}{module} has {' and '.join(found)}; LoRA has {' and '.join(sorted(FACTORS[flipped]))}", AGAIN
            )
        tensor, shape = found[key], shape[::-1] if flipped else shape
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.name} has shape {tensor.shape}; rank {rank} and the base ask for {shape}",
                f"{NAME}, the adapter and the base do not belong together.",
            )
        array = tensor.read(tuple(slice(0, n) for n in shape), tensor.dtype)
        arrays.append(array.T if flipped else array)
    a, b = arrays
    return Pair(a, b, settings.alpha_of(module))


# Writing --------------------------------------------------------------------------------


def adapter_files(adapter: Adapter) -> list[PlannedFile]:
    """Plans the files of an adapter for PEFT's PeftModel.from_pretrained, which accepts a `base` of None."""
    rows = _names(adapter.config)
    assert adapter.pairs, "an adapter without a pair"
    arrays: dict[str, np.ndarray] = {}
    modules: dict[str, Pair] = {}
    payloads, whole = [], set()
    for name, members in rows.tensors.items():
        module = name.rpartition(".")[0]
        pairs = [adapter.pairs.get((part.rule.path, layer)) for part, layer in members]
        saved = [adapter.saved.get((part.rule.path, layer)) for part, layer in members]
        if any(pairs):
            pair = modules[module] = _joined(adapter, pairs, [_height(part) for part, _ in members])
            flipped = members[0][0].rule.path == "embed"
            for key, array in zip(FACTORS[flipped], (pair.a, pair.b), strict=True):
                arrays[f"{START}{module}.{key}"] = np.ascontiguousarray(array.T if flipped else array)
        if saved[0] is not None:
            assert all(saved), f"{name} is saved in part"
            whole |= set() if any(pairs) else {module}
            key = f"{START}{module}.base_layer.weight" if any(pairs) else START + name
            payloads.append(_whole(PlannedTensor(key, rows.shape(name), saved[0].dtype), name, rows, adapter))
    for name, array in arrays.items():
        payloads.append(raw_payload(PlannedTensor(name, array.shape, array.dtype), lambda array=array: [array]))
    order = {np.dtype(np.float32): 0, np.dtype(np.float16): 2}
    # In the order of the safetensors library, so that the bytes equal PEFT's.
    payloads.sort(key=lambda s: (order.get(s.tensor.dtype, 1), s.tensor.name))
    settings = written(
        {module: pair.rank for module, pair in modules.items()},
        {module: pair.alpha for module, pair in modules.items()},
        whole,
        {name.rpartition(".")[0] for name in rows.tensors},
        base=adapter.base,
        rslora=adapter.rslora,
        dropout=adapter.dropout,
    )
    return [safetensors_file(next(iter(FILES)), payloads), json_file(NAME, settings)]


def _whole(tensor: PlannedTensor, name: str, rows: Table, adapter: Adapter) -> TensorPayload:
    def source(path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
        return adapter.saved[path, layer].read(index, dtype)

    return raw_payload(tensor, lambda: tensor_chunks(rows, name, tensor.dtype, source))


def _joined(adapter: Adapter, pairs: Sequence[Pair | None], heights: Sequence[int]) -> Pair:
    """Returns the factors of a tensor of concatenated parameters; different `a` become blocks of a larger rank."""
    given = [pair for pair in pairs if pair is not None]
    first = given[0]
    if len(pairs) == 1:
        return first
    if all(pair.alpha == first.alpha and np.array_equal(pair.a, first.a) for pair in given):
        b = [
            np.zeros((n, first.rank), first.b.dtype) if pair is None else pair.b
            for pair, n in zip(pairs, heights, strict=True)
        ]
        return replace(first, b=np.concatenate(b))
    rank, top, left = sum(pair.rank for pair in given), 0, 0
    b = np.zeros((sum(heights), rank), first.b.dtype)
    for pair, height in zip(pairs, heights, strict=True):
        if pair is not None:
            ratio = np.float32(adapter.scale(pair) / adapter.scale(first))
            b[top : top + height, left : left + pair.rank] = ratio * pair.b.astype(np.float32)
            left += pair.rank
        top += height
    alpha = adapter.scale(first) * (math.sqrt(rank) if adapter.rslora else rank)
    return Pair(np.concatenate([pair.a for pair in given]), b, alpha)
