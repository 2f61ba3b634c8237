"""PEFT's LoRA adapters: adapter_config.json with adapter_model.safetensors or .bin, opened with the base they name.

The names of tensors (peft/utils/save_and_load.py), where M is a module of the model in transformers:

    base_model.model.M.lora_A.weight        A, and lora_B.weight B
    base_model.model.M.lora_magnitude_vector  with DoRA, the length of each row
    base_model.model.M.lora_embedding_A     for the embedding table: B transposed; lora_embedding_B is A transposed
    base_model.model.M.weight               a module of modules_to_save, which replaces that of the base
    base_model.model.M.base_layer.weight    the same, if M has A and B too
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from camelid.checkpoint.adapters.lora import (
    AdaptedCheckpoint,
    Adapter,
    ComputedTensor,
    Pair,
    ParameterKey,
    merged_reader,
    plain_table,
)
from camelid.checkpoint.adapters.peft_config import NAME, Settings, config_json, read_settings
from camelid.checkpoint.checkpoint import Checkpoint
from camelid.checkpoint.containers.safetensors import open_safetensors, safetensors_file
from camelid.checkpoint.containers.torch_files import open_torch
from camelid.checkpoint.files import PlannedFile, TensorPayload, json_file, raw_payload
from camelid.checkpoint.formats import hf
from camelid.checkpoint.formats.config_source import read_model_config
from camelid.checkpoint.hub import find_checkpoint_folder, with_revision
from camelid.checkpoint.layout import (
    Index,
    ParameterEntry,
    Table,
    slice_reader,
    tensor_chunks,
)
from camelid.checkpoint.tensors import CODES, PlannedTensor, Tensor, same_values
from camelid.disk.json_files import read_json
from camelid.errors import UserError
from camelid.inputs import expand_home
from camelid.model.config import ModelConfig

FILES = {"adapter_model.safetensors": open_safetensors, "adapter_model.bin": open_torch}
START = "base_model.model."
KEY = re.compile(
    re.escape(START)
    + r"(?P<module>.+?)\.(?:(?P<factor>lora_[AB]\.weight|lora_embedding_[AB]|lora_magnitude_vector)"
    + r"|(?:base_layer\.)?(?P<tensor>weight|bias))"
)
COPY = re.compile(
    re.escape(START) + r"(?P<module>.+)\.(?P<which>modules_to_save|original_module)\.(?P<tensor>weight|bias)"
)
FACTORS = {False: ("lora_A.weight", "lora_B.weight"), True: ("lora_embedding_B", "lora_embedding_A")}
"""a and b of a pair, by whether it is the embedding table's, which PEFT transposes"""
MAGNITUDE = "lora_magnitude_vector"
HEAD = ("embed", "lm_head")
TILE = (256, 2048)
AGAIN = "Download or copy the adapter again."


def matches(path: Path) -> bool:
    """Whether a folder has adapter_config.json."""
    return (path / NAME).is_file()


def open_checkpoint(folder: Path, config: ModelConfig | None = None, ignore: Sequence[str] = ()) -> AdaptedCheckpoint:
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
        return find_checkpoint_folder(
            with_revision(settings.base, settings.revision), partial(read_model_config, ignore=ignore)
        )
    except UserError as error:
        raise UserError(
            f"the base of {folder} cannot be opened: {error.problem}",
            f"Correct base_model_name_or_path in {NAME}, or name the base in `camelid delta apply BASE ADAPTER`.",
        ) from error


def on_base(
    adapter: Adapter, base: Checkpoint, folder: Path, format: str = "peft", files: Sequence[Path] | None = None
) -> AdaptedCheckpoint:
    """Returns the checkpoint of a base, of any format, with an adapter; tensors are read on demand.

    `files` hold the adapter; None: those of PEFT in `folder`.
    """
    rows, reader, dtypes = plain_table(adapter.config), merged_reader(adapter, base), base.dtypes
    notes, tensors = base.notes, {}
    if files is None:
        files = [path for path in folder.iterdir() if path.name in (NAME, *FILES)]
    sources = frozenset([*files, *base.files])
    for name, [(part, layer)] in rows.tensors.items():
        parameter = part.rule.path, layer
        saved = adapter.saved.get(parameter)
        path = "embed" if parameter[0] == "lm_head" and base.config.tie_embeddings else parameter[0]
        dtype = dtypes[path] if saved is None else saved.dtype
        tensors[name] = ComputedTensor(folder / NAME, name, 0, rows.shape(name), dtype, reader, parameter, sources)
    if adapter.config.tie_embeddings != base.config.tie_embeddings:
        notes += ("the adapter changes the embedding table or the head, so the head is no longer tied",)
    tokenizer_folder = folder if any(folder.glob("tokenizer*")) else base.tokenizer_folder
    return AdaptedCheckpoint(format, tokenizer_folder, adapter.config, tensors, rows, notes, adapter=adapter, base=base)


def open_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """Reads an adapter for a base with this config; `pairs` are kept in memory, `saved` are read on demand.

    Raises UserError if the files are damaged, of another model, or inconsistent, or if it is not a LoRA adapter.
    """
    settings = read_settings(read_json(folder / NAME))
    tensors = _without_copies(_open_file(folder))
    rows = _names(config)
    factors: dict[str, dict[str, Tensor]] = {}
    saved_tensors: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        key = KEY.fullmatch(name)
        if key is None or f"{key['module']}.{key['tensor'] or 'weight'}" not in rows.tensors:
            raise UserError(
                f"{tensor.file} contains {name}, which is not a LoRA tensor of this model",
                "The adapter is for another model, or of a type that camelid does not support.",
            )
        if tensor.dtype not in CODES:
            raise UserError(f"{name} is {tensor.dtype}", f"Save the adapter as {', '.join(d.name for d in CODES)}.")
        if key["tensor"]:
            saved_tensors[f"{key['module']}.{key['tensor']}"] = tensor
        else:
            factors.setdefault(key["module"], {})[key["factor"]] = tensor
    config = _adapted_config(config, rows, factors, saved_tensors)
    rows = _names(config)
    _check_saved(settings, rows, saved_tensors)
    _check_targets(settings, rows, factors)
    pairs: dict[ParameterKey, Pair] = {}
    for module, found in factors.items():
        pair = _read_pair(module, found, settings, rows)
        for part, layer in rows.tensors[f"{module}.weight"]:
            own = slice(part.start, part.start + _height(part))
            magnitude = None if pair.magnitude is None else pair.magnitude[own]
            pairs[part.rule.path, layer] = replace(pair, b=pair.b[own], magnitude=magnitude)
    reader = slice_reader(rows, saved_tensors)
    saved = {
        (part.rule.path, layer): ComputedTensor(
            tensor.file,
            name,
            0,
            part.spec.shape[len(part.spec.stacked) :],
            tensor.dtype,
            reader,
            (part.rule.path, layer),
        )
        for name, tensor in saved_tensors.items()
        for part, layer in rows.tensors[name]
    }
    name = settings.base
    if name and not (folder / expand_home(name)).is_dir():
        name = with_revision(name, settings.revision)
    return Adapter(config, pairs, saved, settings.rslora, settings.dropout, name)


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
        kept = tensors.get(f"{START}{key['module']}.{key['tensor']}") if key else None
        if key and kept is not None and (key["which"] == "original_module" or same_values(tensor, kept)):
            del left[name]
    return left


def _adapted_config(
    config: ModelConfig, rows: Table, factors: Mapping[str, object], saved: Mapping[str, Tensor]
) -> ModelConfig:
    """Returns the config of the adapted model, which may have more tokens and an untied head."""
    names = [rows.entries[path].rule.name for path in HEAD]
    if any(name in saved or name.removesuffix(".weight") in factors for name in names):
        config = replace(config, tie_embeddings=False)
    sizes = {saved[name].shape[0] for name in names if name in saved and saved[name].shape}
    if sizes - {config.vocab_size} and all(name in saved for name in names):
        config = replace(config, vocab_size=max(sizes))
    return config


def _check_saved(settings: Settings, rows: Table, saved: Mapping[str, Tensor]) -> None:
    """Raises UserError if tensors of saved modules are missing or have another shape than the base."""
    for name, tensor in saved.items():
        if tensor.shape != rows.shape(name):
            raise UserError(
                f"{tensor.name} has shape {tensor.shape}, and that of the base has shape {rows.shape(name)}",
                "The adapter is for another model; one with more tokens must contain embed_tokens and lm_head.",
            )
    for end in settings.saved:
        selected = [name for name in rows.tensors if name.rpartition(".")[0].endswith(end)]
        if not selected:
            raise UserError(f"{NAME} has {end!r} in modules_to_save, and the base has no such module", AGAIN)
        if missing := [name for name in selected if name not in saved]:
            raise UserError(f"the adapter lacks {START}{missing[0]}, which modules_to_save requires", AGAIN)


def _check_targets(settings: Settings, rows: Table, factors: Mapping[str, object]) -> None:
    """Raises UserError if the modules with factors are not those that adapter_config.json targets."""
    matrices = [name.removesuffix(".weight") for name in rows.tensors if len(rows.shape(name)) == 2]
    targeted = [module for module in matrices if settings.targeted(module)]
    if missing := [module for module in targeted if module not in factors]:
        raise UserError(f"the adapter lacks {START}{missing[0]}.lora_A.weight, which target_modules requires", AGAIN)
    if extra := [module for module in factors if module not in targeted]:
        raise UserError(f"the adapter contains {START}{extra[0]}, which {NAME} does not target", AGAIN)


def _read_pair(module: str, found: Mapping[str, Tensor], settings: Settings, rows: Table) -> Pair:
    """Returns the factors of a tensor of the base; raises UserError if their names or shapes do not fit."""
    name = f"{module}.weight"
    flipped, rank = name == rows.entries["embed"].rule.name, settings.rank_of(module)
    outputs, inputs = rows.shape(name)
    if settings.dora and flipped:
        raise UserError(
            f"{NAME} has use_dora, and the adapter contains {START}{module}",
            "PEFT rescales the columns of an embedding table, and camelid rows; merge it with PEFT's merge_and_unload.",
        )
    shapes = dict(zip(FACTORS[flipped], ((rank, inputs), (outputs, rank)), strict=True))
    shapes |= {MAGNITUDE: (outputs,)} if settings.dora else {}
    if found.keys() != shapes.keys():
        kind = "DoRA" if settings.dora else "LoRA"
        raise UserError(f"{START}{module} has {' and '.join(found)}; {kind} has {' and '.join(sorted(shapes))}", AGAIN)
    arrays = []
    for key, shape in shapes.items():
        tensor, shape = found[key], shape[::-1] if flipped else shape
        if tensor.shape != shape:
            raise UserError(
                f"{tensor.name} has shape {tensor.shape}; with rank {rank}, the base requires {shape}",
                f"{NAME}, the adapter and the base do not belong together.",
            )
        array = tensor.read(tuple(slice(0, n) for n in shape), tensor.dtype)
        arrays.append(array.T if flipped else array)
    a, b, *magnitude = arrays
    return Pair(a, b, settings.alpha_of(module), *magnitude)


# Writing --------------------------------------------------------------------------------


def base_name(base: str | Path) -> str:
    """The name of a base of the format hf in an adapter: an absolute path, or a name on the Hub."""
    path = Path(expand_home(str(base).removeprefix("hf::")))
    return str(path.resolve()) if path.exists() else str(base).removeprefix("hf::")


def adapter_files(adapter: Adapter) -> list[PlannedFile]:
    """Plans the files of an adapter for PEFT's PeftModel.from_pretrained, which accepts a `base` of None."""
    rows = _names(adapter.config)
    assert adapter.pairs, "an adapter without a pair"
    arrays: dict[str, np.ndarray] = {}
    modules: dict[str, Pair] = {}
    payloads, saved_modules = [], set()
    for name, members in rows.tensors.items():
        module = name.rpartition(".")[0]
        pairs = [adapter.pairs.get((part.rule.path, layer)) for part, layer in members]
        saved = [adapter.saved.get((part.rule.path, layer)) for part, layer in members]
        if any(pairs):
            pair = modules[module] = _joined(adapter, pairs, [_height(part) for part, _ in members])
            flipped = members[0][0].rule.path == "embed"
            for key, array in zip(FACTORS[flipped], (pair.a, pair.b), strict=True):
                arrays[f"{START}{module}.{key}"] = np.ascontiguousarray(array.T if flipped else array)
            if pair.magnitude is not None:
                arrays[f"{START}{module}.{MAGNITUDE}"] = np.ascontiguousarray(pair.magnitude)
        if saved[0] is not None:
            assert all(saved), f"{name} is saved in part"
            saved_modules |= set() if any(pairs) else {module}
            key = f"{START}{module}.base_layer.weight" if any(pairs) else START + name
            payloads.append(_saved_payload(PlannedTensor(key, rows.shape(name), saved[0].dtype), name, rows, adapter))
    for name, array in arrays.items():
        payloads.append(raw_payload(PlannedTensor(name, array.shape, array.dtype), lambda array=array: [array]))
    order = {np.dtype(np.float32): 0, np.dtype(np.float16): 2}
    # In the order of the safetensors library, so that the bytes equal PEFT's.
    payloads.sort(key=lambda s: (order.get(s.tensor.dtype, 1), s.tensor.name))
    settings = config_json(
        {module: pair.rank for module, pair in modules.items()},
        {module: pair.alpha for module, pair in modules.items()},
        saved_modules,
        {name.rpartition(".")[0] for name in rows.tensors},
        base=adapter.base,
        rslora=adapter.rslora,
        dora=adapter.dora,
        dropout=adapter.dropout,
    )
    return [safetensors_file(next(iter(FILES)), payloads), json_file(NAME, settings)]


def _saved_payload(tensor: PlannedTensor, name: str, rows: Table, adapter: Adapter) -> TensorPayload:
    """Plans a tensor that replaces one of the base."""

    def read_slice(path: str, layer: int | None, index: Index, dtype: np.dtype) -> np.ndarray:
        return adapter.saved[path, layer].read(index, dtype)

    return raw_payload(tensor, lambda: tensor_chunks(rows, name, tensor.dtype, read_slice))


def _joined(adapter: Adapter, pairs: Sequence[Pair | None], heights: Sequence[int]) -> Pair:
    """Returns the factors of a tensor of concatenated parameters; different `a` become blocks of a larger rank."""
    given = [pair for pair in pairs if pair is not None]
    first = given[0]
    if len(pairs) == 1:
        return first
    magnitude = None
    if first.magnitude is not None:
        assert len(given) == len(pairs), "with DoRA, a row without a magnitude of its own would need that of the base"
        magnitude = np.concatenate([pair.magnitude for pair in given if pair.magnitude is not None])
    if all(pair.alpha == first.alpha and np.array_equal(pair.a, first.a) for pair in given):
        b = [
            np.zeros((n, first.rank), first.b.dtype) if pair is None else pair.b
            for pair, n in zip(pairs, heights, strict=True)
        ]
        return replace(first, b=np.concatenate(b), magnitude=magnitude)
    rank, top, left = sum(pair.rank for pair in given), 0, 0
    b = np.zeros((sum(heights), rank), first.b.dtype)
    for pair, height in zip(pairs, heights, strict=True):
        if pair is not None:
            ratio = np.float32(adapter.scale(pair) / adapter.scale(first))
            b[top : top + height, left : left + pair.rank] = ratio * pair.b.astype(np.float32)
            left += pair.rank
        top += height
    alpha = adapter.scale(first) * (math.sqrt(rank) if adapter.rslora else rank)
    return Pair(np.concatenate([pair.a for pair in given]), b, alpha, magnitude)
