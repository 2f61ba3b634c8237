import random

import numpy as np
import pytest

from camelid.data.batch import Batch
from camelid.data.packing import Packing

FIELDS = ("tokens", "targets", "weights", "positions", "segments")


def pack(documents: list[list[int]], sequence_length: int, dtype: type = np.uint16) -> Packing:
    tokens = np.array([token for document in documents for token in document], dtype)
    return Packing(tokens, np.cumsum([0, *map(len, documents)]), sequence_length)


def obvious_rows(documents: list[list[int]], sequence_length: int) -> list[list[tuple[int, int, int, int, int]]]:
    """Rows of (token, target, weight, position, segment), one token after another."""
    cells = []
    for number, document in enumerate(documents):
        for token, target in zip(document, [*document[1:], None], strict=True):
            cells.append((number, token, target))
    rows = []
    for first in range(0, len(cells) - 1, sequence_length):
        row, segment, position, before = [], 0, 0, None
        for number, token, target in cells[first : first + sequence_length]:
            segment, position = (segment, position + 1) if number == before else (segment + 1, 0)
            row.append((token, target or 0, int(target is not None), position, segment))
            before = number
        rows.append(row + [(0, 0, 0, 0, 0)] * (sequence_length - len(row)))
    return rows


def test_rows_equal_an_obvious_reference():
    chance = random.Random(0)
    for _ in range(400):
        lengths = [chance.choice([1, 2, 3, 9, 30]) for _ in range(chance.randint(1, 12))]
        documents = [[chance.randrange(1, 1000) for _ in range(length)] for length in lengths]
        sequence_length = chance.randint(1, 13)
        packing = pack(documents, sequence_length)
        expected = obvious_rows(documents, sequence_length)
        assert packing.num_rows == len(expected)
        if expected:
            batch = packing.rows(np.arange(len(expected)))
            for column, field in enumerate(FIELDS):
                cells = [[cell[column] for cell in row] for row in expected]
                np.testing.assert_array_equal(getattr(batch, field), cells, err_msg=field)


def test_a_row_as_drawn_in_batch():
    batch = pack([[7, 1, 2, 8], [7, 3, 4]], 8).rows(np.array([0]))
    assert batch.tokens.tolist() == [[7, 1, 2, 8, 7, 3, 4, 0]]
    assert batch.targets.tolist() == [[1, 2, 8, 0, 3, 4, 0, 0]]
    assert batch.weights.tolist() == [[1, 1, 1, 0, 1, 1, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0]]
    assert batch.segments.tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]


def test_a_document_goes_on_in_the_next_row():
    batch = pack([[1, 2, 3, 4, 5], [6, 7, 8]], 3).rows(np.array([0, 1]))
    assert batch.targets.tolist() == [[2, 3, 4], [5, 0, 7]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert batch.segments.tolist() == [[1, 1, 1], [1, 1, 2]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_the_types_are_those_of_the_device(dtype: type):
    batch = pack([[1, 2, 3]], 2, dtype).rows(np.array([0]))
    assert [getattr(batch, field).dtype for field in FIELDS] == [np.int32, np.int32, np.float32, np.int32, np.int32]


def test_a_row_past_the_last_is_all_padding():
    batch: Batch = pack([[1, 2, 3, 4]], 3).rows(np.array([1, 2]))
    for field in FIELDS:
        assert not getattr(batch, field).any(), field
