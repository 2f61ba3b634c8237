"""Plans which pairs of answers share a row: both answers of a preference are in one row, next to each other."""

import numpy as np
from jaxtyping import Int64

from camelid.data.rows.best_fit import Overlong, Plan, pack
from camelid.errors import UserError

# S tokens of a row. As in `best_fit`, an answer of n tokens fills n - 1 places.


def make_pair_plan(
    offsets: Int64[np.ndarray, " offsets"], sequence_length: int, *, one_per_row: bool, overlong: Overlong
) -> Plan:
    """The plan for documents of which 2 n and 2 n + 1 are a pair; fragments 2 n and 2 n + 1 of a row are, too.

    A pair fills the places of both answers. One that is longer than a row is dropped, or truncated: then each answer
    keeps its first tokens, half a row of them, or more if the other one needs less than half. A pair cannot be split,
    so `overlong = "split"` raises UserError if there is such a pair.
    """
    starts, places = offsets[:-1].reshape(-1, 2), (np.diff(offsets) - 1).reshape(-1, 2)
    is_over = places.sum(1) > sequence_length
    over = int(np.count_nonzero(is_over))
    if over and (overlong == "split" or sequence_length < 2):
        raise UserError(
            f"{over:,} of {len(places):,} pairs are longer than a row of {sequence_length} tokens, "
            f"which holds both answers with their prompts; the longest has {places.sum(1).max():,}",
            "Increase data.sequence_length, or set data.overlong to 'truncate' or 'drop'.",
        )
    lengths = np.minimum(places, np.maximum(sequence_length // 2, sequence_length - places[:, ::-1]))
    kept = ~is_over if overlong == "drop" else np.ones(len(places), bool)
    truncated = int(np.count_nonzero((lengths < places)[kept]))
    pairs, starts, lengths = np.arange(np.count_nonzero(kept)), starts[kept], lengths[kept]
    row_offsets = np.arange(len(pairs) + 1)
    if not one_per_row:
        sizes = lengths.sum(1).astype(np.min_scalar_type(sequence_length))
        row_offsets, pairs, _ = pack(pairs, sizes, sequence_length)
    dropped = 2 * int(np.count_nonzero(~kept))
    lost = int(places.sum() - lengths.sum())
    lengths = lengths[pairs].astype(np.min_scalar_type(sequence_length))
    return Plan(2 * row_offsets, starts[pairs].ravel(), lengths.ravel(), 0, truncated, dropped, lost)
