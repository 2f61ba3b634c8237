"""Hugging Face folders: config.json, safetensors, and the files that go with them."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from camelid.checkpoint.folder import new_folder
from camelid.checkpoint.layout import Row, check, pieces, plan
from camelid.checkpoint.tensors import CODES, Planned, Tensor, open_safetensors, write_safetensors
from camelid.errors import UserError
from camelid.model.config import ModelConfig, RopeScaling
from camelid.model.decoder import declare_decoder
from camelid.model.params import Spec, named

SHARD_BYTES = 5 * 10**9
COMPANIONS = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|chat_template.*|vocab\.json|merges\.txt"
    r"|generation_config\.json|preprocessor_config\.json|LICEN[SC]E.*|NOTICE.*|USE_POLICY.*|README.*"
)

ROWS = (
    Row("embed", "model.embed_tokens.weight", "vocab_in embed_in"),
    Row("layers.attn_norm.scale", "model.layers.{layer}.input_layernorm.weight", "embed"),
    Row("layers.attn.q_proj", "model.layers.{layer}.self_attn.q_proj.weight", "(heads head_dim) embed"),
    Row("layers.attn.k_proj", "model.layers.{layer}.self_attn.k_proj.weight", "(kv_heads head_dim) embed"),
    Row("layers.attn.v_proj", "model.layers.{layer}.self_attn.v_proj.weight", "(kv_heads head_dim) embed"),
    Row("layers.attn.o_proj", "model.layers.{layer}.self_attn.o_proj.weight", "embed (heads head_dim)"),
    # The norm before the MLP: the file's name says where it stands, after attention.
    Row("layers.mlp_norm.scale", "model.layers.{layer}.post_attention_layernorm.weight", "embed"),
    Row("layers.mlp.gate_proj", "model.layers.{layer}.mlp.gate_proj.weight", "mlp embed"),
    Row("layers.mlp.up_proj", "model.layers.{layer}.mlp.up_proj.weight", "mlp embed"),
    Row("layers.mlp.down_proj", "model.layers.{layer}.mlp.down_proj.weight", "embed mlp"),
    Row("final_norm.scale", "model.norm.weight", "embed"),
    Row("lm_head", "lm_head.weight", "vocab embed"),
)

TIED_HEAD = Row("embed", "lm_head.weight", "vocab_in embed_in")  # some files repeat the table as the head
BUFFERS = r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"  # computed from config.json, never a parameter


def rows_of(specs: Mapping[str, Spec]) -> list[Row]:
    """The rows of the parameters that a model has."""
    return [row for row in ROWS if row.path in specs]


# config.json --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """A field of ModelConfig, theirs, and what an absent or null one means (no default: an error)."""

    ours: str
    theirs: str
    default: Callable[[Mapping[str, Any]], Any] | None = None


FIELDS = (
    Field("vocab_size", "vocab_size"),
    Field("embed_dim", "hidden_size"),
    Field("mlp_dim", "intermediate_size"),
    Field("num_layers", "num_hidden_layers"),
    Field("num_heads", "num_attention_heads"),
    Field("num_kv_heads", "num_key_value_heads", lambda hf: hf["num_attention_heads"]),
    Field("head_dim", "head_dim", lambda hf: hf["hidden_size"] // hf["num_attention_heads"]),
    Field("context_length", "max_position_embeddings", lambda hf: hf.get("max_sequence_length", 2048)),
    Field("norm_eps", "rms_norm_eps", lambda hf: 1e-6),
    Field("tie_embeddings", "tie_word_embeddings", lambda hf: False),
    Field("init_std", "initializer_range", lambda hf: 0.02),
    Field("bos_id", "bos_token_id", lambda hf: None if "bos_token_id" in hf else 1),
    Field("pad_id", "pad_token_id", lambda hf: None),
)
KINDS: Mapping[str, Any] = {field.name: field.type for field in fields(ModelConfig)}
# What camelid computes is right for these values only.
FIXED: Mapping[str, tuple] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "is_decoder": (True, False, None),  # older versions write False for every decoder
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
}
ELSEWHERE = {"rope_theta", "rope_scaling", "rope_parameters", "eos_token_id"}  # read by functions below
# Names, defaults of generation, and settings of training and of other heads: none changes what the decoder computes.
HARMLESS = frozenset(
    """
    _name_or_path architectures torch_dtype dtype transformers_version use_cache pretraining_tp max_sequence_length
    auto_map return_dict output_attentions output_hidden_states torchscript use_bfloat16 tf_legacy_loss pruned_heads
    chunk_size_feed_forward tie_encoder_decoder cross_attention_hidden_size tokenizer_class unk_token_id sep_token_id
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens decoder_start_token_id
    prefix task_specific_params problem_type finetuning_task id2label label2id selective_checkpoint_enabled
    sequence_parallel_enabled move_model_to_device
    """.split()
)
LLAMA3_ROPE = (
    ("factor", "factor"),
    ("low_freq_factor", "low_freq_factor"),
    ("high_freq_factor", "high_freq_factor"),
    ("original_context", "original_max_position_embeddings"),
)


def config_from_hf(hf: Mapping[str, Any]) -> ModelConfig:
    """config.json as ModelConfig; raises UserError for every field that is not understood."""
    for name, allowed in FIXED.items():
        if name in hf and hf[name] not in allowed:
            raise UserError(
                f"config.json has {name} = {hf[name]!r}; camelid computes {' or '.join(repr(a) for a in allowed)}",
                "This model is not supported yet.",
            )
    if "model_type" not in hf:
        raise UserError("config.json has no model_type", "It must say which family the checkpoint belongs to.")
    if unknown := sorted(set(hf) - {field.theirs for field in FIELDS} - set(FIXED) - ELSEWHERE - HARMLESS):
        raise UserError(
            "config.json has fields that camelid does not know: " + ", ".join(f"{n} = {hf[n]!r}" for n in unknown),
            "They may change what the model computes; remove those that do not.",
        )
    theta, scaling = _rope(hf)
    values = {field.ours: _value(field, hf) for field in FIELDS}
    values["pad_id"] = None if values["pad_id"] == -1 else values["pad_id"]
    eos = hf.get("eos_token_id", 2)
    eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)
    try:
        return ModelConfig(**values, eos_ids=eos_ids, rope_theta=theta, rope_scaling=scaling)
    except ValueError as error:
        raise UserError(f"config.json: {error}", "Download or copy the file again.") from error


def _value(field: Field, hf: Mapping[str, Any]) -> Any:
    value, kind = hf.get(field.theirs), KINDS[field.ours]
    if value is None:
        if field.default is None:
            raise UserError(f"config.json has no {field.theirs}", "The checkpoint cannot be opened without it.")
        return field.default(hf)
    fits = isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    if not fits or (kind is int and value < 1):
        raise UserError(f"config.json has {field.theirs} = {value!r}", "Download or copy the file again.")
    return value


def _rope(hf: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Both spellings: rope_theta with rope_scaling, and rope_parameters, which holds both since transformers 5."""
    rope = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10_000.0
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    rope.pop("type", None)  # some files give both names
    if kind == "default" and not rope:
        return float(theta), None
    names = {theirs for _, theirs in LLAMA3_ROPE}
    if kind != "llama3" or set(rope) != names:
        raise UserError(
            f"config.json has rope scaling {kind!r} with {rope}; camelid computes 'llama3' with {sorted(names)}",
            "This model is not supported yet.",
        )
    return float(theta), RopeScaling(**{ours: rope[theirs] for ours, theirs in LLAMA3_ROPE})


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json for transformers of this year and of 2023; `dtype` is that of the tensors beside it."""
    hf = {field.theirs: getattr(config, field.ours) for field in FIELDS}
    eos = config.eos_ids
    scaling = config.rope_scaling
    return hf | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
        "rope_theta": config.rope_theta,
        "rope_scaling": None
        if scaling is None
        else {"rope_type": "llama3"} | {theirs: getattr(scaling, ours) for ours, theirs in LLAMA3_ROPE},
        "torch_dtype": dtype,
        "use_cache": True,
    }


assert {f.name for f in fields(ModelConfig)} == {f.ours for f in FIELDS} | {"eos_ids", "rope_theta", "rope_scaling"}


# Reading --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder: everything but the tensors' bytes."""

    folder: Path
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    rows: Sequence[Row]
    specs: Mapping[str, Spec]

    @property
    def dtypes(self) -> dict[str, np.dtype]:
        """By path: the dtype of each parameter in the files."""
        return {row.path: self.tensors[row.names(self.specs[row.path])[0]].dtype for row in self.rows}

    @property
    def companions(self) -> list[Path]:
        """The files that go wherever the weights go: tokenizer, generation settings, licence."""
        return sorted(file for file in self.folder.iterdir() if COMPANIONS.fullmatch(file.name) and file.is_file())


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Opens a folder, or the name of a repository on the Hugging Face Hub, and checks it against its config.json."""
    folder = find(path)
    config = config_from_hf(read_json(folder / "config.json"))
    specs = named(declare_decoder(config))
    rows = rows_of(specs)
    assert len(rows) == len(specs), f"no row for {set(specs) - {row.path for row in rows}}"
    tensors = _open_files(folder)
    known = BUFFERS
    if config.tie_embeddings and TIED_HEAD.name in tensors:
        _check_tied(tensors)
        known += "|" + re.escape(TIED_HEAD.name)
    check(rows, specs, tensors, known)
    return Checkpoint(folder, config, tensors, rows, specs)


def find(path: str | Path) -> Path:
    """The folder of a checkpoint; what is not a local path is looked up in, and downloaded from, the Hub."""
    folder = Path(path).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json", "Give the folder of a Hugging Face checkpoint.")
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) or str(path).startswith("."):
        raise UserError(f"{folder} does not exist", "Give a checkpoint's folder, or a name on the Hugging Face Hub.")
    import huggingface_hub

    wanted = ["*.json", "*.safetensors", "tokenizer*", "*.txt", "*.jinja", "LICEN*", "NOTICE*", "README*"]
    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=wanted))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        raise UserError(
            f"{path} is not a local folder, and the Hub did not give it: {_first_line(error)}",
            "Check the name and the network; HF_TOKEN opens gated repositories.",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises UserError with the place of the fault."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}", "Download or copy the file again.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object", "Download or copy the file again.")
    return value


def _open_files(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder by name; with an index file, exactly those that it lists."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.is_file():
        if not single.is_file():
            raise UserError(
                f"{folder} has neither model.safetensors nor model.safetensors.index.json",
                "Give the folder of a Hugging Face checkpoint in safetensors format.",
            )
        return open_safetensors(single)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(f"{index} has no weight_map", "Download the file again.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        file = folder / name
        if file.parent != folder or not file.is_file():
            raise UserError(f"{index} names {name}, which is not in the folder", "Download the missing file.")
        tensors |= open_safetensors(file)
    if odd := sorted(set(weight_map) ^ set(tensors)):
        raise UserError(f"{index} and the files disagree about {', '.join(odd[:3])}", "Download the checkpoint again.")
    return tensors


def _check_tied(tensors: Mapping[str, Tensor]) -> None:
    table, head = tensors[ROWS[0].name], tensors[TIED_HEAD.name]
    if table.shape == head.shape and table.dtype == head.dtype:
        rows = max(1, 2**24 // table.shape[1])
        for start in range(0, table.shape[0], rows):
            index = (slice(start, min(start + rows, table.shape[0])), slice(None))
            a, b = (np.empty((index[0].stop - start, table.shape[1]), table.dtype) for _ in range(2))
            table.read_into(a, index)
            head.read_into(b, index)
            if a.tobytes() != b.tobytes():
                break
        else:
            return
    raise UserError(
        f"config.json ties the head to the embedding table, and {TIED_HEAD.name} differs from it",
        "Set tie_word_embeddings to false in config.json if the head is to be used.",
    )


# Writing --------------------------------------------------------------------------------

Source = Callable[[Row, int, np.dtype], Iterator[np.ndarray]]
"""from a row, a layer and a dtype to that layer's values, in arrays that lie end to end"""


def from_checkpoint(checkpoint: Checkpoint) -> Source:
    """The values of an opened checkpoint, a slice at a time."""

    def source(row: Row, layer: int, dtype: np.dtype) -> Iterator[np.ndarray]:
        spec = checkpoint.specs[row.path]
        return pieces(row, spec, checkpoint.tensors[row.names(spec)[layer]], dtype)

    return source


def write_checkpoint(
    destination: Path,
    config: ModelConfig,
    dtypes: Mapping[str, np.dtype],
    source: Source,
    companions: Sequence[Path],
    *,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes a folder that transformers opens: one tensor at a time, under a temporary name until it is whole.

    `dtypes` are those of the tensors, by path of ours; `progress` hears of bytes done and bytes in all.
    """
    specs = named(declare_decoder(config))
    planned = plan(rows_of(specs), specs, dtypes)
    total = sum(tensor.bytes for *_, tensor in planned)
    with new_folder(destination, total, overwrite) as folder:
        shards, done = _shards(planned, shard_bytes), 0
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):

            def counted(row: Row, layer: int, tensor: Planned) -> Iterator[np.ndarray]:
                nonlocal done
                for piece in source(row, layer, tensor.dtype):
                    yield piece
                    done += piece.nbytes
                    progress(done, total)

            write_safetensors(folder / name, [tensor for *_, tensor in shard], (counted(*item) for item in shard))
        if len(shards) > 1:
            weight_map = {tensor.name: name for name, shard in zip(names, shards, strict=True) for *_, tensor in shard}
            write_json(
                folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
            )
        for file in companions:
            shutil.copyfile(file, folder / file.name)
        write_json(folder / "config.json", config_to_hf(config, dtypes["embed"].name))


def _shards(planned: Sequence[tuple[Row, int, Planned]], most: int) -> list[list[tuple[Row, int, Planned]]]:
    shards: list[list] = [[]]
    size = 0
    for item in planned:
        if shards[-1] and size + item[2].bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(item)
        size += item[2].bytes
    return shards


def write_json(path: Path, value: Any) -> None:
    """JSON as Hugging Face writes it."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", "utf-8")


def dtype_named(name: str) -> np.dtype:
    """The numpy dtype of "float32", "bfloat16" or "float16"; raises UserError for another."""
    table = {dtype.name: dtype for dtype in CODES}
    if name not in table:
        raise UserError(f"dtype {name!r} is unknown", f"Choose one of {', '.join(table)}.")
    return table[name]
