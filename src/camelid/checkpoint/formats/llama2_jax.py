"""llama-2-jax's parameters (github.com/ayaka14732/llama-2-jax, lib/param_utils): one pickle of nested NamedTuples.

    Llama(model=LlamaModel(embedding, decoder=DecoderBlock(input_norm, attention=Attention(...), ...), norm), lm_head)

C vocab, M embed, N layers, R query heads per key head, H key heads, K head_dim, F mlp; each leaf is a JAX or NumPy
array, whose values are contiguous in the pickle. Input axes come first, and all layers are in one array:

    embedding (C M)   norm (M)   lm_head (M C)   input_norm, post_attn_norm (N M)
    q_proj (N M R H K)   k_proj, v_proj (N M H K)   out_proj (N R H K M)
    gate_proj, up_proj (N M F)   down_proj (N F M)

Its converter reshapes Hugging Face's heads to (R, H), although the query heads of one key head are adjacent there. So
(R H), read as one axis, are heads in Hugging Face's order: nothing is lost, but its own attention pairs queries with
the keys of other groups if R > 1.
"""

import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec, refuse_unsupported, table_for
from camelid.checkpoint.containers.torch_tensors import StridedTensor
from camelid.checkpoint.files import PlannedFile, TensorPayload
from camelid.checkpoint.formats.config_source import find_config
from camelid.checkpoint.formats.llama2_jax_pickle import BFLOAT16, CLASSES, read_pickle
from camelid.checkpoint.layout import TensorRule, check_tensors
from camelid.checkpoint.tensors import PlannedTensor, Tensor
from camelid.checkpoint.tied_head import without_tied_head
from camelid.errors import UserError
from camelid.model.config import ModelConfig

FILE = "model.pickle"
RULES = (
    TensorRule("embed", "model.embedding", "vocab_in embed_in"),
    TensorRule("layers.attn_norm.scale", "model.decoder.input_norm", "layers embed"),
    TensorRule("layers.attn.q_proj", "model.decoder.attention.q_proj", "layers embed heads head_dim"),
    TensorRule("layers.attn.k_proj", "model.decoder.attention.k_proj", "layers embed kv_heads head_dim"),
    TensorRule("layers.attn.v_proj", "model.decoder.attention.v_proj", "layers embed kv_heads head_dim"),
    TensorRule("layers.attn.o_proj", "model.decoder.attention.out_proj", "layers heads head_dim embed"),
    TensorRule("layers.mlp_norm.scale", "model.decoder.post_attn_norm", "layers embed"),
    TensorRule("layers.mlp.gate_proj", "model.decoder.gate_proj", "layers embed mlp"),
    TensorRule("layers.mlp.up_proj", "model.decoder.up_proj", "layers embed mlp"),
    TensorRule("layers.mlp.down_proj", "model.decoder.down_proj", "layers mlp embed"),
    TensorRule("final_norm.scale", "model.norm", "embed"),
    TensorRule("lm_head", "lm_head", "embed vocab"),
)
HEADS = {"model.decoder.attention.q_proj": 2, "model.decoder.attention.out_proj": 1}
"""the position of the axis R, which H follows"""
THETA, EPS = 10_000.0, 1e-6  # constants in its code


# Reading --------------------------------------------------------------------------------


def matches(path: Path) -> bool:
    """Whether a file, or a file in a folder, is such a pickle, detected from the first bytes."""
    try:
        if path.is_dir():
            return any(matches(file) for file in path.glob("*.pickle") if file.is_file())
        with path.open("rb") as file:
            start = file.read(512)
        return start.startswith(b"\x80") and b"lib.llama.llama" in start
    except OSError:
        return False


def open_checkpoint(path: Path, config: ModelConfig | None = None) -> Checkpoint:
    """Opens a pickle, or the only one in a folder, without running anything in it.

    The model is described by `config` or by a config.json in the same folder. Raises UserError if neither is given, or
    if the file is damaged or of another model.
    """
    if path.is_dir():
        files = sorted(file for file in path.glob("*.pickle") if matches(file))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise UserError(f"{path} must contain one pickle of llama-2-jax, and has {names}", "Give the file itself.")
        path = files[0]
    tree = read_pickle(path, [rule.name for rule in RULES])
    source = find_config(config, path.parent)
    if source is None:
        raise UserError(
            f"{path} does not describe its model ({_sizes(tree)}), and its folder has no config.json",
            "Give --config PRESET_OR_JSON, for example llama2_7b.",
        )
    config, described_by = source
    table = table_for("llama-2-jax", RULES, config, {})
    tensors = {name: _one_heads_axis(tensor, config) for name, tensor in tree.items()}
    check_tensors(table, tensors, "lm_head" if config.tie_embeddings else "", described_by)
    if config.tie_embeddings:
        tensors = without_tied_head(tensors, "model.embedding", "lm_head", described_by, transposed=True)
    return Checkpoint("llama2_jax", path.parent, config, tensors, table, tuple(_notes(config)))


def _notes(config: ModelConfig) -> Iterator[str]:
    for name, theirs in {"norm_eps": EPS, "rope_theta": THETA}.items():
        if (ours := getattr(config, name)) != theirs:
            yield f"{name} is {ours} as in the config; llama-2-jax itself uses {theirs} for every model"
    if config.num_heads != config.num_kv_heads:
        yield "heads are read in Hugging Face's order; llama-2-jax itself pairs queries with the keys of other groups"


def _sizes(tree: Mapping[str, Tensor]) -> str:
    return f"embedding {tree['model.embedding'].shape}, q_proj {tree['model.decoder.attention.q_proj'].shape}"


def _one_heads_axis(tensor: Tensor, config: ModelConfig) -> Tensor:
    """Returns the tensor with R and H flattened to one axis, which does not move any value."""
    at = HEADS.get(tensor.name)
    if at is None:
        return tensor
    both = (config.num_heads // config.num_kv_heads, config.num_kv_heads)
    if len(tensor.shape) != 5 or tensor.shape[at : at + 2] != both:
        raise UserError(
            f"{tensor.name} in {tensor.file} has shape {tensor.shape}, and the config asks for {both} query heads "
            f"a key head and key heads at axis {at}",
            "The file and the config belong to different models.",
        )
    shape = (*tensor.shape[:at], config.num_heads, *tensor.shape[at + 2 :])
    if isinstance(tensor, StridedTensor):  # Fortran's order, in which R runs faster than H
        raise UserError(f"{tensor.name} in {tensor.file} is in Fortran's order", "Save it as a row-major array.")
    return replace(tensor, shape=shape)


# Writing --------------------------------------------------------------------------------


def plan_files(export: ExportSpec) -> list[PlannedFile]:
    """Plans the pickle for llama-2-jax's load_params."""
    config = export.config
    refuse_unsupported("llama-2-jax", config, {"tie_embeddings"})
    if config.rope_theta != THETA:
        raise UserError(
            f"llama-2-jax cannot hold rope_theta = {config.rope_theta!r}; it uses {THETA}",
            "Use the format hf, which holds every model.",
        )
    untied = export.untied()
    arrays = {held.tensor.name: held for held in untied.payloads(table_for("llama-2-jax", RULES, untied.config, {}))}

    def parts(names: tuple[str, ...]) -> Iterator[bytes | TensorPayload]:
        """Yields the pickle of an object of CLASSES, or of an array."""
        if (name := ".".join(names)) in arrays:
            start, end = _around(arrays[name].tensor, config)
            yield from (start, arrays[name], end)
            return
        module, cls = WHERE[names]
        yield _global(module, cls) + b"("
        for field in CLASSES[f"{module} {cls}"]:
            yield from parts((*names, field))
        yield b"t\x81"  # TUPLE NEWOBJ

    return [PlannedFile(FILE, [b"\x80\x04", *parts(()), b"."])]  # PROTO 4; frames are optional


WHERE: Mapping[tuple[str, ...], tuple[str, str]] = {
    (): ("lib.llama.llama", "Llama"),
    ("model",): ("lib.llama.llama_model", "LlamaModel"),
    ("model", "decoder"): ("lib.llama.decoder_block", "DecoderBlock"),
    ("model", "decoder", "attention"): ("lib.llama.attention", "Attention"),
}


def _around(tensor: PlannedTensor, config: ModelConfig) -> tuple[bytes, bytes]:
    """Returns the bytes before and after an array's values: _reconstruct_array(fun, args, state, aval_state)."""
    shape = tensor.shape
    if (at := HEADS.get(tensor.name)) is not None:
        shape = (*shape[:at], config.num_heads // config.num_kv_heads, config.num_kv_heads, *shape[at + 1 :])
    bfloat16 = tensor.dtype == BFLOAT16
    kind = _global("ml_dtypes", "bfloat16") if bfloat16 else _text(f"{tensor.dtype.kind}{tensor.dtype.itemsize}")
    # For its own dtypes, NumPy writes the sizes -1, -1, 0.
    sizes = (_int(2), _int(2), _int(64)) if bfloat16 else (_int(-1), _int(-1), _int(0))
    dtype = b"".join(
        (_global("numpy", "dtype"), kind, b"\x89\x88\x87R", b"(", _int(3), _text("<"), b"NNN", *sizes, b"tb")
    )
    start = b"".join(
        (
            _global("jax._src.array", "_reconstruct_array") + b"(",
            # Both old and new versions of NumPy support numpy.core, unlike numpy._core.
            _global("numpy.core.multiarray", "_reconstruct"),
            _global("numpy", "ndarray") + _int(0) + b"\x85" + b"C\x01b" + b"\x87",
            b"(" + _int(1),
            b"(" + b"".join(map(_int, shape)) + b"t",
            dtype,
            b"\x89",  # False: row-major
            b"\x8e" + struct.pack("<Q", tensor.bytes),
        )
    )
    return start, b"t" + b"}" + _text("weak_type") + b"\x89s" + b"tR"


def _global(module: str, name: str) -> bytes:
    return _text(module) + _text(name) + b"\x93"


def _text(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def _int(number: int) -> bytes:
    return b"J" + struct.pack("<i", number)
