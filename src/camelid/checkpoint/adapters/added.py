"""A checkpoint with several LoRA adapters added to it, each with a weight."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from camelid.checkpoint.adapters import mindformers
from camelid.checkpoint.adapters.lora import Adapter
from camelid.checkpoint.adapters.peft import matches, on_base, open_adapter
from camelid.checkpoint.adapters.peft_config import NAME as CONFIG
from camelid.checkpoint.checkpoint import Checkpoint
from camelid.checkpoint.formats.mindspore import FORMAT_OF, RULES, RopeLayout
from camelid.checkpoint.hub import find_checkpoint_folder
from camelid.checkpoint.state.run_folder import ADAPTER
from camelid.errors import UserError
from camelid.inputs import expand_home


@dataclass(frozen=True)
class Opened:
    """An adapter that was asked for."""

    name: str
    weight: float
    folder: Path
    adapter: Adapter
    """with its weight applied"""
    files: list[Path] | None
    """those that hold it; None: PEFT's in `folder`"""


def with_adapters(base: Checkpoint, requests: Sequence[str], lora_alpha: float | None = None) -> Checkpoint:
    """The base, of any format, with the adapters of `requests`, each `ADAPTER` or `ADAPTER=WEIGHT`.

    An adapter is a folder in PEFT's form, its name on the Hub, the folder of a run that trains one, or a file of
    MindFormers' LoRA factors, whose alpha is `lora_alpha` (see `adapters.mindformers`). Its update is multiplied by the
    weight, 1 by default. Sums are computed in float32 and rounded once. Raises UserError if an adapter cannot be opened
    for this base, or if what it holds cannot be weighted or added.
    """
    opened = [_open(request, base, lora_alpha) for request in requests]
    whole: dict[str, str] = {}
    for name, weight, adapter in ((each.name, each.weight, each.adapter) for each in opened):
        if adapter.dora and (weight != 1 or len(opened) > 1):
            raise UserError(
                f"{name} is a DoRA adapter, which rescales the rows of the base: it has no weight, and is added alone",
                "Give it as the only adapter, without a weight.",
            )
        for path in dict.fromkeys(path for path, _ in adapter.saved):
            if weight != 1 or path in whole:
                raise UserError(
                    f"{name} replaces {path} of the base entirely"
                    + (f", and so does {whole[path]}" if path in whole else f", which has no weight {weight:g}"),
                    "Such an adapter can only be added once, without a weight.",
                )
            whole[path] = name
    for each in opened:
        config = replace(
            each.adapter.config,
            tie_embeddings=each.adapter.config.tie_embeddings and base.config.tie_embeddings,
            vocab_size=max(each.adapter.config.vocab_size, base.config.vocab_size),
        )
        base = on_base(replace(each.adapter, config=config), base, each.folder, files=each.files)
    return base


def _open(request: str, base: Checkpoint, lora_alpha: float | None) -> Opened:
    """The adapter of a request, with its weight applied."""
    name, equals, text = request.rpartition("=")
    if not equals or Path(expand_home(request)).exists():
        name, text = request, "1"
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"{request!r} has the weight {text!r}", "Write it as ADAPTER=0.5.")
    layout, path = _rope_layout(name)
    if layout is not None or (mindformers.matches(path) and not matches(path)):
        adapter, files = mindformers.open_adapter(path, base, layout, lora_alpha)
        folder = path if path.is_dir() else path.parent
    else:
        folder = _find_folder(name)
        if lora_alpha is not None:
            raise UserError(
                f"lora_alpha = {lora_alpha:g} is given, and {folder / CONFIG} has a lora_alpha of its own",
                "Leave it out; ADAPTER=0.5 multiplies the update of an adapter.",
            )
        adapter, files = open_adapter(folder, base.config), None
    pairs = {key: replace(pair, alpha=weight * pair.alpha) for key, pair in adapter.pairs.items()}
    return Opened(name, weight, folder, replace(adapter, pairs=pairs), files)


def _rope_layout(name: str) -> tuple[RopeLayout | None, Path]:
    """The rotary layout that the prefix of a path specifies, and the path."""
    for layout in RULES:
        if name.startswith(prefix := f"{FORMAT_OF[layout]}::"):
            return layout, Path(expand_home(name.removeprefix(prefix)))
    return None, Path(expand_home(name.removeprefix("mindspore::")))


def _find_folder(name: str) -> Path:
    """The folder of an adapter in PEFT's form; that of a run has one in it."""
    inside = Path(expand_home(name)) / ADAPTER
    folder = inside if matches(inside) else find_checkpoint_folder(name)
    if not matches(folder):
        raise UserError(
            f"{folder} has no {CONFIG}", "Give the folder of an adapter in PEFT's form, or of a run that trains one."
        )
    return folder
