"""MindSpore checkpoints with the names of MindFormers' LLaMA: .ckpt files, folders of ranks, and safetensors.

The files contain named tensors, but neither the sizes of the model nor the layout of rotary pairs (RopeLayout).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from camelid.checkpoint import layout
from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec, refuse_unsupported, refuse_wide_heads, table_for
from camelid.checkpoint.containers.mindspore_file import (
    TRAINING,
    cipher,
    ckpt_file,
    ckpts,
    open_tensor_file,
    single,
    tensor_files,
    unverified,
)
from camelid.checkpoint.containers.safetensors import safetensors_file
from camelid.checkpoint.files import PlannedFile
from camelid.checkpoint.formats.config_source import find_config
from camelid.checkpoint.formats.mindspore_ranks import ShardLayout, open_ranks, ranks_in, strategy_bytes
from camelid.checkpoint.layout import Table, TensorRule, check_tensors
from camelid.checkpoint.tensor_parallel import shard_export, sharded_axis
from camelid.checkpoint.tensors import PlannedTensor, Tensor, files_holding, unverified_note
from camelid.checkpoint.tied_head import without_tied_head
from camelid.errors import UserError
from camelid.model.config import ModelConfig

WHAT = "a MindSpore checkpoint of MindFormers' LLaMA"

RopeLayout = Literal["half", "interleaved"]
"""the order of the rows of wq and wk: first halves before second halves, or pair by pair; the names are the same"""


def _rows(q: Sequence[str], k: Sequence[str]) -> tuple[TensorRule, ...]:
    # In the order in which MindFormers' converter writes a layer.
    return (
        TensorRule("embed", "model.tok_embeddings.embedding_weight", "vocab_in embed_in"),
        TensorRule("layers.attn.q_proj", "model.layers.{layer}.attention.wq.weight", *q),
        TensorRule("layers.attn.k_proj", "model.layers.{layer}.attention.wk.weight", *k),
        TensorRule("layers.attn.v_proj", "model.layers.{layer}.attention.wv.weight", "(kv_heads head_dim) embed"),
        TensorRule("layers.attn.o_proj", "model.layers.{layer}.attention.wo.weight", "embed (heads head_dim)"),
        TensorRule("layers.mlp.gate_proj", "model.layers.{layer}.feed_forward.w1.weight", "mlp embed"),
        TensorRule("layers.mlp.up_proj", "model.layers.{layer}.feed_forward.w3.weight", "mlp embed"),
        TensorRule("layers.mlp.down_proj", "model.layers.{layer}.feed_forward.w2.weight", "embed mlp"),
        TensorRule("layers.attn_norm.scale", "model.layers.{layer}.attention_norm.weight", "embed"),
        TensorRule("layers.mlp_norm.scale", "model.layers.{layer}.ffn_norm.weight", "embed"),
        TensorRule("final_norm.scale", "model.norm_out.weight", "embed"),
        TensorRule("lm_head", "lm_head.weight", "vocab embed"),
    )


RULES: Mapping[RopeLayout, tuple[TensorRule, ...]] = {
    "half": _rows(("(heads head_dim) embed",), ("(kv_heads head_dim) embed",)),
    "interleaved": _rows(
        ("(heads freq pair) embed", "heads (pair freq) embed"),
        ("(kv_heads freq pair) embed", "kv_heads (pair freq) embed"),
    ),
}
SIZES = {"pair": 2, "one": 1}
# The sharded axes. MindFormers replicates the embedding and the head (vocab_emb_dp), except with pipeline stages.
MATRICES, TABLES = frozenset({"heads", "kv_heads", "mlp"}), frozenset({"vocab", "vocab_in"})
# With qkv_concat, a key head follows its query heads and precedes its value head; rows of gate and up alternate.
QKV, GATE_UP = "model.layers.{layer}.attention.w_qkv.weight", "model.layers.{layer}.feed_forward.w_gate_hidden.weight"
CONCAT = (
    TensorRule(
        "layers.attn.q_proj", QKV, "(kv_heads group head_dim) embed", "(kv_heads group) head_dim embed", "group"
    ),
    TensorRule("layers.attn.k_proj", QKV, "(kv_heads one head_dim) embed", "(kv_heads one) head_dim embed", "one"),
    TensorRule("layers.attn.v_proj", QKV, "(kv_heads one head_dim) embed", "(kv_heads one) head_dim embed", "one"),
    TensorRule("layers.mlp.gate_proj", GATE_UP, "(mlp one) embed", "(mlp one) embed", "one"),
    TensorRule("layers.mlp.up_proj", GATE_UP, "(mlp one) embed", "(mlp one) embed", "one"),
)
HEAD = "lm_head.weight"
FORMAT_OF: Mapping[str, str] = {"half": "mindspore-half", "interleaved": "mindspore-interleaved"}
"""the format name, in a path or --from, of each layout"""


def rows_for(names: Iterable[str], rope_layout: RopeLayout) -> tuple[TensorRule, ...]:
    """Returns the rows of a file with tensors of these names."""
    names = set(names)
    concat = [row for row in CONCAT if row.name.format(layer=0) in names]
    if rope_layout != "half" and any(row.name == QKV for row in concat):
        raise UserError("w_qkv is always half-split", "Open it as mindspore::PATH.")
    paths = {row.path for row in concat}
    return (*(row for row in RULES[rope_layout] if row.path not in paths), *concat)


# Reading --------------------------------------------------------------------------------


def matches(path: Path) -> bool:
    """Whether a file or a folder is a MindSpore checkpoint, by names and first bytes."""
    try:
        if not path.is_dir():
            return _looks_file(path)
        if ranks := ranks_in(path):
            return any(map(_looks_file, (file for rank in ranks.values() for file in tensor_files(rank))))
        return any(map(_looks_file, [*ckpts(path), path / "model.safetensors"]))
    except OSError:
        return False


def _looks_file(path: Path) -> bool:
    if path.suffix not in (".ckpt", ".safetensors"):
        return False
    with path.open("rb") as file:
        head = file.read(2**16)
    if path.suffix == ".safetensors":
        return b"tok_embeddings.embedding_weight" in head or re.search(rb'"format"\s*:\s*"ms"', head) is not None
    begins = re.match(rb"\x0a[\x80-\xff]{0,9}[\x00-\x7f]\x0a[\x01-\x7f][!-~]", head)
    return begins is not None or cipher(head) is not None


def open_checkpoint(path: Path, config: ModelConfig | None = None, rope_layout: RopeLayout | None = None) -> Checkpoint:
    """Opens a file, a folder with one, or a folder of ranks.

    The files do not describe their model, so `config` or a config.json in the folder must. They do not contain their
    RopeLayout either; None assumes the one of MindFormers since 3 August 2023 (its commit f40d0aab8). Raises UserError
    if the model is unknown, or the files are damaged, incomplete, or of another model.
    """
    return from_tensors(path, *open_tensors(path), config, rope_layout)


def open_tensors(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file, of a folder with one, or of a folder of ranks; and the names of values of training."""
    if path.is_dir() and ranks_in(path):
        return open_ranks(path)
    tensors = open_tensor_file(path if path.is_file() else single(path))
    return tensors, [name for name in tensors if re.fullmatch(TRAINING, name)]


def from_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    aside: Sequence[str],
    config: ModelConfig | None,
    rope_layout: RopeLayout | None,
) -> Checkpoint:
    """The checkpoint of `path` with these tensors; `aside` are the names of values that are not read."""
    folder = path if path.is_dir() else path.parent
    notes: list[str] = []
    source = find_config(config, folder)
    if source is None:
        raise UserError(
            f"{path} does not describe its model", "Give --config PRESET_OR_JSON, or put a config.json in the folder."
        )
    config, described_by = source
    notes += unverified_note([*filter(unverified, files_holding(tensors.values()))], folder)
    if aside:
        more = ", ..." if len(aside) > 3 else ""
        notes.append(f"values of the training run are not read: {', '.join(aside[:3])}{more}")
    rows = rows_for(tensors, rope_layout or "half")
    layout = None
    if rope_layout is None and not any(row.name == QKV for row in rows):
        layout = "the rotary layout of wq and wk (half)"
        notes.append(
            "wq and wk are assumed to be half-split, as MindFormers writes them since August 2023; if the model "
            "generates garbage, open it as mindspore-interleaved::PATH"
        )
    table = table_for(WHAT, rows, config, SIZES)
    if config.tie_embeddings:  # MindFormers holds a tied table twice
        tensors = without_tied_head(tensors, table.entries["embed"].rule.name, HEAD, described_by)
    check_tensors(table, tensors, TRAINING, described_by)
    return Checkpoint("mindspore", folder, config, tensors, table, tuple(notes), assumed_layout=layout)


def rope_layout_of(checkpoint: Checkpoint) -> RopeLayout:
    """The layout in which a MindSpore checkpoint was opened; "half" for checkpoints of other formats."""
    entry = checkpoint.table.entries["layers.attn.q_proj"]
    return "interleaved" if entry.rule == RULES["interleaved"][1] else "half"


# Writing --------------------------------------------------------------------------------


def plan_files(export: ExportSpec, *, rope_layout: RopeLayout = "half", safetensors: bool = False) -> list[PlannedFile]:
    """model.ckpt as MindFormers' converter writes it, or the same as MindSpore's save_checkpoint(format="safetensors").

    Of several ranks, such a file in the folder of each, and the strategy file of each stage of the pipeline. What
    MindFormers reads these from its YAML: sizes, n_kv_heads, theta, rms_norm_eps, seq_length.
    """
    refuse_unsupported(WHAT, export.config, ("tie_embeddings",))
    refuse_wide_heads(WHAT, export.config)
    theirs, tensor_parallel, stages = export.untied(), export.tensor_parallel, export.pipeline_parallel
    cut = MATRICES | TABLES if stages > 1 and theirs.config.vocab_size % tensor_parallel == 0 else MATRICES
    table, parts = shard_export(theirs, RULES[rope_layout], SIZES, cut)
    written = []
    for stage, own in enumerate(
        _stages(table, layout.plan_tensors(table, theirs.dtypes), theirs.config.num_layers, stages)
    ):
        for tensor_rank, part in enumerate(parts):
            rank = stage * tensor_parallel + tensor_rank
            folder = f"rank_{rank}/" if tensor_parallel * stages > 1 else ""
            payloads = [part.payload(table, tensor) for tensor in own]
            if safetensors:
                written.append(safetensors_file(f"{folder}model.safetensors", payloads, framework="ms"))
            else:
                written.append(ckpt_file(f"{folder}model.ckpt", payloads))
            if folder and tensor_rank == 0:
                axes = {tensor.name: sharded_axis(table.tensors[tensor.name][0][0].rule, cut) for tensor in own}
                splits = {
                    tensor.name: ShardLayout.over(tensor_parallel, len(tensor.shape), axes[tensor.name])
                    for tensor in own
                }
                written.append(PlannedFile(f"strategy/ckpt_strategy_rank_{rank}.ckpt", [strategy_bytes(stage, splits)]))
    return written


def _stages(table: Table, tensors: Sequence[PlannedTensor], layers: int, count: int) -> list[list[PlannedTensor]]:
    """Returns the tensors of each pipeline stage by layer; the embedding is first, other tensors without layer last."""

    def place(tensor: PlannedTensor) -> int:
        part, layer = table.tensors[tensor.name][0]
        return layer if layer is not None else -1 if part.rule.path == "embed" else layers

    stages: list[list[PlannedTensor]] = [[] for _ in range(count)]
    for tensor in sorted(tensors, key=place):
        stages[min(max(place(tensor), 0), layers - 1) * count // layers].append(tensor)
    return stages
