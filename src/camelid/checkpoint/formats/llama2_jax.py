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

import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec, refuse_unsupported, table_for
from camelid.checkpoint.containers.pickles import printable, run_pickle
from camelid.checkpoint.containers.torch_tensors import StridedTensor
from camelid.checkpoint.files import PlannedFile, TensorPayload
from camelid.checkpoint.formats.config_source import find_config
from camelid.checkpoint.layout import TensorRule, check_tensors
from camelid.checkpoint.tensors import CODES, PlannedTensor, Tensor
from camelid.checkpoint.tied_head import without_tied_head
from camelid.errors import UserError
from camelid.inputs import refuse_stand_in
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
CLASSES: Mapping[str, tuple[str, ...]] = {
    "lib.llama.llama Llama": ("model", "lm_head"),
    "lib.llama.llama_model LlamaModel": ("embedding", "decoder", "norm"),
    "lib.llama.decoder_block DecoderBlock": (
        "input_norm",
        "attention",
        "post_attn_norm",
        "gate_proj",
        "up_proj",
        "down_proj",
    ),
    "lib.llama.attention Attention": ("q_proj", "k_proj", "v_proj", "out_proj"),
}
THETA, EPS = 10_000.0, 1e-6  # constants in its code
MAX_PROGRAM = 2**16  # bytes of a pickle without its arrays; a real one has about 5,000
LARGE = 512  # bytes; a longer read can only be an array, which is left in the file
AGAIN = "Download or copy the file again."


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
    tree = _unpickle(path)
    source = find_config(config, path.parent)
    if source is None:
        raise UserError(
            f"{path} does not say which model it holds ({_sizes(tree)}), and has no config.json beside it",
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


# The pickle -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Span:
    """Bytes that are left in the file."""

    start: int
    count: int

    def __len__(self) -> int:
        return self.count


class Program:
    """A file that pickletools reads, which skips long reads: they are the contents of arrays."""

    def __init__(self, file: BinaryIO):
        self.file, self.at, self.left, self.size = file, 0, MAX_PROGRAM, os.fstat(file.fileno()).st_size

    def tell(self) -> int:
        return self.at

    def read(self, count: int) -> Any:
        if count > LARGE:
            if count > self.size - self.at:
                raise ValueError(f"{count:,} bytes are announced at {self.at:,}, and the file has {self.size:,}")
            span = Span(self.at, count)
            self.at = self.file.seek(self.at + count)
            return span
        return self._counted(self.file.read(count))

    def readline(self) -> bytes:
        return self._counted(self.file.readline(LARGE))

    def _counted(self, held: bytes) -> bytes:
        self.at += len(held)
        self.left -= len(held)
        if self.left < 0:
            raise ValueError(f"more than {MAX_PROGRAM:,} bytes besides its arrays")
        return held


@dataclass
class Held:
    """An array that a pickle creates first and fills later."""

    shape: tuple[int, ...] = ()
    dtype: np.dtype | None = None
    fortran: bool = False
    data: Span | None = None


RECONSTRUCT, NDARRAY, JAX_ARRAY = (lambda *args: Held()), object(), object()


def _dtype(name: Any, align: Any, copy: Any) -> np.dtype:
    known = {**{f"{dtype.kind}{dtype.itemsize}": dtype for dtype in CODES if dtype.kind == "f"}, BFLOAT16: BFLOAT16}
    # Tuples are not hashed: the hash of a deeply nested one crashes Python.
    if not isinstance(name, str | np.dtype) or name not in known:
        raise UserError(
            f"an array is {printable(name) if isinstance(name, str) else 'strange'}",
            "Save the parameters as bfloat16, float16 or float32.",
        )
    return known[name]


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def _jax_array(fun: Any, args: Any, state: Any, aval: Any) -> Held:
    if fun is not RECONSTRUCT:
        raise ValueError("an array that numpy's _reconstruct does not make")
    return _build(Held(), state)


def _build(thing: Any, state: Any) -> Any:
    """Sets the byte order of a dtype or the content of an array, like their __setstate__."""
    match thing, state:
        case np.dtype(), (int(), str(order), *_):
            if order not in "<=|":
                raise UserError("an array is big-endian", "Save the parameters on a little-endian machine.")
        case Held(data=None), (1, tuple(shape), np.dtype() as dtype, bool(fortran), Span() as data):
            if len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**63 for n in shape):
                raise ValueError("an array of a strange shape")
            if math.prod(shape) * dtype.itemsize != data.count:
                raise ValueError(f"an array of shape {shape} and {dtype} with {data.count:,} bytes")
            thing.shape, thing.dtype, thing.fortran, thing.data = shape, dtype, fortran, data
        case _:
            raise ValueError("an object of a strange state")
    return thing


def _named_tuple(fields: tuple[str, ...]) -> Callable[..., dict[str, Any]]:
    return lambda *values: dict(zip(fields, values, strict=True))


GLOBALS: Mapping[str, Any] = {
    **{name: _named_tuple(fields) for name, fields in CLASSES.items()},
    "jax._src.array _reconstruct_array": _jax_array,
    "numpy.core.multiarray _reconstruct": RECONSTRUCT,
    "numpy._core.multiarray _reconstruct": RECONSTRUCT,
    "numpy ndarray": NDARRAY,
    "numpy dtype": _dtype,
    "ml_dtypes bfloat16": BFLOAT16,
}


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Returns the arrays of a pickle, by their path in its tuples."""
    if not path.is_file():
        raise UserError(f"{path} is not a file", "Give the path of a pickle that llama-2-jax wrote.")
    refuse_stand_in(path)
    try:
        with path.open("rb") as file:
            program = Program(file)
            held = run_pickle(
                path,
                program,
                GLOBALS,
                {"NEWOBJ": lambda cls, args: cls(*args), "BUILD": _build},
                "llama-2-jax",
                lambda value: Span(program.tell() - len(value), len(value)),
            )
            if program.tell() != program.size:
                raise ValueError(f"{program.size - program.tell():,} bytes after its end")
        return {row.name: _tensor(path, row.name, held) for row in RULES}
    except UserError as error:
        raise error if str(path) in error.problem else UserError(f"{path}: {error.problem}", error.advice) from error
    except Exception as error:  # a damaged file fails anywhere in pickletools and below
        reason = f"{type(error).__name__}: {printable(error)}"
        raise UserError(f"{path} is damaged, or is not a checkpoint of llama-2-jax ({reason})", AGAIN) from error


def _tensor(path: Path, name: str, tree: Any) -> Tensor:
    for field in name.split("."):
        tree = tree[field] if isinstance(tree, dict) else None
    if not isinstance(tree, Held) or tree.dtype is None or tree.data is None:
        raise ValueError(f"{name} is no array")
    shape = tree.shape
    if tree.fortran and len(shape) > 1:
        strides = tuple(math.prod(shape[:i]) for i in range(len(shape)))
        return StridedTensor(path, name, tree.data.start, shape, tree.dtype, strides)
    return Tensor(path, name, tree.data.start, shape, tree.dtype)


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
    whole = export.untied()
    arrays = {held.tensor.name: held for held in whole.payloads(table_for("llama-2-jax", RULES, whole.config, {}))}

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
