"""A checkpoint with several LoRA adapters added to it, each with a weight."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from camelid.checkpoint.adapters.lora import Adapter
from camelid.checkpoint.adapters.peft import matches, on_base, open_adapter
from camelid.checkpoint.adapters.peft_config import NAME as CONFIG
from camelid.checkpoint.checkpoint import Checkpoint
from camelid.checkpoint.hub import find_checkpoint_folder
from camelid.checkpoint.state.run_folder import ADAPTER
from camelid.errors import UserError
from camelid.inputs import expand_home


def with_adapters(base: Checkpoint, requests: Sequence[str]) -> Checkpoint:
    """The base, of any format, with the adapters of `requests`, each `ADAPTER` or `ADAPTER=WEIGHT`.

    An adapter is a folder in PEFT's form, its name on the Hub, or the folder of a run that trains one; its update is
    multiplied by the weight, 1 by default. Sums are computed in float32 and rounded once. Raises UserError if an
    adapter cannot be opened for this base, or if what it holds cannot be weighted or added.
    """
    opened = [_open(request, base) for request in requests]
    whole: dict[str, str] = {}
    for name, weight, _, adapter in opened:
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
    for _, _, folder, adapter in opened:
        config = replace(
            adapter.config,
            tie_embeddings=adapter.config.tie_embeddings and base.config.tie_embeddings,
            vocab_size=max(adapter.config.vocab_size, base.config.vocab_size),
        )
        base = on_base(replace(adapter, config=config), base, folder)
    return base


def _open(request: str, base: Checkpoint) -> tuple[str, float, Path, Adapter]:
    """The name, the weight, the folder, and the adapter with its weight applied."""
    name, equals, text = request.rpartition("=")
    if not equals or Path(expand_home(request)).exists():
        name, text = request, "1"
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"{request!r} has the weight {text!r}", "Write it as ADAPTER=0.5.")
    folder = _find_folder(name)
    adapter = open_adapter(folder, base.config)
    pairs = {key: replace(pair, alpha=weight * pair.alpha) for key, pair in adapter.pairs.items()}
    return name, weight, folder, replace(adapter, pairs=pairs)


def _find_folder(name: str) -> Path:
    """The folder of an adapter in PEFT's form; that of a run has one in it."""
    inside = Path(expand_home(name)) / ADAPTER
    folder = inside if matches(inside) else find_checkpoint_folder(name)
    if not matches(folder):
        raise UserError(
            f"{folder} has no {CONFIG}", "Give the folder of an adapter in PEFT's form, or of a run that trains one."
        )
    return folder
