"""Models in PyTorch's distributed checkpoints: Megatron-LM's torch_dist, torchtitan's, and those of FSDP.

Tensors have their unsharded shapes there, whatever the number of ranks. The system is detected from their names:

    Megatron-LM     embedding.word_embeddings.weight, ...; layers separate or stacked; args in common.pt
    torchtitan      tok_embeddings.weight, ...: Meta's names, with Meta's order of rotary pairs
    Hugging Face    model.embed_tokens.weight, ...
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from camelid.checkpoint import layout
from camelid.checkpoint.checkpoint import Checkpoint, table_for
from camelid.checkpoint.containers.dcp import DistributedCheckpoint, matches
from camelid.checkpoint.containers.pickles import OpaqueObject, printable
from camelid.checkpoint.containers.torch_files import unpickle, unverified_note_for
from camelid.checkpoint.formats import hf, meta
from camelid.checkpoint.formats.config_source import find_config, folder_with_config
from camelid.checkpoint.formats.hf_prefixes import unwrapped
from camelid.checkpoint.formats.megatron_args import WHAT, check_plain, describe_value, vocab_step
from camelid.checkpoint.formats.megatron_files import INERT, described
from camelid.checkpoint.formats.megatron_rows import BUFFERS as MEGATRON_BUFFERS
from camelid.checkpoint.formats.megatron_rows import ENGINE, MCORE, rows, stacked
from camelid.checkpoint.layout import Table, TensorRule
from camelid.checkpoint.tensors import Tensor
from camelid.checkpoint.tied_head import without_tied_head
from camelid.disk.json_files import read_json
from camelid.errors import UserError
from camelid.model.config import ModelConfig

COMMON, BACKEND = "common.pt", "metadata.json"
SYSTEMS = {"megatron": ".self_attention.linear_qkv.", "torchtitan": ".attention.wq.", "hf": ".self_attn."}
"""for each system, a part of the names of its attention layers"""
HEADS = {"megatron": MCORE["lm_head"], "dcp": meta.HEAD}
# Training state other than the model. Megatron also stores the empty states of Transformer Engine's modules.
OTHERS = re.compile(
    r"(optimizer|optim|chained_\d+|lr_scheduler|dataloader|train_state|rng_state|opt_param_scheduler"
    r"|rerun_state_machine_state)\b.*|.*\._extra_state\b.*"
)


def matches_megatron(path: Path) -> bool:
    """Whether a folder is a distributed checkpoint of Megatron-LM."""
    return matches(path) and (path / BACKEND).is_file()


def matches_other(path: Path) -> bool:
    """Whether a folder is a distributed checkpoint of another system."""
    return matches(path) and not (path / BACKEND).is_file()


def open_checkpoint(path: Path, config: ModelConfig | None = None) -> Checkpoint:
    """Opens the folder that contains .metadata.

    The model is described by `config`, by a config.json in the folder or its parent, or by the settings of Megatron-LM.
    Raises UserError for files that are damaged or incomplete, and for tensors of other models.
    """
    held = DistributedCheckpoint(path)
    tensors = {name: held.tensor(name) for name in held.items if not OTHERS.fullmatch(name)}
    system = next((system for system, part in SYSTEMS.items() if any(part in name for name in tensors)), None)
    if system == "megatron":
        return _open_megatron(path, tensors, config)
    if system is None:
        some = ", ".join(printable(name) for name in [*tensors][:3]) or "no tensors"
        raise UserError(
            f"{path} has no attention layers ({' or '.join(SYSTEMS.values())} in their names); it holds {some}",
            "camelid opens distributed checkpoints of Megatron-LM and torchtitan, and those with Hugging Face's names.",
        )
    home = folder_with_config(path, path.parent)
    if config is None and home is None:
        raise UserError(
            f"{path} does not describe its model", "Give --config PRESET_OR_JSON, or put a config.json in the folder."
        )
    if system == "hf":
        return hf.open_tensors("dcp", home or path, tensors, config)
    source = find_config(config, path, path.parent)
    assert source is not None
    table = table_for("torchtitan", meta.RULES, source.config, meta.SIZES)
    return _checkpoint("dcp", home or path, source.config, tensors, table, "freqs_cis", source.described_by, ())


def _checkpoint(
    format: str,
    root: Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    table: Table,
    known: str,
    source: str,
    notes: tuple[str, ...],
) -> Checkpoint:
    tensors, from_names = unwrapped(tensors, table.entries["final_norm.scale"].rule.name)
    if config.tie_embeddings:
        tensors = without_tied_head(tensors, table.entries["embed"].rule.name, HEADS[format], source)
    layout.check_tensors(table, tensors, known, source)
    used = {name: tensors[name] for name in table.tensors}
    return Checkpoint(format, root, config, used, table, (*notes, *from_names, *unverified_note_for(used.values())))


# Megatron-LM ----------------------------------------------------------------------------


def _open_megatron(folder: Path, held: Mapping[str, Tensor], config: ModelConfig | None) -> Checkpoint:
    backend = read_json(folder / BACKEND).get("sharded_backend") if (folder / BACKEND).is_file() else "torch_dist"
    if backend != "torch_dist":
        raise UserError(
            f"{folder} is of the format {describe_value(backend)}", "Save it with --ckpt-format torch_dist."
        )
    tensors, from_names = unwrapped(held, MCORE["final_norm"])
    file = folder / COMMON
    args = _args(file)
    if args:
        check_plain(file, args)
    config, notes, source, root = described(folder, file, args, config)
    names, table_rows = _layers(tensors)
    if any("{layer}" in row.name for row in table_rows) and config.num_layers > len(
        tensors
    ):  # before a table is made of them
        raise UserError(
            f"{folder} has too few tensors for {config.num_layers} layers", "Copy all files of the folder again."
        )
    table = table_for(WHAT, table_rows, config, {"kv_heads": config.num_kv_heads})
    tensor_parallel = args.get("tensor_model_parallel_size", 1)
    step = vocab_step(args) * (tensor_parallel if type(tensor_parallel) is int and 0 < tensor_parallel <= 2**16 else 1)
    for name in (names["embed"], names["lm_head"]):
        shape = tensors[name].shape if name in tensors else ()
        if shape and config.vocab_size <= shape[0] < config.vocab_size + step:
            # Without the rows that fill up the vocabulary to a multiple of `step`.
            tensors[name] = replace(tensors[name], shape=(config.vocab_size, *shape[1:]))
    return _checkpoint("megatron", root, config, tensors, table, MEGATRON_BUFFERS, source, (*notes, *from_names))


def _args(file: Path) -> Mapping[str, Any]:
    """Returns Megatron-LM's settings, empty if another system wrote the checkpoint with Megatron's library."""
    held = unpickle(file, INERT) if file.is_file() else {}
    args = held.get("args") if isinstance(held, dict) else None
    return args.state if isinstance(args, OpaqueObject) and isinstance(args.state, dict) else {}


def _layers(tensors: Mapping[str, Tensor]) -> tuple[Mapping[str, str], tuple[TensorRule, ...]]:
    """Returns the names and rows that match: with or without Transformer Engine, with layers stacked or separate."""
    forms = [(names, form) for names in (ENGINE, MCORE) for form in (stacked(rows(names)), rows(names))]
    norm = "layers.attn_norm.scale"

    def first(form: tuple[TensorRule, ...]) -> str:
        return next(row.name for row in form if row.path == norm).format(layer=0)

    return next(((names, form) for names, form in forms if first(form) in tensors), forms[0])
