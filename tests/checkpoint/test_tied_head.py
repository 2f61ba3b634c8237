"""A head that repeats the embedding table is recognized by all of its values, transposed or not."""

from pathlib import Path

import numpy as np
import pytest

from camelid.checkpoint.tensors import Tensor, same_values
from camelid.checkpoint.tied_head import without_tied_head
from camelid.errors import UserError

TABLE = np.arange(7 * 3, dtype=np.float32).reshape(7, 3)


def tensor(path: Path, values: np.ndarray) -> Tensor:
    path.write_bytes(np.ascontiguousarray(values).tobytes())
    return Tensor(path, path.name, 0, values.shape, values.dtype)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("camelid.checkpoint.tensors.COMPARED_BYTES", 2 * 3 * 4)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_difference_anywhere_is_found(tmp_path: Path, transposed: bool):
    table = tensor(tmp_path / "table", TABLE)
    for place in np.ndindex(TABLE.shape):
        other = TABLE.copy()
        assert same_values(table, tensor(tmp_path / "head", other.T if transposed else other), transposed=transposed)
        other[place] += 1
        head = tensor(tmp_path / "head", other.T if transposed else other)
        assert not same_values(table, head, transposed=transposed)


def test_tensors_of_other_shapes_and_dtypes_differ(tmp_path: Path):
    table = tensor(tmp_path / "table", TABLE)
    assert not same_values(table, table, transposed=True)
    assert not same_values(table, tensor(tmp_path / "flat", TABLE.reshape(3, 7)))
    assert not same_values(table, tensor(tmp_path / "ints", TABLE.view(np.int32)))


@pytest.mark.parametrize("transposed", [False, True])
def test_a_tied_head_is_left_out_and_another_is_refused(tmp_path: Path, transposed: bool):
    table, norm = tensor(tmp_path / "table", TABLE), tensor(tmp_path / "norm", TABLE[0])
    head = tensor(tmp_path / "head", TABLE.T if transposed else TABLE)
    tensors = {"norm": norm, "head": head, "table": table}
    assert without_tied_head(tensors, "table", "head", "config.json", transposed=transposed) == {
        "table": table,
        "norm": norm,
    }
    tensors["head"] = tensor(tmp_path / "head", TABLE.T + 1 if transposed else TABLE + 1)
    with pytest.raises(UserError, match=r"config\.json ties the head .* head differs"):
        without_tied_head(tensors, "table", "head", "config.json", transposed=transposed)


def test_a_head_alone_is_the_table(tmp_path: Path):
    head = tensor(tmp_path / "head", TABLE)
    assert without_tied_head({"head": head}, "table", "head", "config.json") == {"table": head}
