"""Two checkpoints, of any formats, number by number."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np

from camelid.checkpoint.layout import PIECE
from camelid.checkpoint.opened import Checkpoint
from camelid.errors import UserError
from camelid.model.config import ModelConfig


@dataclass(frozen=True)
class Difference:
    """One parameter in both."""

    path: str
    dtypes: tuple[str, str]
    largest: float
    """of the differences, in float32; NaN where there is one"""
    equal: bool
    """whether they hold the same numbers"""
    rounded: bool
    """whether the first, in the dtype of the second, holds the same numbers"""


def compare(
    a: Checkpoint, b: Checkpoint, progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[Difference]:
    """Every parameter of two checkpoints, a slice at a time; raises UserError where they are not of one shape."""
    ours, theirs = a.table.parts, b.table.parts
    if odd := sorted(ours.keys() ^ theirs.keys()):
        raise UserError(f"only one of the two has {', '.join(odd[:3])}", "They are different models.")
    total, done = sum(part.spec.size for part in ours.values()), 0
    for path, part in ours.items():
        if part.spec.shape != theirs[path].spec.shape:
            raise UserError(
                f"{path} is {part.spec.shape} in one and {theirs[path].spec.shape} in the other",
                "They are different models.",
            )
        dtypes = a.dtypes[path], b.dtypes[path]
        largest, equal, rounded = 0.0, True, True
        shape = part.spec.shape[len(part.spec.stacked) :]
        step = max(
            1, PIECE // max(1, 4 * part.spec.size // (part.spec.shape[0] if part.spec.stacked else 1) // shape[0])
        )
        for layer in range(part.spec.shape[0]) if part.spec.stacked else [None]:
            for start in range(0, shape[0], step):
                index = (slice(start, min(start + step, shape[0])), *(slice(0, n) for n in shape[1:]))
                x, y = (checkpoint.source(path, layer, index, dtypes[1]) for checkpoint in (a, b))
                rounded = rounded and x.tobytes() == y.tobytes()
                x, y = (checkpoint.source(path, layer, index, np.dtype(np.float32)) for checkpoint in (a, b))
                equal = equal and x.tobytes() == y.tobytes()
                largest = float(np.maximum(largest, np.abs(x - y).max()))
                done += x.size
                progress(done, total)
        yield Difference(path, (dtypes[0].name, dtypes[1].name), largest, equal, rounded)


def config_differences(a: ModelConfig, b: ModelConfig) -> dict[str, tuple[object, object]]:
    """The fields in which two models differ."""
    pairs = {f.name: (getattr(a, f.name), getattr(b, f.name)) for f in fields(ModelConfig) if f.compare}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
