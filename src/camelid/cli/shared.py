"""What several commands share: words of their options, progress, notes, files."""

import contextlib
import json as json_module
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, UseAppendAction, arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from camelid.errors import UserError
from camelid.inputs import expand_home, named_path
from camelid.parallel.compilation_cache import keep_compiled

Dtype = Annotated[Literal["float32", "bfloat16", "float16"], arg(help="of parameters and products")]
Checkpoint = Annotated[
    Positional[str], arg(metavar="MODEL", help="a checkpoint's folder, or its name on the Hugging Face Hub")
]
Config = Annotated[
    str | None,
    arg(
        help="what MODEL is, where its files do not say: a preset, a config.json, or a folder that has one, whose "
        "tokenizer is taken where MODEL has none"
    ),
]
Ignore = Annotated[
    tuple[str, ...],
    UseAppendAction,
    arg(metavar="NAME", help="open config.json as if it had no field NAME; may be given several times"),
]
TokenizerPath = Annotated[
    str | None, arg(name="tokenizer", help="a folder or file with one; the checkpoint's own if left out")
]


def load(model: str, dtype: str, config: str | None, ignore: tuple[str, ...], tokenizer: str | None):
    """The model, with its notes told."""
    keep_compiled()
    from camelid.api import load

    loaded = load(model, dtype=dtype, config=model_config(config, ignore), ignore=ignore, tokenizer=tokenizer)
    if (taken := tokenizer_of_config(config, loaded.tokenizer is not None)) is not None:
        loaded = loaded.with_tokenizer(taken)
    tell(loaded.notes)
    return loaded


def tokenizer_of_config(config: str | None, has_one: bool) -> str | None:
    """The folder that --config names, if it holds a tokenizer and the checkpoint does not."""
    from camelid.text.tokenizer import VOCABULARIES

    if config is None or has_one:
        return None
    path = Path(expand_home(config))
    folder = path if path.is_dir() else path.parent
    named = path.is_dir() or path.is_file()
    return str(folder) if named and any((folder / name).is_file() for name in VOCABULARIES) else None


def model_config(text: str | None, ignore: tuple[str, ...] = ()):
    """A preset by name, or what a config.json without some fields describes, in a folder or by its own name."""
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
        raise UserError(f"{path} does not exist", "Give --config a preset, a config.json, or a folder that has one.")
    return preset(text)


def path_options() -> ConstructorRegistry:
    """How every option and argument of type Path is read: `~` is the home folder, also in `--out=~/x`."""
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

    return registry


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[..., None]]:
    """A bar on standard error where that is a terminal; `progress(done, total)` moves it.

    A third argument replaces the word in front of the bar.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total, stage=what: bar.update(task, description=stage, completed=done, total=total)


def print_json(value: object) -> None:
    """One JSON object on standard output."""
    try:
        print(json_module.dumps(value, ensure_ascii=False))
    except UnicodeEncodeError:  # names of files may be no UTF-8
        print(json_module.dumps(value))


def print_text(text: str) -> None:
    """A text on standard output; characters that its encoding lacks are escaped."""
    try:
        print(text)
    except UnicodeEncodeError as error:
        print(text.encode(error.encoding, "backslashreplace").decode(error.encoding))


def note(text: str) -> None:
    """A line for people, on standard error."""
    print(text, file=sys.stderr)


def tell(notes: Iterable[str]) -> None:
    """What was guessed or left out, a line each."""
    for text in notes:
        note(f"note: {text}")
