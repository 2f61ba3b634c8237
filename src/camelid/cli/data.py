"""Commands for data: sources to a prepared store, and a look at what a store or a recipe gives."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from camelid.cli.shared import print_json, progress_bar, tell
from camelid.data.config import Kind, Source
from camelid.errors import UserError

if TYPE_CHECKING:
    from camelid.text.tokenizer import Tokenizer

MINDFORMERS_LENGTH = 2048  # its own --seq_length
VICUNA = "vicuna_v1.1"
"""the template of MindFormers' conversations"""

Files = Annotated[
    Positional[tuple[str, ...]],
    arg(metavar="SOURCE...", help="files or globs of .txt, .jsonl, .parquet and so on; docs/data.md lists them"),
]
Loaded = Annotated[str, arg(metavar="MODEL", help="a checkpoint's folder, or a tokenizer.json or tokenizer.model")]


def prepare(
    sources: Files,
    tokenizer: Loaded,
    out: Annotated[Path, arg(metavar="DIR")],
    kind: Kind = "text",
    text_key: str = "text",
    split: Annotated[str, arg(metavar="file|line|blank_line|marker:STRING")] = "file",
    clean: Literal["none", "wikitext"] = "none",
    add_bos: bool | None = None,
    add_eos: Annotated[bool, arg(help_behavior_hint="")] = True,
    fields: str | None = None,
    fields_from_example: str | None = None,
    prepend_text: str = "",
    template: str | None = None,
    loss: Literal["assistant", "all"] = "assistant",
    compat: Literal["none", "mindformers"] = "none",
    max_unreadable: float = 0.0,
    sequence_length: int | None = None,
    validation_fraction: float = 0.0,
    seed: int = 0,
    workers: int = 1,
    overwrite: bool = False,
    json: bool = False,
) -> None:
    """Tokenize sources into a store, which training maps into memory; the same command goes on where it was killed.

    camelid data prepare 'wiki/*.txt' --tokenizer ./TinyLlama --out stores/wiki --split blank_line --workers 8
    camelid data prepare chats.jsonl --kind chat --template vicuna_v1.1 --tokenizer ./TinyLlama --out stores/chats
    camelid data prepare rows.jsonl --kind fields --fields '[prompt],answer' --tokenizer ./TinyLlama --out stores/rows

    Args:
        out: the store's folder
        kind: what a row of the sources is
        text_key: text: the key of the text in a row
        split: text: the documents of a .txt file
        clean: text: wikitext takes WikiText's tokenization back
        add_bos: whether a document begins with BOS; left out, as the tokenizer does
        add_eos: documents end without EOS
        fields: fields: what is laid end to end, as in EasyLM
        fields_from_example: fields: instead, the key of a row that holds its fields
        prepend_text: fields: stands before the first field
        template: chats: the name of a template; left out, the tokenizer's own
        loss: chats: whose words are learnt
        compat: mindformers: records as its llama_preprocess.py makes them, faults included
        max_unreadable: the share of rows that may be unreadable; they are counted, and left out
        sequence_length: of MindFormers' records, which have one token more
        validation_fraction: the share of the documents that is held out, for recipes with the same fraction
        seed: decides which ones
        workers: processes that tokenize; 1 is this one, whose tokenizer may use all cores
        overwrite: replace a store of other sources or options
        json: print one JSON object
    """
    source = Source(
        files=sources,
        kind=kind,
        text_key=text_key,
        split=split,
        clean=clean,
        add_bos=add_bos,
        add_eos=add_eos,
        fields=fields,
        fields_from_example=fields_from_example,
        prepend_text=prepend_text,
        template=template,
        loss=loss,
        compat=compat,
        max_unreadable=max_unreadable,
    )
    _check(source, sequence_length, validation_fraction, seed, workers)

    from camelid.cli.data_view import show_prepared
    from camelid.data import report
    from camelid.data.preparation.prepare import prepare
    from camelid.text.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    tell(loaded.notes)
    began, done_before = time.perf_counter(), []
    with progress_bar("prepare") as progress:

        def told(done: int, total: int) -> None:
            if not done_before:
                done_before.append(done / max(1, total))
            progress(done, total)

        store = prepare(
            [source],
            loaded,
            out,
            validation_fraction=validation_fraction,
            seed=seed,
            sequence_length=sequence_length if source.compat == "mindformers" else None,
            workers=workers if workers > 1 else 0,
            progress=told,
            overwrite=overwrite,
        )
    seconds = time.perf_counter() - began
    whole = report.of_store(store)
    # Where nothing was done, the store was there; what a killed process had done took no time of this one.
    made = None if not done_before else (whole["tokens"] + (whole["held_out"] or {"tokens": 0})["tokens"])
    whole |= {
        "seconds": seconds,
        "tokens_per_second": None if made is None else made * (1 - done_before[0]) / seconds,
        "mindformers": _lost(source, loaded, sequence_length),
    }
    return print_json(whole) if json else show_prepared(whole)


def inspect(
    data: Annotated[Positional[Path], arg(metavar="RECIPE_OR_STORE", help="a recipe's .toml, or a store's folder")],
    rows: int = 2,
    tokenizer: Annotated[str | None, arg(metavar="MODEL")] = None,
    histogram: Annotated[Path | None, arg(metavar="FILE.png")] = None,
    json: bool = False,
) -> None:
    """What training would read: counts, lengths, shares and repeats, rows without loss, and the first rows as text.

    camelid data inspect recipes/finetune.toml --rows 4
    camelid data inspect stores/chats --histogram lengths.png

    Sources of a recipe that are not prepared yet are, as training would do it.

    Args:
        rows: so many of the first rows of the training, or documents of the store, are shown as text
        tokenizer: for a store whose tokenizer is not where it was
        histogram: draw the documents' lengths into this file too
        json: print one JSON object
    """
    if rows < 0:
        raise UserError(f"--rows {rows}", "Choose 0 or more.")
    if histogram is not None and histogram.suffix != ".png":
        raise UserError(f"--histogram {histogram} is no PNG", "Give a name that ends in .png.")
    if not data.exists():
        raise UserError(f"{data} does not exist", "Give a recipe's .toml, or the folder of a store.")
    if not data.is_dir() and tokenizer is not None:
        raise UserError("--tokenizer is for stores", "The recipe names its own.")

    from camelid.cli.data_view import draw_lengths, show

    whole = _of_store(data, rows, tokenizer) if data.is_dir() else _of_recipe(data, rows)
    if histogram is not None:
        draw_lengths(whole, histogram)
    return print_json(whole) if json else show(whole)


def _check(source: Source, sequence_length: int | None, fraction: float, seed: int, workers: int) -> None:
    """Refuses options that mean nothing, or nothing together."""
    if source.compat == "mindformers" and sequence_length is None:
        raise UserError("--compat mindformers needs a --sequence-length", "Its own default is 2048.")
    if sequence_length is not None and not _counts_lost(source):
        raise UserError(
            "--sequence-length is for --compat mindformers, and for --kind chat --template vicuna_v1.1",
            "Leave it out: a store has no rows yet, a recipe cuts them.",
        )
    for name, number in (("--sequence-length", sequence_length), ("--workers", workers)):
        if number is not None and number < 1:
            raise UserError(f"{name} {number}", "Choose 1 or more.")
    if not 0 <= fraction < 1:
        raise UserError(f"--validation-fraction {fraction}", "Choose a share from 0 to below 1.")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed {seed}", "Choose a seed from 0 to 4294967295.")


def _counts_lost(source: Source) -> bool:
    """Whether it has a meaning to ask what MindFormers' masking would lose."""
    return source.compat == "mindformers" or (source.kind == "chat" and source.template == VICUNA)


def _lost(source: Source, tokenizer: "Tokenizer", sequence_length: int | None) -> dict[str, int] | None:
    """How many conversations MindFormers' masking gives up without a word; None where it makes none of such rows."""
    from camelid.data.preparation.mindformers import count_lost, qa_text
    from camelid.data.readers.sources import Tally, chunks, read_chunk

    if source.kind != "chat" or not _counts_lost(source) or tokenizer.bos_id is None or not tokenizer.eos_ids:
        return None
    counts = {"sequence_length": sequence_length or MINDFORMERS_LENGTH, "conversations": 0, "lost": 0, "refused": 0}
    pieces = chunks(source)
    with progress_bar("compare") as progress:
        for done, chunk in enumerate(pieces):
            progress(done, len(pieces))
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

    store = Store.open(folder)
    shown = []
    if rows:
        loaded = _tokenizer_of(store.manifest, folder, tokenizer)
        store.check_tokenizer(loaded.fingerprint, loaded.files[0])
        shown = report.documents(store, loaded, rows)
    return {"sources": [report.of_store(store)], "histogram": report.histogram([store]), "shown": shown}


def _tokenizer_of(manifest: dict[str, Any], folder: Path, given: str | None) -> "Tokenizer":
    from camelid.text.tokenizer import load_tokenizer

    if given is not None:
        return load_tokenizer(given)
    path = manifest.get("tokenizer_file")
    if path is None or not Path(path).is_file():
        where = "does not say where its tokenizer is" if path is None else f"was prepared with {path}, which is gone"
        raise UserError(f"{folder} {where}", "Name it with --tokenizer, or show no text with --rows 0.")
    return load_tokenizer(path)


def _of_recipe(path: Path, rows: int) -> dict[str, Any]:
    from camelid.data import report
    from camelid.data.rows.loader import Loader
    from camelid.runs.recipe import completed, read_recipe
    from camelid.runs.run_folder import kept_recipe
    from camelid.text.tokenizer import load_tokenizer

    recipe = read_recipe(path)
    recipe = completed(recipe, kept_recipe(Path(recipe.run)))
    where = recipe.tokenizer
    if where is None:
        from camelid.checkpoint.registry import open_checkpoint

        assert recipe.init is not None  # a Recipe has init, or model and tokenizer
        where = open_checkpoint(recipe.init, config=recipe.model, ignore=recipe.init_ignore).tokenizer_folder
    tokenizer = load_tokenizer(where)
    with progress_bar("prepare") as progress:
        loaders = {"train": Loader(recipe.data, tokenizer, "train", progress)}
        if recipe.data.validation or recipe.data.validation_fraction:
            loaders["validation"] = Loader(recipe.data, tokenizer, "validation", progress)
    tell(loaders["train"].notes)
    with progress_bar("look") as progress:
        whole = report.of_loader(loaders["train"], recipe.train.steps, progress)
    if "validation" in loaders:
        whole["validation"] = report.of_loader(loaders["validation"])["sources"]
    whole["histogram"] = report.histogram([packing.store for packing in loaders["train"].packings])
    whole["shown"] = report.rows(loaders["train"], tokenizer, rows)
    return whole | {"steps": recipe.train.steps, "batch_size": recipe.data.batch_size}
