"""`camelid data prepare` and `camelid data inspect`."""

import contextlib
import dataclasses
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import OmitArgPrefixes, Positional, Suppress, arg

from camelid import recipes
from camelid.cli.shared import print_json, progress_bar, tell
from camelid.data.config import Source, SourceOptions
from camelid.errors import UserError

if TYPE_CHECKING:
    from camelid.text.tokenizer import Tokenizer

MINDFORMERS_LENGTH = 2048  # the default of its own --seq_length
VICUNA = "vicuna_v1.1"
"""The template that MindFormers uses for conversations."""

Files = Annotated[
    Positional[tuple[str, ...]],
    arg(metavar="SOURCE...", help="files or globs of .txt, .jsonl, .parquet and other types (see docs/data.md)"),
]
TokenizerSource = Annotated[
    str, arg(metavar="MODEL", help="the folder of a checkpoint, or a tokenizer.json or tokenizer.model")
]


def prepare(
    sources: Files,
    source: Annotated[SourceOptions, OmitArgPrefixes],
    tokenizer: TokenizerSource,
    out: Annotated[Path, arg(metavar="DIR")],
    sequence_length: int | None = None,
    validation_fraction: float = 0.0,
    seed: int = 0,
    workers: int = 1,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Tokenize files into a store for training; rerun the command to resume after an interruption.

    camelid data prepare 'wiki/*.txt' --tokenizer ./TinyLlama --out stores/wiki --split blank_line --workers 8
    camelid data prepare chats.jsonl --kind chat --template vicuna_v1.1 --tokenizer ./TinyLlama --out stores/chats
    camelid data prepare rows.jsonl --kind fields --fields '[prompt],answer' --tokenizer ./TinyLlama --out stores/rows

    Args:
        out: folder of the store
        sequence_length: for --compat mindformers; its records are one token longer
        validation_fraction: fraction of the documents to hold out, for recipes with the same validation_fraction
        seed: seed of the choice of held-out documents
        workers: number of processes that tokenize; 1 uses this process, whose tokenizer may use all cores
        overwrite: replace a store of other sources or options
        json: print one JSON object
    """
    with _in_options():
        text = Source(files=sources, **vars(source))
        _check(text, sequence_length, validation_fraction, seed, workers)
        summary = _prepare(text, tokenizer, out, sequence_length, validation_fraction, seed, workers, overwrite)
    if json:
        return print_json(summary)

    from camelid.cli.data_view import show_prepared

    return show_prepared(summary)


def _prepare(
    source: Source,
    tokenizer: str,
    out: Path,
    sequence_length: int | None,
    validation_fraction: float,
    seed: int,
    workers: int,
    overwrite: bool,
) -> dict[str, Any]:
    """Prepares a store and returns what `data prepare --json` prints."""
    from camelid.data import report
    from camelid.data.preparation.prepare import prepare
    from camelid.text.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    tell(loaded.notes)
    start, done_before = time.perf_counter(), []
    with progress_bar("prepare") as show_progress:

        def progress(done: int, total: int) -> None:
            if not done_before:
                done_before.append(done / max(1, total))
            show_progress(done, total)

        store = prepare(
            [source],
            loaded,
            out,
            validation_fraction=validation_fraction,
            seed=seed,
            sequence_length=sequence_length if source.compat == "mindformers" else None,
            workers=workers if workers > 1 else 0,
            progress=progress,
            overwrite=overwrite,
        )
    seconds = time.perf_counter() - start
    summary = report.of_store(store)
    # No progress was reported if the store existed. What an interrupted process had tokenized took no time of this one.
    speed = None
    if done_before:
        tokens = summary["tokens"] + (summary["held_out"] or {"tokens": 0})["tokens"]
        speed = tokens * (1 - done_before[0]) / seconds
    lost = _count_lost(source, loaded, sequence_length)
    return summary | {"seconds": seconds, "tokens_per_second": speed, "mindformers": lost}


@contextlib.contextmanager
def _in_options() -> Iterator[None]:
    """Errors name the options of the command line: `--text-key body` for `text_key = 'body'` of a recipe."""
    names = "|".join(field.name for field in dataclasses.fields(SourceOptions))
    setting = re.compile(rf"""\b({names}) = ("[^"]*"|'[^']*'|[^\s,;]+)""")

    def option(match: re.Match[str]) -> str:
        value = match[2]
        if value[0] in "'\"":
            value = shlex.quote(value[1:-1])
        return f"--{match[1].replace('_', '-')} {value}"

    try:
        yield
    except UserError as error:
        raise UserError(setting.sub(option, error.problem), setting.sub(option, error.advice)) from error


def inspect(
    data: Annotated[
        Positional[Path], arg(metavar="RECIPE_OR_STORE", help="a recipe's .toml, or the folder of a store")
    ],
    rows: int = 2,
    tokenizer: Annotated[str | None, arg(metavar="MODEL")] = None,
    histogram: Annotated[Path | None, arg(metavar="FILE.png")] = None,
    json: bool = False,
    overrides: Suppress[tuple[str, ...]] = (),
) -> None:
    """Show what training reads: counts, lengths, mixture shares and repeats, rows without loss, the first rows as text.

    camelid data inspect recipe.toml --rows 4
    camelid data inspect recipe.toml --data.sequence-length 1024 --data.packing best_fit
    camelid data inspect stores/chats --histogram lengths.png

    Sources of a recipe that are not prepared yet are prepared first, as in training. Any field of the recipe can be
    overridden by --table.field VALUE.

    Args:
        rows: number of rows of training, or of documents of a store, to show as text
        tokenizer: tokenizer of a store, if it was moved since the store was prepared
        histogram: also plot the lengths of the documents to this file
        json: print one JSON object
    """
    if rows < 0:
        raise UserError(f"--rows {rows}", "Choose 0 or more.")
    if histogram is not None and histogram.suffix != ".png":
        raise UserError(f"--histogram {histogram} is not a PNG file", "Give a name that ends in .png.")
    data = recipes.find(data)
    if not data.exists():
        raise UserError(f"{data} does not exist", "Give a recipe's .toml, or the folder of a store.")
    if not data.is_dir() and tokenizer is not None:
        raise UserError("--tokenizer applies to stores only", "Leave it out: the recipe sets its tokenizer.")
    if data.is_dir() and overrides:
        raise UserError(
            f"{overrides[0]} is not an option for a store", "Fields of a recipe are set with a RECIPE.toml."
        )

    from camelid.cli.data_plot import draw_lengths
    from camelid.cli.data_view import show

    summary = _of_store(data, rows, tokenizer) if data.is_dir() else _of_recipe(data, rows, overrides)
    if histogram is not None:
        draw_lengths(summary, histogram)
    return print_json(summary) if json else show(summary)


def _check(source: Source, sequence_length: int | None, fraction: float, seed: int, workers: int) -> None:
    """Raises UserError for values out of range and for options that do not go together."""
    if source.compat == "mindformers" and sequence_length is None:
        raise UserError(
            "--compat mindformers needs a --sequence-length", f"The default of MindFormers is {MINDFORMERS_LENGTH}."
        )
    if sequence_length is not None and not _counts_lost(source):
        raise UserError(
            "--sequence-length applies to --compat mindformers, and to --kind chat --template vicuna_v1.1",
            "Leave it out: documents are packed into rows in training, as the recipe sets.",
        )
    for name, number in (("--sequence-length", sequence_length), ("--workers", workers)):
        if number is not None and number < 1:
            raise UserError(f"{name} {number}", "Choose 1 or more.")
    if not 0 <= fraction < 1:
        raise UserError(f"--validation-fraction {fraction}", "Choose a fraction from 0 to below 1.")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}", "Choose a seed from 0 to 4294967295.")


def _counts_lost(source: Source) -> bool:
    """Whether to count the conversations that MindFormers' masking loses."""
    return source.compat == "mindformers" or (source.kind == "chat" and source.template == VICUNA)


def _count_lost(source: Source, tokenizer: "Tokenizer", sequence_length: int | None) -> dict[str, int] | None:
    """Counts the conversations that MindFormers' masking silently excludes from the loss; None if it does not apply."""
    from camelid.data.preparation.mindformers import count_lost, qa_text
    from camelid.data.readers.sources import Tally, chunks, read_chunk

    if source.kind != "chat" or not _counts_lost(source) or tokenizer.bos_id is None or not tokenizer.eos_ids:
        return None
    counts = {"sequence_length": sequence_length or MINDFORMERS_LENGTH, "conversations": 0, "lost": 0, "refused": 0}
    parts = chunks(source)
    with progress_bar("compare") as progress:
        for done, chunk in enumerate(parts):
            progress(done, len(parts))
            for record in read_chunk(source, chunk, Tally(1.0)):
                try:
                    qa_text(record.value)
                except UserError:
                    counts["refused"] += 1
                    continue
                counts["conversations"] += 1
                counts["lost"] += count_lost([record.value], tokenizer, counts["sequence_length"])
    return counts


def _of_store(folder: Path, rows: int, tokenizer: str | None) -> dict[str, Any]:
    from camelid.data import report
    from camelid.data.preparation.store import Store
    from camelid.data.samples import documents_as_text

    store = Store.open(folder)
    shown = []
    if rows:
        loaded = _tokenizer_of(store.manifest, folder, tokenizer)
        store.check_tokenizer(loaded.fingerprint, loaded.files[0])
        shown = documents_as_text(store, loaded, rows)
    return {"sources": [report.of_store(store)], "histogram": report.histogram([store]), "shown": shown}


def _tokenizer_of(manifest: dict[str, Any], folder: Path, given: str | None) -> "Tokenizer":
    from camelid.text.tokenizer import load_tokenizer

    if given is not None:
        return load_tokenizer(given)
    path = manifest.get("tokenizer_file")
    if path is None or not Path(path).is_file():
        problem = "does not record its tokenizer" if path is None else f"was prepared with {path}, which does not exist"
        raise UserError(f"{folder} {problem}", "Name it with --tokenizer, or show no text with --rows 0.")
    return load_tokenizer(path)


def _of_recipe(path: Path, rows: int, overrides: Sequence[str]) -> dict[str, Any]:
    from camelid.data import report
    from camelid.data.rows.loader import Loader
    from camelid.data.samples import rows_as_text
    from camelid.runs.notes import warmup_notes
    from camelid.runs.recipe import completed, read_recipe
    from camelid.runs.run_folder import kept_recipe
    from camelid.text.tokenizer import load_tokenizer

    recipe = read_recipe(path, overrides)
    recipe = completed(recipe, kept_recipe(Path(recipe.run)))
    location = recipe.tokenizer
    if location is None:
        from camelid.checkpoint.registry import open_checkpoint

        assert recipe.init is not None  # a Recipe has init, or model and tokenizer
        location = open_checkpoint(recipe.init, config=recipe.model, ignore=recipe.init_ignore).tokenizer_folder
    tokenizer = load_tokenizer(location)
    with progress_bar("prepare") as progress:
        loaders = {"train": Loader(recipe.data, tokenizer, "train", progress)}
        if recipe.data.validation or recipe.data.validation_fraction:
            loaders["validation"] = Loader(recipe.data, tokenizer, "validation", progress)
    tell((*loaders["train"].notes, *warmup_notes(recipe)))
    with progress_bar("inspect") as progress:
        summary = report.of_loader(loaders["train"], recipe.train.steps, progress)
    if "validation" in loaders:
        summary["validation"] = report.of_loader(loaders["validation"])["sources"]
    summary["histogram"] = report.histogram([packing.store for packing in loaders["train"].packings])
    summary["shown"] = rows_as_text(loaders["train"], tokenizer, rows)
    return summary | {"steps": recipe.train.steps, "batch_size": recipe.data.batch_size}
