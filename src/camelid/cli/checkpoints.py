"""The commands that convert, check and compare checkpoints of any format."""

import dataclasses
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg

from camelid.cli.format_names import ConvertedFormat, ReadableFormat
from camelid.cli.shared import (
    Ignore,
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

if TYPE_CHECKING:
    from camelid.checkpoint.checkpoint import Checkpoint
    from camelid.checkpoint.compare import Difference


def convert(
    source: Annotated[
        Positional[str], arg(metavar="SOURCE", help="folder or file of a checkpoint, or its name on the Hub")
    ],
    destination: Annotated[
        Positional[Path | None],
        arg(metavar="[DESTINATION]", help="folder to create, or a single file if it ends in .gguf"),
    ] = None,
    to: Annotated[ConvertedFormat | None, arg(metavar="FORMAT")] = None,
    from_format: Annotated[ReadableFormat | None, arg(name="from", metavar="FORMAT")] = None,
    config: str | None = None,
    ignore_config_field: Ignore = (),
    tokenizer: str | None = None,
    rope_layout: Literal["half", "interleaved", "auto"] | None = None,
    reference: Path | None = None,
    adapter: Annotated[
        tuple[str, ...],
        UseAppendAction,
        arg(
            metavar="ADAPTER[=WEIGHT]",
            help="add this LoRA adapter: PEFT's folder or its name on the Hub, or a file of MindFormers; can be given "
            "several times",
        ),
    ] = (),
    lora_alpha: float | None = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        arg(help="dtype of the tensors; by default, each keeps its own"),
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
    """Convert a checkpoint to another format, dtype or number of shards.

    camelid convert meta-llama/Llama-3.2-1B ./llama-bf16 --dtype bfloat16
    camelid convert ./TinyLlama ./tinyllama-meta --to meta --tensor-parallel 2 --verify
    camelid convert ./TinyLlama tinyllama.gguf --to gguf-q8_0
    camelid convert ./TinyLlama ./merged --adapter ./lora-a --adapter ./lora-b=0.5
    camelid convert ./TinyLlama ./lora --adapter ./mindformers-lora.ckpt --lora-alpha 16 --to peft
    camelid convert ./TinyLlama --check

    FORMAT is hf, meta, easylm, easylm-flax, easylm-trainstate, mindspore, mindspore-safetensors,
    mindspore-interleaved, megatron, megatron-legacy, llama2-jax, llama2c, llama2c-v1, llama2c-v2, gguf, gguf-q8_0 or
    gguf-q4_0; with --from also dcp, run or peft. --to peft writes an adapter without its base. docs/migrating has a
    page for each system.

    Args:
        to: format to write; by default gguf if DESTINATION ends in .gguf, otherwise hf
        from_format: format of SOURCE, if it is not detected from the files
        config: model configuration of SOURCE, if its files do not contain it: a preset, a config.json or a folder with
            one, whose tokenizer is used if SOURCE has none
        tokenizer: folder or file of a tokenizer to write instead of that of SOURCE
        lora_alpha: alpha of MindFormers' LoRA factors, in ADAPTER or SOURCE, whose files do not contain it; by default
            that of a YAML file in the same folder
        rope_layout: rotary layout of MindSpore files; auto selects the one with the lower loss on --reference
        reference: text file for --rope-layout auto
        tensor_parallel: number of tensor-parallel shards, for formats that support them
        pipeline_parallel: number of pipeline stages, for formats that support them
        shards: number of files of about equal size, for the format hf; by default, files of up to 5 GB
        check: read all of SOURCE, verify its checksums, report infinite or NaN values, and write nothing
        verify: open the result and compare every tensor, and the logits of a text
        resume: resume a conversion by the same command that was killed, and keep partial results on interruption
        overwrite: replace the checkpoint in DESTINATION; other files there are kept
        without_tokenizer: do not write the tokenizer, for example if GGUF does not support it
    """
    from camelid.checkpoint.convert import convert, open_source

    if lora_alpha is not None and not 0 < lora_alpha < math.inf:
        raise UserError(f"--lora-alpha {lora_alpha}", "It is a number above 0.")
    if (destination is None) != check:
        advice = "Give either a DESTINATION or --check."
        raise UserError("convert has no DESTINATION" if destination is None else "--check writes nothing", advice)
    if check:
        _refuse_with_check(
            to=to,
            adapter=adapter,
            lora_alpha=lora_alpha,
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
            adapters=adapter,
            lora_alpha=lora_alpha,
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
        adapted = partial(open_source, source, opened_as, described, ignore_config_field, adapter, lora_alpha)
        _verify(adapted, source, destination, to)
    return None


def _companions(
    files: Sequence[Path], tokenizer: str | None, config: str | None, to: str, made: Path
) -> Sequence[Path]:
    """Returns the files to write in addition to the weights: those of the source, with the requested tokenizer."""
    from camelid.text.tokenizer import VOCABULARIES, companions_with, load_tokenizer, portable

    tokenizer = tokenizer or tokenizer_of_config(config, any(file.name in VOCABULARIES for file in files))
    if tokenizer is not None:
        taken = load_tokenizer(tokenizer)
        tell(taken.notes)
        files = companions_with(files, taken)
    return portable(files, made, keep_ranks=to == "meta")  # the only tokenizer that Meta's own code reads


def _refuse_with_check(**given: object) -> None:
    """Raises UserError for options that only apply to writing."""
    if named := [f"--{name.replace('_', '-')}" for name, value in given.items() if value]:
        raise UserError(f"--check cannot be combined with {' or '.join(named)}", "Remove one or the other.")


def _rope_layout(
    source: str, format: str | None, config, ignore: tuple[str, ...], layout: str, reference: Path | None
) -> tuple[str, str]:
    """Returns the path of a MindSpore checkpoint and its format with this rotary layout.

    "auto" selects the layout with the lower loss on the text `reference`.
    """
    from camelid.checkpoint.formats.mindspore import FORMAT_OF, QKV
    from camelid.checkpoint.registry import open_checkpoint, split_prefix

    prefix, path = split_prefix(source)
    format = prefix or format
    for known, name in FORMAT_OF.items():
        if format == name and layout != known:
            raise UserError(f"{name} means {known}, which contradicts --rope-layout {layout}", "Remove one of them.")
    found = open_checkpoint(path, format, config, ignore)
    if found.format != "mindspore":
        raise UserError(f"--rope-layout is for MindSpore files, and {source} is {found.format}", "Remove it.")
    if layout != "auto":
        return path, FORMAT_OF[layout]
    if any(part.rule.name == QKV for part in found.table.entries.values()):
        note("the rotary layout is half: w_qkv is always stored so")
        return path, FORMAT_OF["half"]
    if reference is None:
        raise UserError("--rope-layout auto requires a text", "Give one with --reference TEXTFILE.")
    import numpy as np

    from camelid.evaluate.parity import SAMPLE_TOKENS, mean_loss
    from camelid.text.tokenizer import load_tokenizer

    tokens = np.array(load_tokenizer(found.folder).encode(read_text(reference))[: 4 * SAMPLE_TOKENS])
    if len(tokens) and (largest := int(tokens.max())) >= found.config.vocab_size:
        raise UserError(
            f"{reference} contains token id {largest}, and the model has vocab_size = {found.config.vocab_size}",
            "Use the model's own tokenizer.",
        )
    if len(tokens) < 2:
        raise UserError(f"{reference} has fewer than two tokens", "Give a text of several sentences.")
    losses = {
        layout: mean_loss(open_checkpoint(path, name, config, ignore), tokens) for layout, name in FORMAT_OF.items()
    }
    best = min(losses, key=losses.__getitem__)
    values = ", ".join(f"{value:.3f} for {layout}" for layout, value in losses.items())
    note(f"the rotary layout is {best}: the loss per token of {reference} is {values} (nats)")
    return path, FORMAT_OF[best]


def _check(source: str, format: str | None, config, ignore: tuple[str, ...]) -> None:
    """Reads all tensors, verifies checksums, and prints a summary; exits with 1 for infinite or NaN values."""
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
        print("checksums: none found")
    if sums:
        print(f"checksums: {sums} tensors match")
    if having:
        print(f"checksums: those embedded in {file_names(having, checkpoint.folder)} match")
    if odd := [each for each in found if each.not_finite]:
        for each in odd:
            print(f"{each.path}: {each.not_finite:,} of {each.size:,} values are infinite or NaN")
        sys.exit(1)


def diff(
    a: Annotated[Positional[str], arg(metavar="A", help="first checkpoint, in any format")],
    b: Annotated[Positional[str], arg(metavar="B", help="second checkpoint, in any format")],
    config: str | None = None,
    ignore_config_field: Ignore = (),
    json: bool = False,
) -> None:
    """Compare two checkpoints tensor by tensor; the exit status is 1 if they differ.

    camelid diff ./TinyLlama ./tinyllama-meta
    camelid diff easylm::streaming_params ./hf --json

    If their parameters or shapes differ, these are listed and no values are compared.

    Args:
        config: model configuration of both, if the files do not contain it: a preset or a config.json
        json: print a JSON object
    """
    from camelid.checkpoint.checkpoint import shown
    from camelid.checkpoint.compare import compare, config_differences, shape_differences
    from camelid.checkpoint.registry import open_checkpoint

    described = model_config(config, ignore_config_field)
    one, other = (open_checkpoint(path, config=described, ignore=ignore_config_field) for path in (a, b))
    opened = one, other
    tell(_with_path(path, text) for path, each in zip((a, b), opened, strict=True) for text in each.notes)
    fields, shapes = config_differences(opened[0].config, opened[1].config), shape_differences(*opened)
    with progress_bar("compare") as progress:
        found = [] if shapes else list(compare(*opened, progress))
    differ = [difference for difference in found if not difference.equal]
    if json:
        print_json(_differences_json(fields, shapes, found))
    else:
        for name, (ours, theirs) in fields.items():
            print(f"{name}: {shown(ours)} and {shown(theirs)}")
        for path, (ours, theirs) in shapes.items():
            if ours is None or theirs is None:
                print(f"{path}: only in {b if ours is None else a}")
            else:
                print(f"{path}: {ours} and {theirs}")
        for difference in differ:
            dtypes = " and ".join(difference.dtypes)
            print(f"{difference.path}: {dtypes}, maximum absolute difference {difference.largest:.3g}")
        if not shapes:
            print(f"{len(found) - len(differ)} of {len(found)} parameters are equal{_equal_if_rounded(differ)}")
    if fields or shapes or differ:
        sys.exit(1)


def _equal_if_rounded(differ: Sequence["Difference"]) -> str:
    """How many of the parameters that differ are equal when both are rounded to the narrower of their dtypes."""
    rounded = Counter(each.narrower for each in differ if each.rounded)
    return "".join(f"; {count} more are equal after rounding to {dtype}" for dtype, count in sorted(rounded.items()))


def _with_path(path: str, text: str) -> str:
    """A note on a checkpoint with its path in front, or in place of the name of its file."""
    name = Path(path).name
    return f"{path}{text.removeprefix(name)}" if text.startswith(f"{name} ") else f"{path}: {text}"


def _differences_json(fields, shapes, found) -> dict[str, object]:
    """Returns the object that `diff --json` prints; NaN and infinities become null."""

    def plain(value: object) -> object:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        return value

    parameters = [dataclasses.asdict(difference) for difference in found]
    for parameter in parameters:
        parameter["largest"] = parameter["largest"] if math.isfinite(parameter["largest"]) else None
    config = {name: [plain(value) for value in pair] for name, pair in fields.items()}
    return {"config": config, "shapes": shapes, "parameters": parameters}


def _verify(open_source: Callable[[], "Checkpoint"], source: str, written: Path, to: str) -> None:
    """Compares a written checkpoint with its source, and reports what only its config.json specifies."""
    from camelid.checkpoint.checkpoint import shown
    from camelid.checkpoint.compare import compare, config_differences
    from camelid.checkpoint.registry import FORMATS, open_checkpoint
    from camelid.evaluate.parity import compare_logits, sample_tokens
    from camelid.text.tokenizer import find_tokenizer

    pair = open_source(), open_checkpoint(written, to)
    with progress_bar("verify") as progress:
        found = list(compare(*pair, progress))
    note(f"compared {len(found)} parameters of {source}, read as {pair[0].format}, with {written}, read as {to}")
    if all(difference.equal for difference in found):
        note("all tensors are equal")
    else:
        largest = max(each.largest for each in found)
        note(f"warning: tensors were rounded; the maximum absolute difference is {largest:.3g}")
    if changed := config_differences(pair[0].config, pair[1].config):
        for name, (before, after) in changed.items():
            note(f"warning: {name} changed from {shown(before)} to {shown(after)}")
    if not FORMATS[to].lossy and not all(difference.rounded for difference in found):
        raise UserError(
            f"the tensors of {written} differ from those of {source}", "This is a bug in camelid; please report it."
        )
    tokens = sample_tokens(find_tokenizer(pair[0].tokenizer_folder), pair[0].config.vocab_size)
    parity = compare_logits(*pair, tokens)
    note(
        f"logits of {parity.tokens} tokens, up to {parity.max_logit:.3g}: maximum absolute difference "
        f"{parity.max_difference:.3g}; {parity.agreement:.0%} of the most likely tokens agree"
        if math.isfinite(parity.max_difference)
        else "warning: the logits are infinite or NaN and cannot be compared"
    )
    if (layout := pair[0].assumed_layout) is not None:
        note(
            f"warning: {layout} is assumed for {source}, which this comparison cannot verify; use --rope-layout auto "
            "with --reference TEXTFILE"
        )
    if missing := _missing_without_config(written, pair[1], to):
        note(f"note: {missing}")


def _missing_without_config(written: Path, checkpoint, to: str) -> str:
    """Returns a description of what only config.json specifies of a written model, empty if there is nothing."""
    import tempfile

    from camelid.checkpoint.checkpoint import shown
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
            return f"files of the format {to} do not describe their model; keep config.json in the same folder"
    lost = config_differences(checkpoint.config, alone.config)
    names = ", ".join(f"{name} = {shown(ours)}" for name, (ours, _) in lost.items())
    return f"files of the format {to} do not contain {names}; keep config.json in the same folder" if lost else ""
