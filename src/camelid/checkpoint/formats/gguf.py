"""GGUF, the format of llama.cpp, for its architecture "llama".

Tensors are float32, float16, bfloat16 or quantized: Q8_0 and Q4_0 are read and written, other quantizations
(checkpoint/containers/ggml.py) are only read. Rotary pairs are adjacent. The metadata contain the tokenizer and the
chat template.
"""

from functools import partial
from pathlib import Path

from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec, assumption_note, refuse_unsupported, table_for
from camelid.checkpoint.containers.ggml import (
    BLOCK,
    BY_NAME,
    CODES,
    F16,
    F32,
    QUANTIZATIONS,
    WRITABLE,
    QuantizedTensor,
    quantize,
)
from camelid.checkpoint.containers.gguf_file import MAGIC, TensorInfo, gguf_file, open_gguf
from camelid.checkpoint.files import Chunks, PlannedFile, TensorPayload, raw_payload
from camelid.checkpoint.formats.config_source import find_config
from camelid.checkpoint.formats.gguf_config import (
    ROPE,
    config_from_metadata,
    disagreements,
    divisors_in_file,
    divisors_of_scaling,
    fields_from_metadata,
    metadata_from_config,
)
from camelid.checkpoint.formats.gguf_tokenizer import tokenizer_metadata
from camelid.checkpoint.formats.gguf_vocabulary import has_tokenizer, unpacked
from camelid.checkpoint.layout import Table, TensorRule, check_tensors, plan_tensors, tensor_chunks
from camelid.checkpoint.tensors import PlannedTensor
from camelid.errors import UserError
from camelid.model.config import Llama3Scaling, ModelConfig
from camelid.text.tokenizer import Tokenizer

RULES = (
    TensorRule("embed", "token_embd.weight", "vocab_in embed_in"),
    TensorRule("layers.attn_norm.scale", "blk.{layer}.attn_norm.weight", "embed"),
    TensorRule("layers.attn.q_proj", "blk.{layer}.attn_q.weight", "(heads freq pair) embed", "heads (pair freq) embed"),
    TensorRule(
        "layers.attn.k_proj", "blk.{layer}.attn_k.weight", "(kv_heads freq pair) embed", "kv_heads (pair freq) embed"
    ),
    TensorRule("layers.attn.v_proj", "blk.{layer}.attn_v.weight", "(kv_heads head_dim) embed"),
    TensorRule("layers.attn.o_proj", "blk.{layer}.attn_output.weight", "embed (heads head_dim)"),
    TensorRule("layers.mlp_norm.scale", "blk.{layer}.ffn_norm.weight", "embed"),
    TensorRule("layers.mlp.gate_proj", "blk.{layer}.ffn_gate.weight", "mlp embed"),
    TensorRule("layers.mlp.up_proj", "blk.{layer}.ffn_up.weight", "mlp embed"),
    TensorRule("layers.mlp.down_proj", "blk.{layer}.ffn_down.weight", "embed mlp"),
    TensorRule("final_norm.scale", "output_norm.weight", "embed"),
    TensorRule("lm_head", "output.weight", "vocab embed"),
)
WHAT = "a GGUF file of architecture llama"
CAN_SAY = ("tie_embeddings", "rope_scaling")
FILE = "model.gguf"

# Reading --------------------------------------------------------------------------------


def matches(path: Path) -> bool:
    """Whether a file, or any .gguf file in a folder, starts with GGUF's magic number."""
    try:
        return any(_has_magic(file) for file in (path.glob("*.gguf") if path.is_dir() else [path]))
    except OSError:
        return False


def _has_magic(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def open_checkpoint(path: Path, config: ModelConfig | None = None) -> Checkpoint:
    """Opens a file, or the only .gguf file in a folder.

    The model is described by `config`, by a config.json in the same folder, or by the metadata, in this order. A file
    is opened with the tokenizer in its metadata, a folder with its tokenizer.json or tokenizer.model if it has one.
    """
    is_folder, path = path.is_dir(), _file(path)
    metadata, tensors = open_gguf(path)
    fields = fields_from_metadata(path, metadata, tensors)
    divisors = divisors_in_file(path, metadata, tensors, fields)
    notes: list[str] = []
    source, differences = None, ""
    if config is not None and (differences := disagreements(config, fields, divisors)):
        raise UserError(f"{path} and the given config disagree: {differences}", "They belong to different models.")
    try:
        if (source := find_config(config, path.parent)) is not None:
            differences = disagreements(source.config, fields, divisors)
    except UserError as error:  # some folders have a config.json with nothing but a model_type
        differences = error.problem
    if differences:
        notes.append(f"config.json in the folder of {path.name} does not match it and is ignored: {differences}")
        source = None
    if source is not None:
        config, described_by = source
    else:
        config = config_from_metadata(path, metadata, fields, divisors, notes, per_frequency=ROPE in tensors)
        described_by = "its metadata"
        notes.append(assumption_note(path.name, config, "init_std", "family"))
    windows = ("sliding_window", "window_pattern")  # llama.cpp neither computes nor stores those of Mistral
    refuse_unsupported(WHAT, config, (*CAN_SAY, *windows))
    table = _table(config)
    check_tensors(table, tensors, r"rope_freqs\.weight", described_by)
    if kinds := sorted({tensor.kind for tensor in tensors.values() if isinstance(tensor, QuantizedTensor)}):
        notes.append(f"the weights of {path.name} are quantized ({', '.join(kinds)}); they are read as float32")
    # The folder of a file may contain other models; a folder that was given belongs to its only .gguf file.
    has_tokenizer_file = is_folder and any(
        (path.parent / name).is_file() for name in ("tokenizer.json", "tokenizer.model")
    )
    unpack = partial(unpacked, path, metadata) if has_tokenizer(metadata) and not has_tokenizer_file else None
    return Checkpoint("gguf", path.parent, config, tensors, table, tuple(notes), unpack_tokenizer=unpack)


def _table(config: ModelConfig) -> Table:
    return table_for(WHAT, RULES, config, {"pair": 2})


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    names = ", ".join(file.name for file in files[:3])
    raise UserError(
        f"{path} contains {len(files)} GGUF files: {names}" if files else f"{path} contains no .gguf file",
        "Give the path of the file.",
    )


# Writing --------------------------------------------------------------------------------


def plan_files(export: ExportSpec, quantization: str | None = None) -> list[PlannedFile]:
    """Plans model.gguf.

    `quantization` "q8_0" or "q4_0" quantizes every matrix whose rows are a multiple of 32 long; other matrices become
    float16 then. Norms are always float32, as llama.cpp requires.
    """
    config = export.config
    refuse_unsupported(WHAT, config, CAN_SAY)
    divisors = divisors_of_scaling(config.rope_scaling, config.rope_theta, config.head_dim)
    if divisors is None:
        raise UserError(f"{WHAT} cannot hold rope_scaling = {config.rope_scaling!r}", "Use the format hf.")
    if quantization not in (None, *WRITABLE):
        raise UserError(f"quantization {quantization!r} is unknown", f"Choose one of {', '.join(WRITABLE)}.")
    table = _table(config)
    entries = [TensorInfo(p.name, p.shape, _code(p, quantization)) for p in plan_tensors(table, export.dtypes)]
    payloads = [TensorPayload(entry.planned, entry.bytes, partial(_chunks, export, table, entry)) for entry in entries]
    if isinstance(config.rope_scaling, Llama3Scaling):
        entries.append(TensorInfo(ROPE, divisors.shape, F32))
        payloads.append(raw_payload(entries[-1].planned, lambda: [divisors]))
    code = CODES[export.dtypes["embed"]] if quantization is None else BY_NAME[quantization]
    described, tokenizer, notes = tokenizer_metadata(export.companions, config.vocab_size)
    own = (None, None) if tokenizer is None else (tokenizer.bos_id, _named_eos(tokenizer))
    return [gguf_file(FILE, metadata_from_config(config, code, *own) | described, entries, payloads, notes)]


def _named_eos(tokenizer: Tokenizer) -> int | None:
    """Returns the token that chat templates know as eos_token."""
    text = tokenizer.named_specials.get("eos_token")
    return None if text is None else tokenizer.backend.token_id(text)


def _code(tensor: PlannedTensor, quantization: str | None) -> int:
    """Returns GGML's code for the type in which a tensor is written."""
    if len(tensor.shape) == 1:
        return F32
    if quantization is None:
        return CODES[tensor.dtype]
    return F16 if tensor.shape[-1] % BLOCK else BY_NAME[quantization]


def _chunks(export: ExportSpec, table: Table, entry: TensorInfo) -> Chunks:
    for piece in tensor_chunks(table, entry.name, entry.planned.dtype, export.read_slice):
        yield quantize(piece, QUANTIZATIONS[entry.code].name) if entry.code in QUANTIZATIONS else piece
