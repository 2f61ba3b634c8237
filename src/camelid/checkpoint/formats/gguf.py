"""GGUF, llama.cpp's format, for its architecture "llama".

Numbers are float32, float16, bfloat16, or quantized: Q8_0 and Q4_0 are read and written, other kinds (ggml.py) are only
read. Rotary pairs are neighbors. The tokenizer is in the file's metadata, with the chat template.
"""

from functools import partial
from pathlib import Path

from camelid.checkpoint.checkpoint import Checkpoint, Saving, assumed, refuse_beyond, table_for
from camelid.checkpoint.containers.ggml import BLOCK, BY_NAME, CODES, F16, F32, KINDS, WRITABLE, Quantised, quantise
from camelid.checkpoint.containers.gguf_file import MAGIC, Entry, gguf_file, read_file
from camelid.checkpoint.files import Chunks, File, Segment, segment
from camelid.checkpoint.formats import hf
from camelid.checkpoint.formats.gguf_config import (
    ROPE,
    config_of,
    disagreements,
    fields_of,
    held_stretch,
    metadata_of,
    stretch_of,
)
from camelid.checkpoint.formats.gguf_tokenizer import tokenizer_metadata
from camelid.checkpoint.formats.gguf_vocabulary import has_tokenizer, unpacked
from camelid.checkpoint.layout import Row, Table, check, pieces, plan
from camelid.checkpoint.tensors import Planned
from camelid.errors import UserError
from camelid.model.config import Llama3Scaling, ModelConfig
from camelid.text.tokenizer import Tokenizer

ROWS = (
    Row("embed", "token_embd.weight", "vocab_in embed_in"),
    Row("layers.attn_norm.scale", "blk.{layer}.attn_norm.weight", "embed"),
    Row("layers.attn.q_proj", "blk.{layer}.attn_q.weight", "(heads freq pair) embed", "heads (pair freq) embed"),
    Row("layers.attn.k_proj", "blk.{layer}.attn_k.weight", "(kv_heads freq pair) embed", "kv_heads (pair freq) embed"),
    Row("layers.attn.v_proj", "blk.{layer}.attn_v.weight", "(kv_heads head_dim) embed"),
    Row("layers.attn.o_proj", "blk.{layer}.attn_output.weight", "embed (heads head_dim)"),
    Row("layers.mlp_norm.scale", "blk.{layer}.ffn_norm.weight", "embed"),
    Row("layers.mlp.gate_proj", "blk.{layer}.ffn_gate.weight", "mlp embed"),
    Row("layers.mlp.up_proj", "blk.{layer}.ffn_up.weight", "mlp embed"),
    Row("layers.mlp.down_proj", "blk.{layer}.ffn_down.weight", "embed mlp"),
    Row("final_norm.scale", "output_norm.weight", "embed"),
    Row("lm_head", "output.weight", "vocab embed"),
)
WHAT = "a GGUF file of architecture llama"
CAN_SAY = ("tie_embeddings", "rope_scaling")
FILE = "model.gguf"

# Reading --------------------------------------------------------------------------------


def looks(path: Path) -> bool:
    """Whether a file, or some .gguf of a folder, starts as GGUF does."""
    try:
        return any(_starts(file) for file in (path.glob("*.gguf") if path.is_dir() else [path]))
    except OSError:
        return False


def _starts(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def open_gguf(path: Path, config: ModelConfig | None = None) -> Checkpoint:
    """Opens a file, or the one of a folder; the model is `config`, config.json beside it, or what the file says.

    The tokenizer of a file is the one inside; that of a folder is tokenizer.json or tokenizer.model, if it has them.
    """
    is_folder, path = path.is_dir(), _file(path)
    held, tensors = read_file(path)
    said = fields_of(path, held, tensors)
    stretch = held_stretch(path, held, tensors, said)
    notes, described_by = [], hf.GIVEN
    if config is not None:
        if odd := disagreements(config, said, stretch):
            raise UserError(f"{path} and the given config disagree: {odd}", "They belong to different models.")
    elif (path.parent / "config.json").is_file():
        described_by = "config.json"
        try:
            config = hf.understood(path.parent)
            odd = disagreements(config, said, stretch)
        except UserError as error:  # some folders hold a config.json of one line
            odd = error.problem
        if odd:
            notes.append(f"config.json beside {path.name} does not describe it and was left out: {odd}")
            config = None
    if config is None:
        config, described_by = config_of(path, held, said, stretch, ROPE in tensors, notes), "its metadata"
        notes.append(assumed(path.name, config, "init_std", "family"))
    windows = ("sliding_window", "window_pattern")  # llama.cpp does not compute Mistral's, and says nothing of them
    refuse_beyond(WHAT, config, (*CAN_SAY, *windows))
    table = _table(config)
    check(table, tensors, r"rope_freqs\.weight", described_by)
    if kinds := sorted({tensor.kind for tensor in tensors.values() if isinstance(tensor, Quantised)}):
        notes.append(f"the weights of {path.name} are quantised ({', '.join(kinds)}); they are read as float32")
    # What lies beside a file may be another model's; what lies in a folder with it belongs to it.
    beside = is_folder and any((path.parent / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    unpack = partial(unpacked, path, held) if has_tokenizer(held) and not beside else None
    return Checkpoint("gguf", path.parent, config, tensors, table, tuple(notes), unpack_tokenizer=unpack)


def _table(config: ModelConfig) -> Table:
    return table_for(WHAT, ROWS, config, {"pair": 2})


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return files[0]
    names = ", ".join(file.name for file in files[:3])
    raise UserError(
        f"{path} has {len(files)} files of GGUF: {names}" if files else f"{path} has no .gguf file",
        "Give the path of the file.",
    )


# Writing --------------------------------------------------------------------------------


def files(saving: Saving, kind: str | None = None) -> list[File]:
    """model.gguf.

    `kind` "q8_0" or "q4_0" quantises every matrix whose rows are multiples of 32; the others are float16 then. Norms
    are always float32, as llama.cpp wants them.
    """
    config = saving.config
    refuse_beyond(WHAT, config, CAN_SAY)
    stretch = stretch_of(config.rope_scaling, config.rope_theta, config.head_dim)
    if stretch is None:
        raise UserError(f"{WHAT} cannot hold rope_scaling = {config.rope_scaling!r}", "Use the format hf.")
    if kind not in (None, *WRITABLE):
        raise UserError(f"quantisation {kind!r} is unknown", f"Choose one of {', '.join(WRITABLE)}.")
    table = _table(config)
    entries = [Entry(p.name, p.shape, _code(p, kind)) for p in plan(table, saving.dtypes)]
    segments = [Segment(entry.planned, entry.bytes, partial(_chunks, saving, table, entry)) for entry in entries]
    if isinstance(config.rope_scaling, Llama3Scaling):
        entries.append(Entry(ROPE, stretch.shape, F32))
        segments.append(segment(entries[-1].planned, lambda: [stretch]))
    code = CODES[saving.dtypes["embed"]] if kind is None else BY_NAME[kind]
    described, tokenizer, notes = tokenizer_metadata(saving.companions, config.vocab_size)
    own = (None, None) if tokenizer is None else (tokenizer.bos_id, _named_eos(tokenizer))
    return [gguf_file(FILE, metadata_of(config, code, *own) | described, entries, segments, notes)]


def _named_eos(tokenizer: Tokenizer) -> int | None:
    """The token that chat templates know as eos_token."""
    text = tokenizer.named_specials.get("eos_token")
    return None if text is None else tokenizer.backend.token_id(text)


def _code(tensor: Planned, kind: str | None) -> int:
    if len(tensor.shape) == 1:
        return F32
    if kind is None:
        return CODES[tensor.dtype]
    return F16 if tensor.shape[-1] % BLOCK else BY_NAME[kind]


def _chunks(saving: Saving, table: Table, entry: Entry) -> Chunks:
    for piece in pieces(table, entry.name, entry.planned.dtype, saving.source):
        yield quantise(piece, KINDS[entry.code].name) if entry.code in KINDS else piece
