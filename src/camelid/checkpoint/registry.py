"""The table of formats: how each is detected, opened and written."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from camelid.checkpoint.adapters import mindformers, peft
from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec, copy_companions
from camelid.checkpoint.files import JOURNAL, WORKERS, PlannedFile, json_file, write_files
from camelid.checkpoint.folder import complete_replacement, new_folder
from camelid.checkpoint.formats import easylm, gguf, hf, llama2_jax, llama2c, megatron, meta, mindspore
from camelid.checkpoint.formats import megatron_distributed as distributed
from camelid.checkpoint.formats.config_source import read_config_json, read_model_config
from camelid.checkpoint.formats.hf_config import config_from_hf, config_to_hf
from camelid.checkpoint.hub import find_checkpoint_folder
from camelid.checkpoint.layout import summarize
from camelid.checkpoint.single_file import new_file
from camelid.checkpoint.state import run_folder
from camelid.errors import UserError
from camelid.inputs import named_path, refuse_stand_in
from camelid.model.config import ModelConfig


@dataclass(frozen=True)
class Format:
    """A checkpoint format."""

    description: str
    """for messages"""
    matches: Callable[[Path], bool]
    """whether a file or a folder appears to be of the format, by names and first bytes"""
    open: Callable[[Path, ModelConfig | None], Checkpoint]
    """opens a path; the config describes the model if the files do not"""
    plan_files: Callable[[ExportSpec], list[PlannedFile]] | None
    """the files that hold a model, except for config.json; None if the format is only read"""
    lossy: bool = False
    """whether values are stored with fewer bits than their dtype has"""
    sharding: tuple[str, ...] = ()
    """the fields of ExportSpec by which the format can be split into several files"""
    patterns: str = ""
    """patterns of usual file names, by which an unknown folder is compared with the formats"""
    suffix: str | None = None
    """the file name suffix of a format that is one file with everything inside, and not a folder"""


TENSOR, PIPELINE, SHARDS = ("tensor_parallel",), ("pipeline_parallel",), ("shards",)


def _never(path: Path) -> bool:
    """For variants of a format, which the format itself opens."""
    return False


def _open_run(path: Path, config: ModelConfig | None) -> Checkpoint:
    """The folder of a run, whose adapter may have a base of any format."""
    return run_folder.open_checkpoint(path, config, open_checkpoint)


TRAIN_STATE, GGUF = "easylm-trainstate", ".gguf"
FORMATS: Mapping[str, Format] = {
    "hf": Format(
        "Hugging Face: config.json with safetensors or .bin",
        hf.matches,
        hf.open_checkpoint,
        hf.plan_files,
        sharding=SHARDS,
        patterns="config.json *.safetensors *.bin *.index.json tokenizer*",
    ),
    "meta": Format(
        "Meta: params.json with consolidated.00.pth",
        meta.matches,
        meta.open_checkpoint,
        meta.plan_files,
        sharding=TENSOR,
        patterns="params.json *.pth *.pt tokenizer.model",
    ),
    "easylm": Format(
        "EasyLM and LL3M: streaming_params, flax_params or streaming_train_state",
        easylm.matches,
        easylm.open_checkpoint,
        easylm.plan_files,
        patterns="*streaming_* flax_params* *.msgpack *.ckpt",
    ),
    "easylm-flax": Format(
        "EasyLM: flax_params", _never, partial(easylm.open_checkpoint, prefix="flax_params"), easylm.flax_files
    ),
    TRAIN_STATE: Format(
        "EasyLM: streaming_train_state",
        _never,
        partial(easylm.open_checkpoint, prefix="trainstate"),
        easylm.train_state_files,
    ),
    "mindspore": Format(
        "MindSpore: .ckpt files or rank_x folders with MindFormers' names",
        mindspore.matches,
        mindformers.open_checkpoint,
        mindspore.plan_files,
        sharding=TENSOR + PIPELINE,
        patterns="*.ckpt rank_* strategy",
    ),
    "mindspore-safetensors": Format(
        "MindSpore: safetensors with MindFormers' names",
        _never,
        mindformers.open_checkpoint,
        partial(mindspore.plan_files, safetensors=True),
        sharding=TENSOR + PIPELINE,
    ),
    "mindspore-interleaved": Format(
        "MindSpore, with MindFormers' rotary layout before August 2023",
        _never,
        partial(mindformers.open_checkpoint, rope_layout="interleaved"),
        partial(mindspore.plan_files, rope_layout="interleaved"),
        sharding=TENSOR + PIPELINE,
    ),
    "megatron": Format(
        "Megatron-LM: latest_checkpointed_iteration.txt with iter_*, of mp_rank_*/model_optim_rng.pt or of torch_dist",
        megatron.matches,
        megatron.open_checkpoint,
        megatron.plan_files,
        sharding=TENSOR + PIPELINE,
        patterns="latest_checkpointed_iteration.txt iter_* release mp_rank_* *.pt",
    ),
    "megatron-legacy": Format(
        "Megatron-LM, with the names before Megatron core",
        _never,
        megatron.open_checkpoint,
        partial(megatron.plan_files, names="legacy"),
        sharding=TENSOR + PIPELINE,
    ),
    "dcp": Format(
        "PyTorch's distributed checkpoints: .metadata with __0_0.distcp, of torchtitan or FSDP",
        distributed.matches_other,
        distributed.open_checkpoint,
        None,
        patterns=".metadata *.distcp",
    ),
    "llama2-jax": Format(
        "llama-2-jax: a .pickle",
        llama2_jax.matches,
        llama2_jax.open_checkpoint,
        llama2_jax.plan_files,
        patterns="*.pickle *.pkl",
    ),
    **{
        f"llama2c{suffix}": Format(
            f"llama2.c: .bin of version {version}",
            partial(llama2c.matches, version=version),
            llama2c.open_checkpoint,
            partial(llama2c.plan_files, version=version),
            lossy=version == 2,
            patterns="*.bin" if version == 0 else "",
        )
        for version, suffix in enumerate(("", "-v1", "-v2"))
    },
    "gguf": Format(
        "GGUF, llama.cpp's", gguf.matches, gguf.open_checkpoint, gguf.plan_files, suffix=GGUF, patterns="*.gguf *.ggml"
    ),
    **{
        f"gguf-{kind}": Format(
            f"GGUF of {bits} bits",
            _never,
            gguf.open_checkpoint,
            partial(gguf.plan_files, quantization=kind),
            lossy=True,
            suffix=GGUF,
        )
        for kind, bits in (("q8_0", 8), ("q4_0", 4))
    },
    "run": Format(
        "camelid's own run: recipe.toml with checkpoints/",
        run_folder.matches,
        _open_run,
        None,
        patterns="recipe.toml checkpoints metrics.jsonl",
    ),
    "peft": Format(
        "PEFT: adapter_config.json with adapter_model.safetensors",
        peft.matches,
        peft.open_checkpoint,
        None,
        patterns="adapter_*",
    ),
}
OPENERS: Mapping[str, Callable[[Path, ModelConfig | None], Checkpoint]] = {
    **{prefix: partial(easylm.open_checkpoint, prefix=prefix) for prefix in easylm.PREFIXES},
    "mindspore-half": partial(mindformers.open_checkpoint, rope_layout="half"),
    **{name: format.open for name, format in FORMATS.items()},
}
"""by every prefix that a path `prefix::path` may have"""
READABLE = tuple(OPENERS)
WRITABLE = tuple(name for name, format in FORMATS.items() if format.plan_files is not None)
OPENERS_IGNORING: Mapping[str, Callable[..., Checkpoint]] = {"hf": hf.open_checkpoint, "peft": peft.open_checkpoint}
"""formats that read config.json themselves, and take the names of fields that are treated as absent"""


def open_checkpoint(
    path: str | Path,
    format: str | None = None,
    config: ModelConfig | None = None,
    ignore: Sequence[str] = (),
    lora_alpha: float | None = None,
) -> Checkpoint:
    """Opens a checkpoint of any format in its place, or a repository of the Hugging Face Hub by its name.

    Args:
        path: a file, a folder, a Hub name, or any of them with a format in front, as in `easylm::streaming_params`.
        format: one of READABLE; None detects the format from the files.
        config: describes the model if the files do not, and takes precedence over config.json.
        ignore: fields of config.json that are treated as absent; without effect if `config` is given.
        lora_alpha: of LoRA factors in a MindSpore checkpoint; None reads it from a YAML file in the folder.

    Raises UserError if the checkpoint is damaged, incomplete, ambiguous or not supported.
    """
    prefix, path = split_prefix(path)
    format = prefix or format
    place = named_path(path)
    if not place.exists():
        place = find_checkpoint_folder(path, partial(read_model_config, ignore=ignore))
    folder = place if place.is_dir() else place.parent
    complete_replacement(folder)
    format = format or detect(place)
    if format not in OPENERS:
        raise UserError(f"format {format!r} is unknown", f"The formats are {', '.join(READABLE)}.")
    opener, notes = OPENERS[format], ()
    if ignore and config is None:
        if format in OPENERS_IGNORING:
            opener = partial(OPENERS_IGNORING[format], ignore=ignore)
        elif (folder / "config.json").is_file():
            fields, notes = read_config_json(folder, ignore)
            config = config_from_hf(fields)
    if lora_alpha is not None:
        if not format.startswith("mindspore"):
            raise UserError(
                f"lora_alpha = {lora_alpha:g} is for LoRA factors in MindSpore files, and {place} is {format}",
                "Leave it out.",
            )
        opener = partial(opener, lora_alpha=lora_alpha)
    checkpoint = opener(place, config)
    return replace(checkpoint, notes=(*notes, *checkpoint.notes, *checkpoint.mixed))


def split_prefix(path: str | Path) -> tuple[str | None, str]:
    """Splits `format::path` into the format and the path; the format is None if there is no prefix."""
    prefix, colons, rest = str(path).partition("::")
    return (prefix, rest) if colons and not Path(path).exists() else (None, str(path))


def detect(place: Path) -> str:
    """The name of the format that matches a path; raises UserError if there is none, or more than one."""
    if (place.is_file() and not place.stat().st_size) or (place.is_dir() and not any(place.iterdir())):
        raise UserError(f"{place} is empty", "Give the folder or the file of a checkpoint.")
    found = [name for name, format in FORMATS.items() if format.matches(place)]
    if found == ["hf", "mindspore"]:
        return "mindspore"  # safetensors too, with names of its own
    if len(found) > 1:
        raise UserError(f"{place} could be {' or '.join(found)}", f"Give the format, for example {found[0]}::{place}")
    if found:
        return found[0]
    if (place / "config.json").is_file():
        return "hf"  # whose reader reports what is missing
    raise _unknown(place)


def _unknown(place: Path) -> UserError:
    """The error for a path that matches no format: it names the contents, the likeliest formats, and a way out."""
    children = sorted(place.iterdir()) if place.is_dir() else [place]
    for file in children:
        refuse_stand_in(file)
    for near in children if place.is_dir() else [place.parent]:
        if near.is_dir() and any(format.matches(near) for format in FORMATS.values() if format.suffix != place.suffix):
            return UserError(f"{place} is not a checkpoint itself", f"There is one in {near}: give that folder.")

    def resemblance(name: str) -> int:
        patterns = FORMATS[name].patterns.split()
        return sum(any(fnmatch.fnmatch(child.name, pattern) for child in children) for pattern in patterns)

    likely = sorted((name for name in FORMATS if FORMATS[name].patterns), key=resemblance, reverse=True)[:3]
    contents = summarize([child.name for child in children], 5)
    about = f": it has no config.json, and holds {contents}" if place.is_dir() else ""
    formats = "; ".join(f"{name} ({FORMATS[name].description})" for name in likely)
    return UserError(
        f"{place} does not look like a checkpoint{about}",
        f"The likeliest formats are {formats}. If it is one of them, put the format in front of the path, as in "
        f"{likely[0]}::{place}, and describe the model with --config if no file does.",
    )


def plan_files(export: ExportSpec, format: str) -> list[PlannedFile]:
    """All files of a model in a format; no values are read. Raises UserError if the format cannot hold the model."""
    if format not in FORMATS:
        raise UserError(f"format {format!r} is unknown", f"The formats that can be written are {', '.join(WRITABLE)}.")
    files = FORMATS[format].plan_files
    if files is None:
        raise UserError(f"the format {format!r} can only be read", f"Choose one of {', '.join(WRITABLE)}.")
    for name, usual in {**dict.fromkeys(TENSOR + PIPELINE, 1), **dict.fromkeys(SHARDS)}.items():
        given = getattr(export, name)
        if given != usual and (given < 1 or name not in FORMATS[format].sharding):
            others = ", ".join(other for other, kind in FORMATS.items() if name in kind.sharding)
            raise UserError(f"{name} = {given} does not apply to {format}", f"It may be 1 or more for {others}.")
    return [*files(export), json_file("config.json", config_to_hf(export.config, export.dtypes["embed"].name))]


def write_checkpoint(
    destination: Path,
    export: ExportSpec,
    format: str = "hf",
    *,
    overwrite: bool = False,
    resume: bool = False,
    source: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
    workers: int = WORKERS,
) -> tuple[str, ...]:
    """Writes a folder, or a single file, under a temporary name until it is complete.

    With `overwrite`, the files of a checkpoint in `destination` are replaced at the end, and other files are left
    alone. With `resume`, resumes the writing of an earlier process that was killed, if it wrote the same files from the
    same `source`, which is a fingerprint. `progress` is called with the bytes done and the bytes in total. Returns
    notes for the user on what the format cannot hold.
    """
    files, companions = plan_files(export, format), export.companions
    notes = tuple(note for file in files for note in file.notes)
    if single_file := is_single_file(destination, format):
        files, companions = [replace(files[0], name=destination.resolve().name)], ()
    need = sum(file.size for file in files) + sum(file.stat().st_size for file in companions)
    journal = JOURNAL if resume else ""
    expected = {file.name: None for file in files} | {file.name: file for file in companions}
    if single_file:
        temporary = new_file(destination, need, overwrite, journal)
    else:
        temporary = new_folder(destination, need, overwrite, journal, expected)
    with temporary as folder:
        # Before the journal is removed, so that a process that is killed here can be resumed too.
        copy_companions(companions, folder)
        write_files(folder, files, source=f"{format} {source}", progress=progress, workers=workers)
    return notes


def is_single_file(destination: Path, format: str) -> bool:
    """Whether a destination is a file, by the suffix of its name, and not a folder.

    Raises UserError if the suffix is that of another format.
    """
    for name, other in FORMATS.items():
        if other.suffix is not None and destination.suffix.lower() == other.suffix:
            if FORMATS[format].suffix != other.suffix:
                raise UserError(
                    f"{destination} is the name of a file of the format {name}, and the requested format is {format}",
                    f"Request {name}, or choose another name.",
                )
            return True
    return False
