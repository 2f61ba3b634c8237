"""Checkpoints of EasyLM and LL3M: parameters as a msgpack stream or as Flax's msgpack tree, and train states.

    streaming_params        a stream (checkpoint/containers/msgpack.py) of the tensors named below
    flax_params             one msgpack tree of the same tensors
    streaming_train_state   a stream of step, params/params/..., and optax's state of clipping and AdamW:
                            opt_state/1/0/{count, mu/params/..., nu/params/...} and opt_state/1/2/count. With gradient
                            accumulation this state is under opt_state/inner_opt_state, next to mini_step,
                            gradient_step and acc_grads.

Kernels are stored with the input axes first, and rotary pairs are adjacent (EasyLM/models/llama/llama_model.py). There
is always a separate head; EasyLM's converter from Hugging Face copies the embedding table to it if a model is tied.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from camelid.checkpoint.checkpoint import (
    AdamState,
    Checkpoint,
    ExportSpec,
    refuse_unsupported,
    refuse_wide_heads,
    table_for,
)
from camelid.checkpoint.containers import msgpack
from camelid.checkpoint.files import PlannedFile, TensorPayload
from camelid.checkpoint.formats.config_source import find_config
from camelid.checkpoint.layout import Table, TensorRule, check_tensors
from camelid.checkpoint.tensors import Tensor, same_values
from camelid.errors import UserError
from camelid.model.config import ModelConfig

# In the order of EasyLM's converter, which writes the tensors of a layer together.
OUTER = (
    TensorRule("embed", "transformer/wte/embedding", "vocab_in embed_in"),
    TensorRule("final_norm.scale", "transformer/ln_f/kernel", "embed"),
)
H = "transformer/h/{layer}"
LAYER = (
    TensorRule("layers.attn.q_proj", f"{H}/attention/wq/kernel", "embed (heads freq pair)", "heads (pair freq) embed"),
    TensorRule(
        "layers.attn.k_proj", f"{H}/attention/wk/kernel", "embed (kv_heads freq pair)", "kv_heads (pair freq) embed"
    ),
    TensorRule("layers.attn.v_proj", f"{H}/attention/wv/kernel", "embed (kv_heads head_dim)"),
    TensorRule("layers.attn.o_proj", f"{H}/attention/wo/kernel", "(heads head_dim) embed"),
    TensorRule("layers.mlp.gate_proj", f"{H}/feed_forward/w1/kernel", "embed mlp"),
    TensorRule("layers.mlp.down_proj", f"{H}/feed_forward/w2/kernel", "mlp embed"),
    TensorRule("layers.mlp.up_proj", f"{H}/feed_forward/w3/kernel", "embed mlp"),
    TensorRule("layers.attn_norm.scale", f"{H}/attention_norm/kernel", "embed"),
    TensorRule("layers.mlp_norm.scale", f"{H}/ffn_norm/kernel", "embed"),
)
EMBED, HEAD = OUTER[0].name, "lm_head/kernel"
RULES = (*OUTER, *LAYER, TensorRule("lm_head", HEAD, "embed vocab"))
SIZES = {"pair": 2}

FileType = str
FILE_TYPES: Mapping[FileType, str] = {
    "params": "a stream of parameters",
    "flax_params": "parameters as Flax's msgpack",
    "trainstate": "a stream with a train state",
}
PARAMS_ALONE = "trainstate_params"
PREFIXES: Mapping[str, FileType] = {
    "params": "params",
    "flax_params": "flax_params",
    "flax": "flax_params",
    "trainstate": "trainstate",
    PARAMS_ALONE: "trainstate",
}
FILES: Mapping[FileType, str] = {
    "params": "streaming_params*",
    "flax_params": "flax_params*",
    "trainstate": "streaming_train_state*",
}
# The first bytes: [[name, ..], bin] or a map, followed by one of the names with which such files start.
STREAM = re.compile(rb"\x92[\x91-\x9f](\xabtransformer|\xa7lm_head|\xa6params|\xa4step|\xa9opt_state)", re.DOTALL)
TREE = re.compile(rb"([\x81-\x8f]|\xde..)(\xabtransformer|\xa7lm_head)", re.DOTALL)


def table_of(config: ModelConfig) -> Table:
    """Returns the tensor of each parameter of a model; raises UserError if EasyLM has no tensor for one."""
    return table_for("EasyLM", RULES, config, SIZES)


# Reading --------------------------------------------------------------------------------


def matches(path: Path) -> bool:
    """Whether a file starts like one of these, or a folder has such a file with one of EasyLM's names."""
    try:
        return bool(_files_in(path, None)) if path.is_dir() else _encoding(path) is not None
    except OSError:
        return False


def open_checkpoint(path: Path, config: ModelConfig | None = None, prefix: str | None = None) -> Checkpoint:
    """Opens a file, or the only file in a folder; `prefix` is one of PREFIXES, or None to detect the type of the file.

    The optimizer state of a train state is opened too, unless `prefix` requests its parameters alone.
    """
    file, leaves, file_type = _open(path, None if prefix is None else PREFIXES[prefix])
    if file_type == "trainstate" and prefix != PARAMS_ALONE:
        return _train_state(file, config, leaves)
    return _parameters(file, config, leaves, file_type)


def _train_state(file: Path, config: ModelConfig | None, leaves: Mapping[str, msgpack.Leaf]) -> Checkpoint:
    """Opens parameters and AdamW's state; the head is untied, because EasyLM trains it separately."""
    params = _parameters(file, config, leaves, "trainstate", may_tie=False)
    accumulates = any(name.startswith("opt_state/inner_opt_state/") for name in leaves)
    adam = "opt_state/inner_opt_state/1/" if accumulates else "opt_state/1/"
    advice = f"Open the parameters alone, as {PARAMS_ALONE}::{file}"
    step = leaves.get(f"{adam}0/count")  # EasyLM's own step counts microbatches
    if missing := [name for name in (f"{adam}0/count", "step") if type(leaves.get(name)) is not int]:
        raise UserError(f"{file} has no {missing[0]}, so it is not a train state with AdamW", advice)
    assert isinstance(step, int)
    if not 0 <= step < 2**31:
        raise UserError(f"{file} has {adam}0/count = {step}, which is not a number of updates", advice)
    known = rf"step|params/params/.*|{adam}(0/count|0/[mn]u/params/.*|2/count)"
    if accumulates:
        known += "|opt_state/(mini_step|gradient_step|acc_grads/params/.*)"
    if extra := [name for name in leaves if not re.fullmatch(known, name)]:
        raise UserError(f"{file} contains {extra[0]}, which is not part of AdamW's state", advice)
    mu, nu = (_tensors(file, leaves, f"{adam}0/{name}/params/") for name in ("mu", "nu"))
    for moments in (mu, nu):
        check_tensors(params.table, moments, "", "the model")
    notes = params.notes
    if done := leaves.get("opt_state/mini_step"):
        notes += (f"The accumulated gradients of {done} microbatches before the next update are not read.",)
    return replace(params, notes=notes, training=AdamState(step, mu, nu))


def _encoding(path: Path) -> str | None:
    """Returns "stream" or "tree", or None for another file."""
    with path.open("rb") as file:
        start = file.read(32)
    return "stream" if STREAM.match(start) else "tree" if TREE.match(start) else None


def _files_in(folder: Path, file_type: FileType | None) -> list[Path]:
    """Returns the files with EasyLM's names for one type of file, or for any."""
    patterns = FILES.values() if file_type is None else [FILES[file_type]]
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return [file for file in files if file.is_file() and _encoding(file) is not None]


def _open(path: Path, wanted: FileType | None) -> tuple[Path, Mapping[str, msgpack.Leaf], FileType]:
    """Returns the file, its leaves and its type; raises UserError if that is not `wanted`."""
    if not path.exists():
        raise UserError(f"{path} does not exist", "Give a file of EasyLM, or a folder with one.")
    if path.is_dir():
        files = _files_in(path, wanted) or _files_in(path, None)
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or f"nothing named {' or '.join(FILES.values())}"
            raise UserError(f"{path} contains {names}, not exactly one file of EasyLM", "Give the file itself.")
        path = files[0]
    encoding = _encoding(path)
    if encoding is None:
        raise UserError(f"{path} does not start like a file of EasyLM", "Give the path of such a file.")
    leaves = msgpack.open_stream(path) if encoding == "stream" else msgpack.open_tree(path)
    has_state = any(name.startswith(("params/", "opt_state/")) or name == "step" for name in leaves)
    file_type = "flax_params" if encoding == "tree" else "trainstate" if has_state else "params"
    if wanted not in (None, file_type):
        right = next(prefix for prefix, named in PREFIXES.items() if named == file_type)
        raise UserError(
            f"{path} is {FILE_TYPES[file_type]}, and not {FILE_TYPES[wanted]}", f"Open it as {right}::{path}"
        )
    return path, leaves, file_type


def _tensors(file: Path, leaves: Mapping[str, msgpack.Leaf], prefix: str) -> dict[str, Tensor]:
    """Returns the tensors whose names start with `prefix`, keyed by their names without it."""
    tensors = {}
    for name, leaf in leaves.items():
        if name.startswith(prefix):
            if not isinstance(leaf, Tensor):
                raise UserError(
                    f"{name} in {file} is {leaf!r}, and not an array", "Give a file with the parameters of a model."
                )
            tensors[name.removeprefix(prefix)] = leaf
    return tensors


def _parameters(
    file: Path,
    config: ModelConfig | None,
    leaves: Mapping[str, msgpack.Leaf],
    file_type: FileType,
    *,
    may_tie: bool = True,
) -> Checkpoint:
    folder = file.parent
    notes = []
    pickles = sorted(pickle.name for pickle in folder.glob("metadata*.pkl"))
    source = find_config(config, folder)
    if source is None:
        pickled = f", and {pickles[0]} is a pickle, which camelid does not open" if pickles else ""
        raise UserError(
            f"{file} does not describe its model{pickled}",
            "Give --config, for example --config llama_7b, or put a Hugging Face config.json in the same folder.",
        )
    config, described_by = source
    if pickles:
        notes.append(f"{', '.join(pickles)} was not opened, because unpickling can run code.")
    tensors = _tensors(file, leaves, "params/params/" if file_type == "trainstate" else "")
    known = ""
    if config.tie_embeddings and HEAD in tensors:
        if may_tie and EMBED in tensors and same_values(tensors[EMBED], tensors[HEAD], transposed=True):
            known = re.escape(HEAD)
        else:
            config = replace(config, tie_embeddings=False)
            notes.append("The head is not tied to the embedding table: the file has a separate one with other values.")
    rows = table_of(config)
    check_tensors(rows, tensors, known, described_by)
    return Checkpoint("easylm", folder, config, tensors, rows, tuple(notes))


# Writing --------------------------------------------------------------------------------


def plan_files(export: ExportSpec) -> list[PlannedFile]:
    """streaming_params, byte for byte as EasyLM's converter writes it."""
    return [msgpack.stream_file("streaming_params", _segments(export))]


def flax_files(export: ExportSpec) -> list[PlannedFile]:
    """Plans flax_params, byte for byte as EasyLM's converter writes it with --streaming=False."""
    return [msgpack.tree_file("flax_params", _segments(export))]


def train_state_files(export: ExportSpec) -> list[PlannedFile]:
    """Plans streaming_train_state, byte for byte as EasyLM writes it in float32 without gradient accumulation.

    Raises UserError if the source has no optimizer state, or if its head is tied.
    """
    training = export.training
    if training is None:
        raise UserError(
            "the source has no step and no AdamW moments to write",
            "Convert an EasyLM train state or a camelid run, or write the parameters with --to easylm.",
        )
    if export.config.tie_embeddings:
        raise UserError(
            "EasyLM trains an untied head, and this model's head is tied", "Write the parameters with --to easylm."
        )
    moments = dict.fromkeys(export.dtypes, np.dtype(np.float32))
    adam = "opt_state/1/0"
    return [
        msgpack.stream_file(
            "streaming_train_state",
            [
                msgpack.Scalar("step", training.step),
                *_below("params/params", export),
                msgpack.Scalar(f"{adam}/count", training.step),
                *_below(f"{adam}/mu/params", replace(export, dtypes=moments, read_slice=training.mu)),
                *_below(f"{adam}/nu/params", replace(export, dtypes=moments, read_slice=training.nu)),
                msgpack.Scalar("opt_state/1/2/count", training.step),
            ],
        )
    ]


def _below(name: str, export: ExportSpec) -> list[TensorPayload]:
    """Returns the tensors under a prefix, in the order of Flax's trees, whose keys jit has sorted."""
    payloads = sorted(_segments(export), key=lambda payload: payload.tensor.name.split("/"))
    return [replace(one, tensor=replace(one.tensor, name=f"{name}/{one.tensor.name}")) for one in payloads]


def _segments(export: ExportSpec) -> list[TensorPayload]:
    """Returns the tensors in the order of EasyLM's converter."""
    config = export.config
    refuse_unsupported("EasyLM", config, {"rope_theta", "tie_embeddings"})
    refuse_wide_heads("EasyLM", config)
    export = export.untied()
    held = {payload.tensor.name: payload for payload in export.payloads(table_of(export.config))}
    order = [row.name for row in OUTER]
    order += [row.name.format(layer=layer) for layer in range(config.num_layers) for row in LAYER]
    return [held[name] for name in (*order, HEAD)]
