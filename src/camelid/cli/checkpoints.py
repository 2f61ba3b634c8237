"""Commands for checkpoints of any format: from one to another, and how two differ."""

import dataclasses
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from camelid.cli.shared import (
    Ignore,
    WritableFormat,
    model_config,
    note,
    print_json,
    progress_bar,
    tell,
    tokenizer_of_config,
)
from camelid.errors import UserError
from camelid.inputs import read_text
from camelid.interrupts import cleaned_up

Format = Literal[
    "hf",
    "meta",
    "easylm",
    "easylm-flax",
    "easylm-trainstate",
    "mindspore",
    "mindspore-safetensors",
    "mindspore-interleaved",
    "megatron",
    "megatron-legacy",
    "dcp",
    "llama2-jax",
    "llama2c",
    "llama2c-v1",
    "llama2c-v2",
    "gguf",
    "gguf-q8_0",
    "gguf-q4_0",
    "run",
    "peft",
]


def convert(
    source: Annotated[Positional[str], arg(metavar="SOURCE", help="a checkpoint's folder, or its name on the Hub")],
    destination: Annotated[
        Positional[Path | None],
        arg(metavar="DESTINATION", help="a folder that does not exist yet; a name that ends in .gguf is one file"),
    ] = None,
    to: WritableFormat | None = None,
    from_format: Annotated[Format | None, arg(name="from")] = None,
    config: str | None = None,
    ignore_config_field: Ignore = (),
    tokenizer: str | None = None,
    rope_layout: Literal["half", "interleaved", "auto"] | None = None,
    reference: Path | None = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, arg(help="of the tensors; each keeps its own if left out")
    ] = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    shards: int | None = None,
    check: bool = False,
    verify: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    without_tokenizer: bool = False,
) -> None:
    """Write a checkpoint anew, a slice at a time, with its tokenizer.

    camelid convert meta-llama/Llama-3.2-1B ./llama-bf16 --dtype bfloat16
    camelid convert ./TinyLlama ./tinyllama-meta --to meta --tensor-parallel 2 --verify
    camelid convert ./TinyLlama tinyllama.gguf --to gguf-q8_0
    camelid convert ./TinyLlama --check

    Args:
        to: format that is written; if left out, gguf for a DESTINATION that ends in .gguf, otherwise hf
        from_format: format of SOURCE, where its files leave a doubt
        config: what SOURCE is, where its files do not say: a preset, a config.json, or a folder that has one, whose
            tokenizer is taken where SOURCE has none
        tokenizer: a folder or file with the tokenizer that is written, instead of SOURCE's
        rope_layout: of MindSpore's files; auto takes the one that predicts the reference better
        reference: a text for --rope-layout auto
        tensor_parallel: shards of every matrix, in formats that have them
        pipeline_parallel: stages of layers, in formats that have them
        shards: files of about one size, in formats that have them; if left out, as many as 5 GB each need
        check: read all of SOURCE, report, and write nothing
        verify: open the result again, and compare every tensor and the logits of a text
        resume: go on where the same command was killed, and keep what is done if it is interrupted
        overwrite: replace the checkpoint in the destination; all other files there are left alone
        without_tokenizer: leave the tokenizer out, for example one that a GGUF file cannot hold
    """
    from camelid.checkpoint.convert import convert

    if (destination is None) != check:
        advice = "Give a folder to write to, or --check to read alone."
        raise UserError("convert takes a DESTINATION" if destination is None else "--check writes nothing", advice)
    if check:
        _refuse_beside_check(
            to=to,
            dtype=dtype,
            tokenizer=tokenizer,
            tensor_parallel=tensor_parallel != 1,
            pipeline_parallel=pipeline_parallel != 1,
            shards=shards is not None,
            verify=verify,
            resume=resume,
            overwrite=overwrite,
            without_tokenizer=without_tokenizer,
        )
    if reference is not None and rope_layout != "auto":
        raise UserError("--reference is for --rope-layout auto", "Leave it out.")
    described = model_config(config, ignore_config_field)
    opened_as: str | None = from_format
    if rope_layout is not None:
        source, opened_as = _rope_layout(source, from_format, described, ignore_config_field, rope_layout, reference)
    if destination is None:
        return _check(source, opened_as, described, ignore_config_field)
    to = to or ("gguf" if destination.suffix.lower() == ".gguf" else "hf")
    with progress_bar("convert") as progress, cleaned_up(), tempfile.TemporaryDirectory() as made:
        notes = convert(
            source,
            destination,
            to=to,
            format=opened_as,
            config=described,
            ignore=ignore_config_field,
            dtype=dtype,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            shards=shards,
            resume=resume,
            overwrite=overwrite,
            companions=lambda files: _companions(files, tokenizer, config, to, Path(made)),
            with_tokenizer=not without_tokenizer,
            progress=progress,
        )
    tell(notes)
    note(f"wrote {destination}")
    if verify:
        _verify(source, destination, opened_as, described, ignore_config_field, to)
    return None


def _companions(
    files: Sequence[Path], tokenizer: str | None, config: str | None, to: str, made: Path
) -> Sequence[Path]:
    """The files that are written beside the weights: those of the source, with the tokenizer that was asked for."""
    from camelid.text.tokenizer import VOCABULARIES, companions_with, load_tokenizer, portable

    tokenizer = tokenizer or tokenizer_of_config(config, any(file.name in VOCABULARIES for file in files))
    if tokenizer is not None:
        taken = load_tokenizer(tokenizer)
        tell(taken.notes)
        files = companions_with(files, taken)
    return portable(files, made, keep_ranks=to == "meta")  # Meta's own code reads no other tokenizer


def _refuse_beside_check(**given: object) -> None:
    """Raises UserError for options of writing."""
    if named := [f"--{name.replace('_', '-')}" for name, value in given.items() if value]:
        raise UserError(f"--check writes nothing, and takes no {' or '.join(named)}", "Leave out one or the other.")


def _rope_layout(
    source: str, format: str | None, config, ignore: tuple[str, ...], layout: str, reference: Path | None
) -> tuple[str, str]:
    """A MindSpore file's path, and its format with this layout; "auto" asks a text in which the model was trained."""
    from camelid.checkpoint.formats.mindspore import FORMAT_OF, QKV
    from camelid.checkpoint.registry import open_checkpoint, split_prefix

    prefix, path = split_prefix(source)
    format = prefix or format
    for known, name in FORMAT_OF.items():
        if format == name and layout != known:
            raise UserError(f"{name} says {known}, and --rope-layout {layout}", "Leave out one of them.")
    found = open_checkpoint(path, format, config, ignore)
    if found.format != "mindspore":
        raise UserError(f"--rope-layout is for MindSpore's files, and {source} is {found.format}", "Leave it out.")
    if layout != "auto":
        return path, FORMAT_OF[layout]
    if any(part.rule.name == QKV for part in found.table.entries.values()):
        note("the rotary layout is half: w_qkv has no other")
        return path, FORMAT_OF["half"]
    if reference is None:
        raise UserError("--rope-layout auto needs a text", "Give one with --reference TEXTFILE.")
    import numpy as np

    from camelid.evaluate.parity import SAMPLE_TOKENS, mean_loss
    from camelid.text.tokenizer import load_tokenizer

    tokens = np.array(load_tokenizer(found.folder).encode(read_text(reference))[: 4 * SAMPLE_TOKENS])
    if len(tokens) and (largest := int(tokens.max())) >= found.config.vocab_size:
        raise UserError(
            f"{reference} needs token id {largest}, and the model's vocabulary has {found.config.vocab_size}",
            "Use the model's own tokenizer.",
        )
    if len(tokens) < 2:
        raise UserError(f"{reference} has nothing to predict", "Give a text of some sentences.")
    losses = {
        layout: mean_loss(open_checkpoint(path, name, config, ignore), tokens) for layout, name in FORMAT_OF.items()
    }
    best = min(losses, key=losses.__getitem__)
    told = ", ".join(f"{value:.3f} {layout}" for layout, value in losses.items())
    note(f"the rotary layout is {best}: a token of {reference} costs {told} (nats)")
    return path, FORMAT_OF[best]


def _check(source: str, format: str | None, config, ignore: tuple[str, ...]) -> None:
    """Reads everything, and says what is there."""
    from camelid.checkpoint.compare import summarize_parameters, verify_embedded_checksums
    from camelid.checkpoint.files import MANIFEST, check_manifest
    from camelid.checkpoint.registry import open_checkpoint
    from camelid.checkpoint.single_file import manifest_of
    from camelid.checkpoint.tensors import file_names

    checkpoint = open_checkpoint(source, format, config, ignore)
    with progress_bar("read") as progress:
        found = list(summarize_parameters(checkpoint, progress))
    with progress_bar("checksums") as progress:
        own = manifest_of(checkpoint.files[0])
        sums = check_manifest(checkpoint.folder, progress, own.name if own.is_file() else MANIFEST)
    with progress_bar("files' own checksums") as progress:
        having = verify_embedded_checksums(checkpoint, progress)
    tell(checkpoint.notes)
    dtypes = ", ".join(sorted({each.dtype for each in found}))
    print(f"{checkpoint.format}: {sum(each.size for each in found):,} parameters in {dtypes}")
    if not sums and not having:
        print("checksums: the folder has none")
    if sums:
        print(f"checksums: {sums} tensors are as they were written")
    if having:
        print(f"checksums: those within {file_names(having, checkpoint.folder)} are right")
    if odd := [each for each in found if each.not_finite]:
        for each in odd:
            print(f"{each.path}: {each.not_finite:,} of {each.size:,} numbers are infinite or NaN")
        sys.exit(1)


def diff(
    a: Annotated[Positional[str], arg(metavar="A", help="a checkpoint of any format")],
    b: Annotated[Positional[str], arg(metavar="B", help="another")],
    config: str | None = None,
    ignore_config_field: Ignore = (),
    json: bool = False,
) -> None:
    """Compare two checkpoints of any formats, tensor by tensor; exit status 1 where they differ.

    camelid diff ./TinyLlama ./tinyllama-meta
    camelid diff easylm::streaming_params ./hf --json

    Where one has other parameters than the other, or of other shapes, these are named and no numbers are read.

    Args:
        config: what both models are, where their files do not say: a preset, or a config.json
        json: print one JSON object
    """
    from camelid.checkpoint.compare import compare, config_differences, shape_differences
    from camelid.checkpoint.registry import open_checkpoint

    described = model_config(config, ignore_config_field)
    one, other = (open_checkpoint(path, config=described, ignore=ignore_config_field) for path in (a, b))
    opened = one, other
    tell(f"{path}: {text}" for path, each in zip((a, b), opened, strict=True) for text in each.notes)
    fields, shapes = config_differences(opened[0].config, opened[1].config), shape_differences(*opened)
    with progress_bar("compare") as progress:
        found = [] if shapes else list(compare(*opened, progress))
    differ = [difference for difference in found if not difference.equal]
    if json:
        print_json(_differences_json(fields, shapes, found))
    else:
        for name, (ours, theirs) in fields.items():
            print(f"{name}: {ours} and {theirs}")
        for path, (ours, theirs) in shapes.items():
            if ours is None or theirs is None:
                print(f"{path}: only {b if ours is None else a} has it")
            else:
                print(f"{path}: {ours} and {theirs}")
        for difference in differ:
            print(f"{difference.path}: {' and '.join(difference.dtypes)}, at most {difference.largest:.3g} apart")
        if not shapes:
            print(f"{len(found) - len(differ)} of {len(found)} parameters are equal")
    if fields or shapes or differ:
        sys.exit(1)


def _differences_json(fields, shapes, found) -> dict[str, object]:
    """What `diff --json` prints; numbers that JSON cannot say are null."""

    def plain(value: object) -> object:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        return value

    parameters = [dataclasses.asdict(difference) for difference in found]
    for parameter in parameters:
        parameter["largest"] = parameter["largest"] if math.isfinite(parameter["largest"]) else None
    config = {name: [plain(value) for value in pair] for name, pair in fields.items()}
    return {"config": config, "shapes": shapes, "parameters": parameters}


def delta_make(
    base: Annotated[Positional[str], arg(metavar="BASE", help="a checkpoint of any format")],
    tuned: Annotated[Positional[str], arg(metavar="TUNED", help="what became of it")],
    destination: Annotated[Positional[Path], arg(metavar="DESTINATION", help="a folder that does not exist yet")],
    kind: Literal["exact", "sum", "lora"] = "exact",
    rank: int | None = None,
    config: str | None = None,
    ignore_config_field: Ignore = (),
    overwrite: bool = False,
) -> None:
    """Write the difference of two checkpoints of any formats.

    camelid delta make ./llama-7b ./vicuna-7b ./vicuna-delta
    camelid delta make ./llama-7b ./vicuna-7b ./vicuna-lora --kind lora --rank 64

    Args:
        kind: exact: bit by bit; sum: numbers, rounded, as published deltas are; lora: the nearest PEFT adapter
        rank: of the adapter
        config: what both models are, where their files do not say: a preset, or a config.json
        overwrite: replace the checkpoint in the destination; all other files there are left alone
    """
    from camelid.checkpoint.adapters.delta import make

    described = model_config(config, ignore_config_field)
    with progress_bar("delta make") as progress:
        made = make(
            base,
            tuned,
            destination,
            kind=kind,
            rank=rank,
            config=described,
            ignore=ignore_config_field,
            overwrite=overwrite,
            progress=progress,
        )
    tell(made.notes)
    if made.left is not None:
        note(f"rank {rank} leaves {made.left:.3%} of the difference")
    note(f"wrote {destination}")


def delta_apply(
    base: Annotated[Positional[str], arg(metavar="BASE", help="the checkpoint from which the delta was made")],
    delta: Annotated[Positional[str], arg(metavar="DELTA", help="a delta's folder, or a PEFT adapter")],
    destination: Annotated[Positional[Path], arg(metavar="DESTINATION", help="a folder that does not exist yet")],
    to: WritableFormat = "hf",
    summed: Annotated[bool, arg(name="sum")] = False,
    config: str | None = None,
    ignore_config_field: Ignore = (),
    overwrite: bool = False,
) -> None:
    """Write what a base and a delta make.

    camelid delta apply ./llama-7b ./vicuna-delta ./vicuna-7b
    camelid delta apply ./llama-7b ./vicuna-7b-delta-v0 ./vicuna-7b --sum

    Args:
        to: format that is written
        summed: DELTA is an ordinary checkpoint whose values are differences
        config: what BASE is, where its files do not say: a preset, or a config.json
        overwrite: replace the checkpoint in the destination; all other files there are left alone
    """
    from camelid.checkpoint.adapters.delta import apply

    described = model_config(config, ignore_config_field)
    with progress_bar("delta apply") as progress:
        notes = apply(
            base,
            delta,
            destination,
            to=to,
            summed=summed,
            config=described,
            ignore=ignore_config_field,
            overwrite=overwrite,
            progress=progress,
        )
    tell(notes)
    note(f"wrote {destination}")


def _verify(source: str, written: Path, format: str | None, config, ignore: tuple[str, ...], to: str) -> None:
    """Says how far what was written is from its source, and what it does not say without its config.json."""
    from camelid.checkpoint.compare import compare, config_differences
    from camelid.checkpoint.registry import FORMATS, open_checkpoint
    from camelid.evaluate.parity import compare_logits, sample_tokens
    from camelid.text.tokenizer import find_tokenizer

    pair = open_checkpoint(source, format, config, ignore), open_checkpoint(written, to)
    with progress_bar("verify") as progress:
        found = list(compare(*pair, progress))
    note(f"compared {len(found)} parameters of {source}, read as {pair[0].format}, with {written}, read as {to}")
    if all(difference.equal for difference in found):
        note("every tensor is equal")
    else:
        note(f"warning: tensors were rounded; they are at most {max(each.largest for each in found):.3g} apart")
    if changed := config_differences(pair[0].config, pair[1].config):
        for name, (before, after) in changed.items():
            note(f"warning: {name} was {before}, and is {after} now")
    if not FORMATS[to].lossy and not all(difference.rounded for difference in found):
        raise UserError(f"{written} does not hold what {source} does", "This is a fault of camelid; please report it.")
    tokens = sample_tokens(find_tokenizer(pair[0].tokenizer_folder), pair[0].config.vocab_size)
    parity = compare_logits(*pair, tokens)
    note(
        f"logits of {parity.tokens} tokens, up to {parity.max_logit:.3g}, are at most {parity.max_difference:.3g} "
        f"apart; {parity.agreement:.0%} agree on the next token"
        if math.isfinite(parity.max_difference)
        else "warning: the logits are infinite or NaN, so they could not be compared"
    )
    if (layout := pair[0].assumed_layout) is not None:
        note(
            f"warning: {layout} was assumed in reading {source}, and so in this comparison, which cannot show whether "
            "it is right; --rope-layout auto with --reference TEXTFILE can"
        )
    if untold := _untold(written, pair[1], to):
        note(f"warning: {untold}")


def _untold(written: Path, checkpoint, to: str) -> str:
    """What only config.json says of a model that was written."""
    import tempfile

    from camelid.checkpoint.compare import config_differences
    from camelid.checkpoint.registry import open_checkpoint

    if to in ("hf", "peft", "run") or written.is_file():
        return ""
    with cleaned_up(), tempfile.TemporaryDirectory() as folder:
        for file in written.absolute().iterdir():
            if file.name != "config.json":
                (Path(folder) / file.name).symlink_to(file)
        try:
            alone = open_checkpoint(folder, to)
        except UserError:
            return f"files of {to} do not say what their model is; keep config.json beside them"
    lost = config_differences(checkpoint.config, alone.config)
    names = ", ".join(f"{name} = {ours}" for name, (ours, _) in lost.items())
    return f"files of {to} do not say {names}; keep config.json beside them" if lost else ""
