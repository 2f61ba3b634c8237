"""The head of a model with tied embeddings, which some formats store although it repeats the embedding table."""

from collections.abc import Mapping

from camelid.checkpoint.tensors import Tensor, same_values
from camelid.errors import UserError


def without_tied_head(
    tensors: Mapping[str, Tensor], table: str, head: str, described_by: str, *, transposed: bool = False
) -> dict[str, Tensor]:
    """Returns the tensors of a model with tied embeddings, without its head; the embedding table comes first.

    `table` and `head` are the names of the two tensors, of which a file may hold either or both; a head alone is
    returned as the table. With `transposed`, the head is stored as the transpose of the table, and must not be alone.
    Raises UserError if both are present and differ; `described_by` names what specifies that the model is tied.
    """
    others = {name: tensor for name, tensor in tensors.items() if name not in (table, head)}
    if head in tensors and table in tensors and not same_values(tensors[table], tensors[head], transposed=transposed):
        raise UserError(
            f"{described_by} ties the head to the embedding table, and {head} differs from it",
            "If the head is to be used, set tie_word_embeddings to false there, or leave it out: "
            "--ignore-config-field tie_word_embeddings.",
        )
    stored = tensors.get(table, None if transposed else tensors.get(head))
    return others if stored is None else {table: stored, **others}
