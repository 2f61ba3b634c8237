"""Notes on recipes that are valid, but probably not what was intended."""

from collections.abc import Iterator, Sequence

from camelid.data.config import DataConfig
from camelid.data.report import SilentRows
from camelid.runs.recipe import Recipe


def warmup_notes(recipe: Recipe) -> Iterator[str]:
    """A note if the learning rate only rises."""
    steps, warmup = recipe.train.steps, recipe.optimizer.warmup(recipe.train.steps)
    if warmup >= steps:
        name = "warmup_steps" if recipe.optimizer.warmup_ratio is None else "warmup_ratio"
        first, peak = (recipe.optimizer.options[key] for key in ("warmup_start", "learning_rate"))
        yield (
            f"optimizer.{name} = {getattr(recipe.optimizer, name)} is not less than train.steps = {steps}: the "
            f"learning rate rises to {first + (peak - first) * steps / warmup:.3g} at the last step and does not decay"
        )


def batch_notes(data: DataConfig, rows: float) -> Iterator[str]:
    """A note if a batch has more rows than the training data, which has `rows`."""
    if data.batch_size > rows:
        yield (
            f"the training data fills {rows:,.4g} rows of {data.sequence_length} tokens, and data.batch_size is "
            f"{data.batch_size}, so that each step reads it {data.batch_size / rows:.2g} times. Use a smaller "
            "data.batch_size or data.sequence_length, or more data"
        )


def silent_row_notes(sources: Sequence[SilentRows]) -> Iterator[str]:
    """A note for each source of the training data that has rows without a loss."""
    for number, found in enumerate(sources, start=1):
        if found.number:
            which = "" if found.examined == found.rows else "first "
            yield (
                f"{found.number:,} of the {which}{found.examined:,} rows of source {number} have no loss: the weights "
                "of all their tokens are 0. The usual cause is a document that is split within its prompt: set a "
                'larger data.sequence_length, or data.packing = "best_fit" with data.overlong = "drop"'
            )


def truncation_note(longer: int, total: int, what: str, length: int, longest: int) -> str:
    """A note on examples that are truncated; `longest` is the number of tokens of the longest one."""
    return (
        f"{longer:,} of {total:,} {what} are longer than a row of {length} tokens, and are truncated; "
        f"the longest has {longest:,}"
    )
