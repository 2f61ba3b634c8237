"""EasyLM's files, which are LL3M's too: parameters as a stream or as flax's msgpack, and train states.

    streaming_params        a stream (checkpoint/containers/msgpack.py) of the names below
    flax_params             one tree of them
    streaming_train_state   a stream of step, params/params/..., and optax's state of clipping and AdamW:
                            opt_state/1/0/{count, mu/params/..., nu/params/...} and opt_state/1/2/count, where gradients
                            are accumulated below opt_state/inner_opt_state, beside mini_step, gradient_step, acc_grads

Kernels are inputs first, rotary pairs are neighbours (EasyLM/models/llama/llama_model.py). The head is always one of
its own; the converter from Hugging Face writes the table there when a model is tied.
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

# In the order of EasyLM's converter; those of a layer stand together.
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

Kind = str
KINDS: Mapping[Kind, str] = {
    "params": "a stream of parameters",
    "flax_params": "parameters as flax's msgpack",
    "trainstate": "a stream with a train state",
}
PARAMS_ALONE = "trainstate_params"
PREFIXES: Mapping[str, Kind] = {
    "params": "params",
    "flax_params": "flax_params",
    "flax": "flax_params",
    "trainstate": "trainstate",
    PARAMS_ALONE: "trainstate",
}
FILES: Mapping[Kind, str] = {
    "params": "streaming_params*",
    "flax_params": "flax_params*",
    "trainstate": "streaming_train_state*",
}
# The first bytes: [[name, ..], bin] or a map, and then one of the names that such files begin with.
STREAM = re.compile(rb"\x92[\x91-\x9f](\xabtransformer|\xa7lm_head|\xa6params|\xa4step|\xa9opt_state)", re.DOTALL)
TREE = re.compile(rb"([\x81-\x8f]|\xde..)(\xabtransformer|\xa7lm_head)", re.DOTALL)


def table_of(config: ModelConfig) -> Table:
    """Where each parameter of a model lies; raises UserError where EasyLM has no place for one."""
    return table_for("EasyLM", RULES, config, SIZES)


# Reading --------------------------------------------------------------------------------


def matches(path: Path) -> bool:
    """Whether a file begins as one of these, or a folder has such a file under EasyLM's name."""
    try:
        return bool(_found(path, None)) if path.is_dir() else _form(path) is not None
    except OSError:
        return False


def open_checkpoint(path: Path, config: ModelConfig | None = None, prefix: str | None = None) -> Checkpoint:
    """Opens a file, or the one file in a folder; `prefix` is one of PREFIXES, and None asks the file.

    The training of a train state comes with it, unless `prefix` asks for its parameters alone.
    """
    file, leaves, kind = _open(path, None if prefix is None else PREFIXES[prefix])
    if kind == "trainstate" and prefix != PARAMS_ALONE:
        return _train_state(file, config, leaves)
    return _parameters(file, config, leaves, kind)


def _train_state(file: Path, config: ModelConfig | None, leaves: Mapping[str, msgpack.Leaf]) -> Checkpoint:
    """Parameters and AdamW's state; the head is one of its own, since EasyLM trains it so."""
    params = _parameters(file, config, leaves, "trainstate", may_tie=False)
    accumulates = any(name.startswith("opt_state/inner_opt_state/") for name in leaves)
    adam = "opt_state/inner_opt_state/1/" if accumulates else "opt_state/1/"
    advice = f"Take the parameters alone, as {PARAMS_ALONE}::{file}"
    step = leaves.get(f"{adam}0/count")  # EasyLM's own step counts microbatches
    if missing := [name for name in (f"{adam}0/count", "step") if type(leaves.get(name)) is not int]:
        raise UserError(f"{file} has no {missing[0]}, so it is no train state with AdamW", advice)
    assert isinstance(step, int)
    if not 0 <= step < 2**31:
        raise UserError(f"{file} says that {step} updates were made", advice)
    known = rf"step|params/params/.*|{adam}(0/count|0/[mn]u/params/.*|2/count)"
    if accumulates:
        known += "|opt_state/(mini_step|gradient_step|acc_grads/params/.*)"
    if extra := [name for name in leaves if not re.fullmatch(known, name)]:
        raise UserError(f"{file} holds {extra[0]}, which AdamW's state does not", advice)
    mu, nu = (_tensors(file, leaves, f"{adam}0/{name}/params/") for name in ("mu", "nu"))
    for moments in (mu, nu):
        check_tensors(params.table, moments, "", "the model")
    notes = params.notes
    if done := leaves.get("opt_state/mini_step"):
        notes += (f"The gradients of {done} microbatches before the next update are left out.",)
    return replace(params, notes=notes, training=AdamState(step, mu, nu))


def _form(file: Path) -> str | None:
    with file.open("rb") as opened:
        start = opened.read(32)
    return "stream" if STREAM.match(start) else "tree" if TREE.match(start) else None


def _found(folder: Path, kind: Kind | None) -> list[Path]:
    """The files of a kind, or of any, under EasyLM's names."""
    patterns = FILES.values() if kind is None else [FILES[kind]]
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return [file for file in files if file.is_file() and _form(file) is not None]


def _open(path: Path, wanted: Kind | None) -> tuple[Path, Mapping[str, msgpack.Leaf], Kind]:
    """A file, its leaves, and what it is; raises UserError where it is not what is wanted."""
    if not path.exists():
        raise UserError(f"{path} does not exist", "Give a file of EasyLM, or a folder with one.")
    if path.is_dir():
        files = _found(path, wanted) or _found(path, None)
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or f"nothing named {' or '.join(FILES.values())}"
            raise UserError(f"{path} holds {names}, and one file of EasyLM is to be opened", "Give the file itself.")
        path = files[0]
    form = _form(path)
    if form is None:
        raise UserError(f"{path} does not begin as a file of EasyLM does", "Give the path of such a file.")
    leaves = msgpack.open_stream(path) if form == "stream" else msgpack.open_tree(path)
    whole = any(name.startswith(("params/", "opt_state/")) or name == "step" for name in leaves)
    kind = "flax_params" if form == "tree" else "trainstate" if whole else "params"
    if wanted not in (None, kind):
        right = next(prefix for prefix, named in PREFIXES.items() if named == kind)
        raise UserError(f"{path} is {KINDS[kind]}, and not {KINDS[wanted]}", f"Open it as {right}::{path}")
    return path, leaves, kind


def _tensors(file: Path, leaves: Mapping[str, msgpack.Leaf], below: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    tensors = {}
    for name, leaf in leaves.items():
        if name.startswith(below):
            if not isinstance(leaf, Tensor):
                raise UserError(f"{name} in {file} is {leaf!r} and no array", "The file holds something else.")
            tensors[name.removeprefix(below)] = leaf
    return tensors


def _parameters(
    file: Path, config: ModelConfig | None, leaves: Mapping[str, msgpack.Leaf], kind: Kind, *, may_tie: bool = True
) -> Checkpoint:
    folder = file.parent
    notes = []
    pickles = sorted(pickle.name for pickle in folder.glob("metadata*.pkl"))
    source = find_config(config, folder)
    if source is None:
        beside = f", and {pickles[0]} is a pickle, which camelid does not open" if pickles else ""
        raise UserError(
            f"nothing beside {file} says what its model is{beside}",
            "Say it, for example --config llama_7b, or put a Hugging Face config.json beside the file.",
        )
    config, described_by = source
    if pickles:
        notes.append(f"{', '.join(pickles)} was not opened: pickles can run code.")
    tensors = _tensors(file, leaves, "params/params/" if kind == "trainstate" else "")
    known = ""
    if config.tie_embeddings and HEAD in tensors:
        if may_tie and EMBED in tensors and same_values(tensors[EMBED], tensors[HEAD], transposed=True):
            known = re.escape(HEAD)
        else:
            config = replace(config, tie_embeddings=False)
            notes.append("The head is not tied to the embedding table: in the file it is one of its own.")
    rows = table_of(config)
    check_tensors(rows, tensors, known, described_by)
    return Checkpoint("easylm", folder, config, tensors, rows, tuple(notes))


# Writing --------------------------------------------------------------------------------


def plan_files(export: ExportSpec) -> list[PlannedFile]:
    """streaming_params, byte for byte as EasyLM's converter writes it."""
    return [msgpack.stream_file("streaming_params", _segments(export))]


def flax_files(export: ExportSpec) -> list[PlannedFile]:
    """flax_params, byte for byte as EasyLM's converter writes it with --streaming=False."""
    return [msgpack.tree_file("flax_params", _segments(export))]


def train_state_files(export: ExportSpec) -> list[PlannedFile]:
    """streaming_train_state, byte for byte as EasyLM's training writes it in float32, without accumulation."""
    training = export.training
    if training is None:
        raise UserError(
            "there is no step and there are no moments of AdamW to write",
            "Convert an EasyLM train state or a camelid run, or write the parameters with --to easylm.",
        )
    if export.config.tie_embeddings:
        raise UserError(
            "EasyLM trains a head of its own, and this model's is tied", "Write the parameters with --to easylm."
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
    """In the order of flax's own trees, which jit has sorted."""
    payloads = sorted(_segments(export), key=lambda payload: payload.tensor.name.split("/"))
    return [replace(one, tensor=replace(one.tensor, name=f"{name}/{one.tensor.name}")) for one in payloads]


def _segments(export: ExportSpec) -> list[TensorPayload]:
    """In the order of EasyLM's converter."""
    config = export.config
    refuse_unsupported("EasyLM", config, {"rope_theta", "tie_embeddings"})
    refuse_wide_heads("EasyLM", config)
    export = export.untied()
    held = {payload.tensor.name: payload for payload in export.payloads(table_of(export.config))}
    order = [row.name for row in OUTER]
    order += [row.name.format(layer=layer) for layer in range(config.num_layers) for row in LAYER]
    return [held[name] for name in (*order, HEAD)]
