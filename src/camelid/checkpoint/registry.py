"""Every format by name: which paths look like it, how it is opened, how it is written."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from camelid.checkpoint.adapters import peft
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
    what: str
    """for messages"""
    matches: Callable[[Path], bool]
    """whether a file or a folder looks like it, from names and first bytes"""
    open: Callable[[Path, ModelConfig | None], Checkpoint]
    """opens it; the config is what the user says of a model whose files do not"""
    plan_files: Callable[[ExportSpec], list[PlannedFile]] | None
    """the files that hold a model, beside config.json; None: the format is only read"""
    lossy: bool = False
    """whether numbers are rounded to fewer bits than their dtype has"""
    cuts: tuple[str, ...] = ()
    """the fields of Saving by which it is cut into shards"""
    usual: str = ""
    """patterns of the names of its files, to find what an unknown folder resembles"""
    suffix: str | None = None
    """how the name of a destination ends that is one file, with everything inside, and not a folder"""


TENSOR, PIPELINE, SHARDS = ("tensor_parallel",), ("pipeline_parallel",), ("shards",)


def _never(path: Path) -> bool:
    """Of another way to write what a format before it opens."""
    return False


TRAIN_STATE, GGUF = "easylm-trainstate", ".gguf"
FORMATS: Mapping[str, Format] = {
    "hf": Format(
        "Hugging Face: config.json with safetensors or .bin",
        hf.matches,
        hf.open_checkpoint,
        hf.plan_files,
        cuts=SHARDS,
        usual="config.json *.safetensors *.bin *.index.json tokenizer*",
    ),
    "meta": Format(
        "Meta: params.json with consolidated.00.pth",
        meta.matches,
        meta.open_checkpoint,
        meta.plan_files,
        cuts=TENSOR,
        usual="params.json *.pth *.pt tokenizer.model",
    ),
    "easylm": Format(
        "EasyLM and LL3M: streaming_params, flax_params or streaming_train_state",
        easylm.matches,
        easylm.open_checkpoint,
        easylm.plan_files,
        usual="*streaming_* flax_params* *.msgpack *.ckpt",
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
        mindspore.open_checkpoint,
        mindspore.plan_files,
        cuts=TENSOR + PIPELINE,
        usual="*.ckpt rank_* strategy",
    ),
    "mindspore-safetensors": Format(
        "MindSpore: safetensors with MindFormers' names",
        _never,
        mindspore.open_checkpoint,
        partial(mindspore.plan_files, safetensors=True),
        cuts=TENSOR + PIPELINE,
    ),
    "mindspore-interleaved": Format(
        "MindSpore, with MindFormers' rotary layout before August 2023",
        _never,
        partial(mindspore.open_checkpoint, rope_layout="interleaved"),
        partial(mindspore.plan_files, rope_layout="interleaved"),
        cuts=TENSOR + PIPELINE,
    ),
    "megatron": Format(
        "Megatron-LM: latest_checkpointed_iteration.txt with iter_*, of mp_rank_*/model_optim_rng.pt or of torch_dist",
        megatron.matches,
        megatron.open_checkpoint,
        megatron.plan_files,
        cuts=TENSOR + PIPELINE,
        usual="latest_checkpointed_iteration.txt iter_* release mp_rank_* *.pt",
    ),
    "megatron-legacy": Format(
        "Megatron-LM, with the names before Megatron core",
        _never,
        megatron.open_checkpoint,
        partial(megatron.plan_files, names="legacy"),
        cuts=TENSOR + PIPELINE,
    ),
    "dcp": Format(
        "PyTorch's distributed checkpoints: .metadata with __0_0.distcp, of torchtitan or FSDP",
        distributed.matches_other,
        distributed.open_checkpoint,
        None,
        usual=".metadata *.distcp",
    ),
    "llama2-jax": Format(
        "llama-2-jax: a .pickle",
        llama2_jax.matches,
        llama2_jax.open_checkpoint,
        llama2_jax.plan_files,
        usual="*.pickle *.pkl",
    ),
    **{
        f"llama2c{suffix}": Format(
            f"llama2.c: .bin of version {version}",
            partial(llama2c.matches, version=version),
            llama2c.open_checkpoint,
            partial(llama2c.plan_files, version=version),
            lossy=version == 2,
            usual="*.bin" if version == 0 else "",
        )
        for version, suffix in enumerate(("", "-v1", "-v2"))
    },
    "gguf": Format(
        "GGUF, llama.cpp's", gguf.matches, gguf.open_checkpoint, gguf.plan_files, suffix=GGUF, usual="*.gguf *.ggml"
    ),
    **{
        f"gguf-{kind}": Format(
            f"GGUF of {bits} bits",
            _never,
            gguf.open_checkpoint,
            partial(gguf.plan_files, kind=kind),
            lossy=True,
            suffix=GGUF,
        )
        for kind, bits in (("q8_0", 8), ("q4_0", 4))
    },
    "run": Format(
        "camelid's own run: recipe.toml with checkpoints/",
        run_folder.matches,
        run_folder.open_checkpoint,
        None,
        usual="recipe.toml checkpoints metrics.jsonl",
    ),
    "peft": Format(
        "PEFT: adapter_config.json with adapter_model.safetensors",
        peft.matches,
        peft.open_checkpoint,
        None,
        usual="adapter_*",
    ),
}
# What may stand before `::` in a path: the formats, and other words for what their files may be.
OPEN: Mapping[str, Callable[[Path, ModelConfig | None], Checkpoint]] = {
    **{prefix: partial(easylm.open_checkpoint, prefix=prefix) for prefix in easylm.PREFIXES},
    "mindspore-half": partial(mindspore.open_checkpoint, rope_layout="half"),
    **{name: format.open for name, format in FORMATS.items()},
}


IGNORING: Mapping[str, Callable[..., Checkpoint]] = {"hf": hf.open_checkpoint, "peft": peft.open_checkpoint}
"""formats that find and read config.json themselves, and leave fields of it out"""


def open_checkpoint(
    path: str | Path,
    format: str | None = None,
    config: ModelConfig | None = None,
    ignore: Sequence[str] = (),
) -> Checkpoint:
    """Opens a checkpoint of any format where it lies, or a repository of the Hugging Face Hub by its name.

    `format` None asks the files; `format::path` says it too. Without `config`, the fields in `ignore` are as if
    config.json did not have them. Raises UserError for what is damaged, incomplete, ambiguous or not understood.
    """
    prefix, path = split_prefix(path)
    format = prefix or format
    place = named_path(path)
    if not place.exists():
        place = find_checkpoint_folder(path, partial(read_model_config, ignore=ignore))
    complete_replacement(place if place.is_dir() else place.parent)
    format = format or detect(place)
    if format not in OPEN:
        raise UserError(f"format {format!r} is unknown", f"The formats are {', '.join(OPEN)}.")
    opener, notes = OPEN[format], ()
    if ignore and config is None:
        if format in IGNORING:
            opener = partial(IGNORING[format], ignore=ignore)
        elif ((folder := place if place.is_dir() else place.parent) / "config.json").is_file():
            said, notes = read_config_json(folder, ignore)
            config = config_from_hf(said)
    checkpoint = opener(place, config)
    return replace(checkpoint, notes=(*notes, *checkpoint.notes, *checkpoint.mixed))


def split_prefix(path: str | Path) -> tuple[str | None, str]:
    """The format that stands before a path, `format::path`, and the path; None where there is none."""
    prefix, colons, rest = str(path).partition("::")
    return (prefix, rest) if colons and not Path(path).exists() else (None, str(path))


def detect(place: Path) -> str:
    """The name of the one format that a path looks like."""
    found = [name for name, format in FORMATS.items() if format.matches(place)]
    if found == ["hf", "mindspore"]:
        return "mindspore"  # safetensors too, with names of its own
    if len(found) > 1:
        raise UserError(f"{place} could be {' or '.join(found)}", f"Say which, for example as {found[0]}::{place}")
    if found:
        return found[0]
    if (place / "config.json").is_file():
        return "hf"  # whose reader can say what is missing
    raise _unknown(place)


def _unknown(place: Path) -> UserError:
    """The refusal of a path that looks like no format: what is there, the likeliest formats, and how to name one."""
    children = sorted(place.iterdir()) if place.is_dir() else [place]
    for file in children:
        refuse_stand_in(file)
    for near in children if place.is_dir() else [place.parent]:
        if near.is_dir() and any(format.matches(near) for format in FORMATS.values() if format.suffix != place.suffix):
            return UserError(f"{place} is not a checkpoint itself", f"There is one in {near}: give that folder.")

    def resemblance(name: str) -> int:
        patterns = FORMATS[name].usual.split()
        return sum(any(fnmatch.fnmatch(child.name, pattern) for child in children) for pattern in patterns)

    likely = sorted((name for name in FORMATS if FORMATS[name].usual), key=resemblance, reverse=True)[:3]
    held = summarize([child.name for child in children], 5) or "nothing"
    return UserError(
        f"{place} looks like no checkpoint" + (f": it has no config.json, and holds {held}" if place.is_dir() else ""),
        f"The likeliest formats are {'; '.join(f'{name} ({FORMATS[name].what})' for name in likely)}. If it is of one "
        f"of them, name the format in front of the path, as in {likely[0]}::{place}, and describe the model with "
        "--config where no file does.",
    )


def plan_files(export: ExportSpec, format: str) -> list[PlannedFile]:
    """All files of a model in a format, nothing read; raises UserError where the format cannot hold it."""
    if format not in FORMATS:
        raise UserError(f"format {format!r} is unknown", f"The formats are {', '.join(FORMATS)}.")
    files = FORMATS[format].plan_files
    if files is None:
        raise UserError(f"{format!r} is a format that is only read", "Choose another one.")
    for name, usual in {**dict.fromkeys(TENSOR + PIPELINE, 1), **dict.fromkeys(SHARDS)}.items():
        given = getattr(export, name)
        if given != usual and (given < 1 or name not in FORMATS[format].cuts):
            which = ", ".join(other for other, kind in FORMATS.items() if name in kind.cuts)
            raise UserError(f"{name} = {given} is not for the format {format}", f"It may be 1 or more for {which}.")
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
    """Writes a folder, or one file where `is_one_file` says so, under a temporary name until it is complete.

    With `overwrite`, the files of a checkpoint that is there are replaced then, and other files are left alone.

    With `resume`, goes on where an earlier process was killed that wrote the same from the same `source`. Returns notes
    for users on what the format cannot hold.
    """
    files, companions = plan_files(export, format), export.companions
    notes = tuple(note for file in files for note in file.notes)
    if one_file := is_single_file(destination, format):
        files, companions = [replace(files[0], name=destination.resolve().name)], ()
    need = sum(file.size for file in files) + sum(file.stat().st_size for file in companions)
    journal = JOURNAL if resume else ""
    names = {file.name: None for file in files} | {file.name: file for file in companions}
    new = (
        new_file(destination, need, overwrite, journal)
        if one_file
        else (new_folder(destination, need, overwrite, journal, names))
    )
    with new as folder:
        # Before the journal is done with, so that a process that is killed here can be resumed too.
        copy_companions(companions, folder)
        write_files(folder, files, source=f"{format} {source}", progress=progress, workers=workers)
    return notes


def is_single_file(destination: Path, format: str) -> bool:
    """Whether a destination is a file by the end of its name, and not a folder.

    Raises UserError where its name ends as files of another format do.
    """
    for name, other in FORMATS.items():
        if other.suffix is not None and destination.suffix.lower() == other.suffix:
            if FORMATS[format].suffix != other.suffix:
                raise UserError(
                    f"{destination} is the name of a file of the format {name}, and {format} is asked for",
                    f"Ask for {name}, or choose another name.",
                )
            return True
    return False
