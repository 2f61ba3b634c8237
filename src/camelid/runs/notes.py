"""Notes on recipes that are valid, but probably not what was intended."""

from collections.abc import Iterator, Sequence

from camelid.data.report import SilentRows
from camelid.runs.recipe import Recipe


def warmup_notes(recipe: Recipe) -> Iterator[str]:
    """A note if the learning rate only rises."""
    steps, warmup = recipe.train.steps, recipe.optimizer.warmup_steps
    if warmup >= steps:
        highest = recipe.optimizer.learning_rate * steps / warmup
        yield (
            f"optimizer.warmup_steps = {warmup} is not less than train.steps = {steps}: the learning rate rises to "
            f"{highest:.3g} at the last step and does not decay"
        )


def silent_row_notes(sources: Sequence[SilentRows]) -> Iterator[str]:
    """A note for each source of the training data that has rows without a loss."""
    for number, found in enumerate(sources, start=1):
        if found.number:
            which = "" if found.examined == found.rows else "first "
            yield (
                f"{found.number:,} of the {which}{found.examined:,} rows of source {number} have no loss: the weights "
                "of all their tokens are 0"
            )
