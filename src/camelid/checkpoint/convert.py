"""From one checkpoint to another, a slice at a time: memory is what is in flight, not the model."""

from collections.abc import Callable
from pathlib import Path

from camelid.checkpoint.hf import dtype_named, from_checkpoint, open_checkpoint, write_checkpoint


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes `source` as a Hugging Face folder; `dtype` None keeps each tensor's own."""
    checkpoint = open_checkpoint(source)
    dtypes = checkpoint.dtypes
    if dtype is not None:
        dtypes = dict.fromkeys(dtypes, dtype_named(dtype))
    write_checkpoint(
        Path(destination),
        checkpoint.config,
        dtypes,
        from_checkpoint(checkpoint),
        checkpoint.companions,
        overwrite=overwrite,
        progress=progress,
    )
