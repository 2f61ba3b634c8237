"""llama2.c's .bin files (github.com/karpathy/llama2.c: export.py writes them, run.c and runq.c read them).

    version 0    7 int32: dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len; vocab_size is negative
                 if the classifier is not the embedding table
                 float32: embedding; for all layers attention norms, wq, wk, wv, wo, MLP norms, w1, w2, w3; the final
                 norm; cos and sin (seq_len, head_dim / 2); the classifier if it is not shared
    version 1    256 bytes: uint32 MAGIC, int32 version, the 7 int32, uint8 whether the classifier is shared, zeros
                 float32: attention norms, MLP norms, the final norm, embedding, wq, wk, wv, wo, w1, w2, w3, classifier
    version 2    the same, with int32 group_size after the uint8
                 float32 norms; then int8 values of each matrix, with a float32 scale per group of values

Values are little-endian. Matrices are stored with the output axis first, and rotary pairs are adjacent. In version 2 a
value is its int8 times the scale of its group.
"""

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec, assumption_note, refuse_unsupported, table_for
from camelid.checkpoint.files import PlannedFile, TensorPayload
from camelid.checkpoint.formats.config_source import find_config
from camelid.checkpoint.formats.meta import RULES, SIZES
from camelid.checkpoint.layout import Table, check_tensors
from camelid.checkpoint.tensors import CHUNK, Tensor, cast
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import named

FILE = "model.bin"
FIELDS = ("embed_dim", "mlp_dim", "num_layers", "num_heads", "num_kv_heads", "vocab_size", "context_length")
MAGIC, LONG_HEADER, SHORT_HEADER = 0x616B3432, 256, 28  # "ak42"; bytes
EPS, THETA = 1e-5, 10_000.0  # constants in llama2.c's code
GROUP = 64  # values per scale; less if it does not divide the rows
LEVELS = 127  # int8 values are from -127 to 127
FLOAT = np.dtype("<f4")
AGAIN = "Download or copy the file again."


@dataclass(frozen=True)
class Header:
    version: int
    config: ModelConfig
    """without special tokens"""
    group: int = 1
    """values per scale, in version 2"""

    def bytes_of(self, shape: Sequence[int]) -> int:
        """Returns the size of a tensor in bytes."""
        count = math.prod(shape)
        quantized = self.version == 2 and len(shape) > 1
        return count + 4 * (count // self.group) if quantized else 4 * count

    @property
    def start(self) -> int:
        return LONG_HEADER if self.version else SHORT_HEADER

    @property
    def angles(self) -> int:
        """Size of cos and sin in bytes."""
        return 0 if self.version else 4 * self.config.context_length * self.config.head_dim

    @property
    def bytes(self) -> int:
        """Size of the file in bytes."""
        total = self.start + self.angles
        for spec in named(declare_decoder(self.config)).values():
            layers, shape = (spec.shape[0], spec.shape[1:]) if spec.stacked else (1, spec.shape)
            total += layers * self.bytes_of(shape)
        return total


# Reading --------------------------------------------------------------------------------


def matches(path: Path, version: int) -> bool:
    """Whether a file, or a file in a folder, has the header of this version; for version 0 the size must match too."""
    try:
        if path.is_dir():
            return any(matches(file, version) for file in path.glob("*.bin") if file.is_file())
        header = _header(path)
        return header.version == version and (version > 0 or header.bytes == path.stat().st_size)
    except (OSError, UserError):
        return False


def open_checkpoint(path: Path, config: ModelConfig | None = None) -> Checkpoint:
    """Opens a file of any version, or the only one in a folder.

    The model is described by `config`, by a config.json in the same folder, or by the header, which has no special
    tokens. Raises UserError if the file is damaged, or if its header and the config disagree.
    """
    path = _the_file(path)
    header, size = _header(path), path.stat().st_size
    # Checked before anything is allocated per layer, because the values of a damaged header may be huge.
    if header.bytes != size:
        raise UserError(
            f"{path} has {size:,} bytes, and its header requires {header.bytes:,}",
            f"It is not a llama2.c checkpoint, or is truncated. {AGAIN}",
        )
    notes: tuple[str, ...] = ()
    source = find_config(config, path.parent)
    if source is None:
        config, described_by = replace(header.config, bos_id=1, eos_ids=(2,), family="llama"), "the header"
        notes = (
            f"llama2.c uses norm_eps = {EPS} and rope_theta = {THETA}, and tokenizers with BOS 1 and EOS 2",
            assumption_note(path.name, config, "pad_id", "init_std", "family"),
        )
    else:
        config, described_by = source
        _check_same(path, header.config, config)
        if config.context_length != (length := header.config.context_length):
            notes = (f"context_length is {config.context_length} as in the config; {path.name} has {length}",)
    table = _table(config, header.version)
    tensors: dict[str, Tensor] = {}
    for name, offset, _ in _places(table, header):
        tensor = Tensor(path, name, offset, table.shape(name), FLOAT)
        quantized = header.version == 2 and len(tensor.shape) > 1
        tensors[name] = Quantized(**vars(tensor), group=header.group) if quantized else tensor
    check_tensors(table, tensors, "", described_by)
    name = "llama2c" if header.version == 0 else f"llama2c_v{header.version}"
    return Checkpoint(name, path.parent, config, tensors, table, notes)


def _the_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"{path} does not exist", "Give the path of a .bin file of llama2.c.")
    files = sorted(file for file in path.glob("*.bin") if any(matches(file, version) for version in range(3)))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{path} must contain one checkpoint of llama2.c, and has {names}", "Give the file itself.")
    return files[0]


def _header(path: Path) -> Header:
    with path.open("rb") as file:
        start = file.read(LONG_HEADER)
    version, shared, group = 0, 1, 1
    if len(start) == LONG_HEADER and struct.unpack("<I", start[:4])[0] == MAGIC:
        (version, *sizes, shared, group), padding = struct.unpack("<i7iBi", start[4:41]), start[41:]
        if version == 1:
            group, padding = 1, start[37:]
        if version not in (1, 2) or shared > 1 or any(padding):
            raise UserError(f"{path} is of llama2.c's version {version}, or its header is damaged", AGAIN)
    elif len(start) >= SHORT_HEADER:
        sizes = list(struct.unpack("<7i", start[:SHORT_HEADER]))
        shared, sizes[5] = sizes[5] > 0, abs(sizes[5])
    else:
        raise UserError(f"{path} is truncated, or is not a llama2.c checkpoint", AGAIN)
    try:
        if min(*sizes, group) < 1 or sizes[0] % sizes[3]:
            raise ValueError("a size below 1, or dim not a multiple of n_heads")
        config = ModelConfig(
            **dict(zip(FIELDS, sizes, strict=True)),
            head_dim=sizes[0] // sizes[3],
            norm_eps=EPS,
            rope_theta=THETA,
            tie_embeddings=bool(shared),
        )
        for _, spec in named(declare_decoder(config)).items():
            if version == 2 and spec.is_matrix and math.prod(spec.shape[len(spec.stacked) :]) % group:
                raise ValueError(f"groups of {group} do not divide {spec.shape}")
    except ValueError as error:
        raise UserError(f"{path} is not a llama2.c checkpoint ({error}): its header has {sizes}", AGAIN) from error
    return Header(version, config, group)


def _check_same(path: Path, theirs: ModelConfig, ours: ModelConfig) -> None:
    """Raises UserError if the config does not match the header; the context length may differ."""
    for name in (*FIELDS[:-1], "head_dim", "tie_embeddings"):
        if getattr(theirs, name) != getattr(ours, name):
            raise UserError(
                f"{path} has {name} = {getattr(theirs, name)} in its header, and the config {getattr(ours, name)}",
                "The file and the config belong to different models.",
            )


def _table(config: ModelConfig, version: int) -> Table:
    """Returns the tensors in the order of a version: versions 1 and 2 have all norms first."""
    rows = sorted(RULES, key=lambda row: not row.path.endswith("scale")) if version else RULES
    return table_for("llama2.c", rows, config, SIZES)


def _places(table: Table, header: Header) -> Iterator[tuple[str, int, int]]:
    """Yields the name, offset and size in bytes of each tensor."""
    offset = header.start
    for name in table.tensors:
        if name == "output.weight":
            offset += header.angles
        count = header.bytes_of(table.shape(name))
        yield name, offset, count
        offset += count


@dataclass(frozen=True)
class Quantized(Tensor):
    """A matrix of int8 values followed by its scales; groups continue from row to row."""

    group: int

    def read_into(self, out: np.ndarray, index: tuple[slice, ...]) -> None:
        """Fills `out` with the slice `index`, cast to its dtype, a few rows at a time."""
        rows, width = range(*index[0].indices(self.shape[0])), math.prod(self.shape[1:])
        numbers = Tensor(self.file, self.name, self.offset, (math.prod(self.shape),), np.dtype(np.int8))
        scales = replace(
            numbers, offset=self.offset + numbers.shape[0], shape=(numbers.shape[0] // self.group,), dtype=FLOAT
        )
        step = max(1, CHUNK // width)
        for start in range(rows.start, rows.stop, step):
            stop = min(start + step, rows.stop)
            cut = slice(start * width, stop * width)
            groups = slice(cut.start // self.group, -(-cut.stop // self.group))
            q, scale = np.empty(cut.stop - cut.start, np.int8), np.empty(groups.stop - groups.start, FLOAT)
            numbers.read_into(q, (cut,))
            scales.read_into(scale, (groups,))
            first = cut.start - groups.start * self.group
            values = q * np.repeat(scale, self.group)[first : first + len(q)]
            chunk = values.reshape(stop - start, *self.shape[1:])
            cast(self, chunk[:, *index[1:]], out[start - rows.start : stop - rows.start])


# Writing --------------------------------------------------------------------------------


def plan_files(export: ExportSpec, version: int) -> list[PlannedFile]:
    """Plans model.bin for run.c (versions 0 and 1) or runq.c (version 2, which rounds to 8 bits)."""
    config = export.config
    _refuse(config)
    group = math.gcd(GROUP, config.embed_dim, config.mlp_dim) if version == 2 else 1
    header, table = Header(version, config, group), _table(config, version)
    floats = replace(export, dtypes=dict.fromkeys(export.dtypes, FLOAT))
    payloads = [_quantized(held, header) if version == 2 else held for held in floats.payloads(table)]
    before_head = len(payloads) - (not config.tie_embeddings)
    parts = [_header_bytes(header), *payloads[:before_head], _angles(header), *payloads[before_head:]]
    assert sum(len(part) if isinstance(part, bytes) else part.size for part in parts) == header.bytes
    return [PlannedFile(FILE, parts)]


def _refuse(config: ModelConfig) -> None:
    """Raises UserError for a model that llama2.c does not support."""
    refuse_unsupported("llama2.c", config, {"tie_embeddings"})
    fixed = {"norm_eps": EPS, "rope_theta": THETA, "head_dim": config.embed_dim / config.num_heads}
    for name, value in fixed.items():
        if (ours := getattr(config, name)) != value:
            raise UserError(
                f"llama2.c does not support {name} = {ours!r}; it uses {value:g}",
                "Use the format hf, which holds every model.",
            )


def _header_bytes(header: Header) -> bytes:
    config = header.config
    sizes = [getattr(config, name) for name in FIELDS]
    if header.version == 0:
        sizes[5] *= 1 if config.tie_embeddings else -1
        return struct.pack("<7i", *sizes)
    start = struct.pack("<Ii7iB", MAGIC, header.version, *sizes, config.tie_embeddings)
    start += struct.pack("<i", header.group) if header.version == 2 else b""
    return start.ljust(LONG_HEADER, b"\0")


def _angles(header: Header) -> bytes:
    """Returns cos and sin of every position; run.c ignores them, and those of export.py may differ in the last bit."""
    if header.version:
        return b""
    width, length = header.config.head_dim, header.config.context_length
    frequencies = 1 / np.float32(THETA) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    angles = np.outer(np.arange(length, dtype=np.float32), frequencies).astype(np.float64)
    return np.stack([np.cos(angles), np.sin(angles)]).astype(FLOAT).tobytes()


def _quantized(payload: TensorPayload, header: Header) -> TensorPayload:
    """Returns the int8 values of a matrix, followed by scales that map the largest of each group to 127 or -127."""
    tensor = payload.tensor
    if len(tensor.shape) == 1:
        return payload
    return TensorPayload(tensor, header.bytes_of(tensor.shape), lambda: _levels(payload, header.group))


def _levels(payload: TensorPayload, group: int) -> Iterator[np.ndarray]:
    tensor = payload.tensor
    scales = []
    for part in payload.chunks():
        assert isinstance(part, np.ndarray)
        groups = part.reshape(-1, group)
        scale = np.abs(groups).max(1) / FLOAT.type(LEVELS)
        if not np.isfinite(scale).all():
            raise UserError(f"{tensor.name} has infinite or NaN values", "Use a format that does not quantize.")
        scales.append(scale)
        levels = np.rint(groups / np.where(scale > 0, scale, 1)[:, None])
        yield levels.clip(-LEVELS, LEVELS).astype(np.int8)  # a subnormal scale is rounded itself
    yield from scales
