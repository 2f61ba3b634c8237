"""Options, progress bars and output that several commands share."""

import contextlib
import itertools
import json as json_module
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from camelid.cli.arguments import numbers_by_id
from camelid.errors import UserError
from camelid.inputs import expand_home, named_path
from camelid.parallel.compilation_cache import keep_compiled

Dtype = Annotated[Literal["float32", "bfloat16", "float16"], arg(help="dtype of weights and matrix products")]
Checkpoint = Annotated[
    Positional[str],
    arg(metavar="MODEL", help="folder of a checkpoint, or repository on the Hugging Face Hub"),
]
Config = Annotated[
    str | None,
    arg(
        help="configuration of MODEL, if its files do not contain it: a preset, a config.json, or a folder with one, "
        "whose tokenizer is used if MODEL has none"
    ),
]
Ignore = Annotated[
    tuple[str, ...],
    UseAppendAction,
    arg(metavar="NAME", help="ignore the field NAME of config.json; can be given several times"),
]
TokenizerPath = Annotated[
    str | None, arg(name="tokenizer", help="folder or file of a tokenizer (default: that of the checkpoint)")
]


def load(model: str, dtype: str, config: str | None, ignore: tuple[str, ...], tokenizer: str | None):
    """Loads the model and prints its notes."""
    keep_compiled()
    from camelid.api import load

    loaded = load(model, dtype=dtype, config=model_config(config, ignore), ignore=ignore, tokenizer=tokenizer)
    if (taken := tokenizer_of_config(config, loaded.tokenizer is not None)) is not None:
        loaded = loaded.with_tokenizer(taken)
    tell(loaded.notes)
    return loaded


def tokenizer_of_config(config: str | None, has_one: bool) -> str | None:
    """The folder given by --config, if it contains a tokenizer and the checkpoint does not."""
    from camelid.text.tokenizer import VOCABULARIES

    if config is None or has_one:
        return None
    path = Path(expand_home(config))
    folder = path if path.is_dir() else path.parent
    named = path.is_dir() or path.is_file()
    return str(folder) if named and any((folder / name).is_file() for name in VOCABULARIES) else None


def model_config(text: str | None, ignore: tuple[str, ...] = ()):
    """The configuration given by --config: a preset, or a config.json without the fields `ignore`, or its folder."""
    if text is None:
        return None
    from camelid.model.presets import ALIASES, PRESETS, preset

    path = Path(expand_home(text))
    if path.is_dir() and text not in (*PRESETS, *ALIASES):
        path /= "config.json"
    if path.is_file():
        from camelid.checkpoint.formats.hf_config import config_from_hf
        from camelid.checkpoint.formats.hf_ignored_fields import without
        from camelid.disk.json_files import read_json

        return config_from_hf(without(read_json(path), ignore))
    if path.suffix == ".json" or len(path.parts) > 1:
        raise UserError(f"{path} does not exist", "Set --config to a preset, a config.json, or a folder with one.")
    return preset(text)


def parsers() -> ConstructorRegistry:
    """The parsers of options and arguments of the types Path, which expands `~`, also in `--out=~/x`, and Mapping."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def path(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda words: named_path(words[0]),
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda value: [str(value)],
        )

    @registry.primitive_rule
    def numbers(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
        if info.type_origin is not Mapping:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="ID=NUMBER,...",
            instance_from_str=lambda words: numbers_by_id(words[0]),
            is_instance=lambda value: isinstance(value, Mapping),
            str_from_instance=lambda value: [",".join(f"{key}={number}" for key, number in value.items())],
        )

    return registry


@contextlib.contextmanager
def progress_bar(label: str) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error, if it is a terminal; `progress(done, total)` updates it.

    A third argument replaces the label of the bar.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total, stage=label: bar.update(task, description=stage, completed=done, total=total)


def print_json(value: object) -> None:
    """Prints one JSON object."""
    try:
        print(json_module.dumps(value, ensure_ascii=False))
    except UnicodeEncodeError:  # file names need not be UTF-8
        print(json_module.dumps(value))


def print_text(text: str) -> None:
    """Prints a text; characters that the encoding of standard output lacks are escaped."""
    print_pieces([text])


def print_pieces(pieces: Iterable[str], before: str = "") -> None:
    """Prints a text while it arrives in pieces, and the end of the line; see print_text."""
    for piece in itertools.chain([before], pieces, ["\n"]):
        try:
            print(piece, end="", flush=True)
        except UnicodeEncodeError as error:
            print(piece.encode(error.encoding, "backslashreplace").decode(error.encoding), end="", flush=True)


def note(text: str) -> None:
    """Prints a line to standard error."""
    print(text, file=sys.stderr)


def tell(notes: Iterable[str]) -> None:
    """Prints notes on what was assumed or left out, one per line."""
    for text in notes:
        note(f"note: {text}")
