"""Notes on recipes that are valid, but probably not what was intended."""

from collections.abc import Iterator, Sequence
from decimal import Decimal

from camelid.data.config import DataConfig
from camelid.data.report import SilentRows
from camelid.runs.recipe import Recipe


def counted(number: float, name: str) -> str:
    """How many things there are, such as 1 row or 1,000 rows; a fraction is rounded to four significant digits."""
    shown = _rounded(number, 4) if isinstance(number, float) else f"{number:,}"
    return f"{shown} {name}" if number == 1 else f"{shown} {name}s"


def times(number: float) -> str:
    """How often something is done, in two significant digits: once, or 2,500 times."""
    shown = _rounded(number, 2)
    return "once" if shown == "1" else f"{shown} times"


def _rounded(number: float, digits: int) -> str:
    """A number in some significant digits, without an exponent."""
    return f"{Decimal(f'{number:.{digits}g}').normalize():,f}"


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
            f"the training data fills {counted(rows, 'row')} of {data.sequence_length} tokens, and data.batch_size is "
            f"{data.batch_size}, so that each step reads it {times(data.batch_size / rows)}. Use a smaller "
            "data.batch_size or data.sequence_length, or more data"
        )


def silent_row_notes(sources: Sequence[SilentRows]) -> Iterator[str]:
    """A note for each source of the training data that has rows without a loss."""
    for number, found in enumerate(sources, start=1):
        if found.number:
            which = "" if found.examined == found.rows else "first "
            have, their = ("has", "its") if found.number == 1 else ("have", "their")
            yield (
                f"{found.number:,} of the {which}{counted(found.examined, 'row')} of source {number} {have} no loss: "
                f"the weights of all {their} tokens are 0. The usual cause is a document that is split within its "
                'prompt: set a larger data.sequence_length, or data.packing = "best_fit" with data.overlong = "drop"'
            )


def truncation_note(longer: int, total: int, what: str, length: int, longest: int) -> str:
    """A note on examples (`what`: one of them) that are truncated; `longest` is the length of the longest in tokens."""
    are = "is" if longer == 1 else "are"
    return (
        f"{longer:,} of {counted(total, what)} {are} longer than a row of {counted(length, 'token')}, and {are} "
        f"truncated; the longest has {longest:,}"
    )
