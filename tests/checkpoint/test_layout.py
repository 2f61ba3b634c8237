"""Rows in every arrangement that foreign files have, against the same arrangement made by numpy alone."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from camelid.checkpoint import layout
from camelid.checkpoint.containers.safetensors import open_safetensors
from camelid.checkpoint.layout import TensorRule, make_table, plan_tensors, slice_reader, tensor_chunks
from camelid.checkpoint.tensors import dtype_named
from camelid.model.decoder import declare_decoder
from camelid.model.params import named
from tiny import tiny_config, tiny_params

CONFIG = tiny_config()  # 6 query heads, 2 key heads of 10 features, embed 48, mlp 80, 4 layers
SPECS = named(declare_decoder(CONFIG))
PARAMS = {path: np.array(leaf) for path, leaf in named(tiny_params(CONFIG)).items()}
Q, K, V, OUT = (PARAMS[f"layers.attn.{name}_proj"] for name in "qkvo")  # (layers, heads, head_dim, embed)
GATE, UP = PARAMS["layers.mlp.gate_proj"], PARAMS["layers.mlp.up_proj"]
OURS = "(kv_heads slot) head_dim embed"
WORDS = {"pair": 2, "group": 3, "kv_heads": 2, "rank": 2}


def neighbours(x: np.ndarray) -> np.ndarray:
    """Rotary pairs (i, i + half) laid side by side."""
    half = x.shape[1] // 2
    return np.stack([x[:, :half], x[:, half:]], 2).reshape(x.shape[0] * x.shape[1], -1)


def by_group(layer: int) -> np.ndarray:
    """For each key head: its query heads, the key, the value."""
    q, k, v = Q[layer].reshape(2, 3, 10, 48), K[layer], V[layer]
    return np.concatenate([part for h in range(2) for part in (*q[h], k[h], v[h])])


def by_rank(layer: int) -> np.ndarray:
    """For each of two ranks: its half of the gate, its half of the other."""
    return np.concatenate([part[r * 40 : r * 40 + 40] for r in range(2) for part in (GATE[layer], UP[layer])])


CASES: dict[str, tuple[list[TensorRule], Callable[[], dict[str, np.ndarray]]]] = {
    "rotary pairs are neighbours": (
        [TensorRule("layers.attn.q_proj", "{layer}.wq", "(heads freq pair) embed", "heads (pair freq) embed")],
        lambda: {f"{i}.wq": neighbours(Q[i]) for i in range(4)},
    ),
    "the same, inputs first": (
        [TensorRule("layers.attn.k_proj", "{layer}.wk", "embed (kv_heads freq pair)", "kv_heads (pair freq) embed")],
        lambda: {f"{i}.wk": neighbours(K[i]).T for i in range(4)},
    ),
    "inputs first, of a head": (
        [TensorRule("layers.attn.o_proj", "{layer}.wo", "(heads head_dim) embed")],
        lambda: {f"{i}.wo": OUT[i].reshape(48, 60).T for i in range(4)},
    ),
    "inputs first, of no layer": (
        [TensorRule("lm_head", "head", "embed vocab")],
        lambda: {"head": PARAMS["lm_head"].T},
    ),
    "all layers in one tensor, groups outside": (
        [
            TensorRule(
                "layers.attn.q_proj", "q", "layers embed group kv_heads head_dim", "(kv_heads group) head_dim embed"
            )
        ],
        lambda: {"q": np.stack([q.reshape(2, 3, 10, 48).transpose(3, 1, 0, 2) for q in Q])},
    ),
    "all norms in one tensor": (
        [TensorRule("layers.mlp_norm.scale", "norms", "layers embed")],
        lambda: {"norms": PARAMS["layers.mlp_norm.scale"]},
    ),
    "query, key and value heads by group": (
        [
            TensorRule(f"layers.attn.{name}_proj", "{layer}.qkv", "(kv_heads slot head_dim) embed", OURS, along="slot")
            for name in "qkv"
        ],
        lambda: {f"{i}.qkv": by_group(i).reshape(-1, 48) for i in range(4)},
    ),
    "gate and up by rank": (
        [
            TensorRule(
                "layers.mlp.gate_proj", "{layer}.fc1", "(rank side part) embed", "(rank side part) embed", "side"
            ),
            TensorRule("layers.mlp.up_proj", "{layer}.fc1", "(rank side part) embed", "(rank side part) embed", "side"),
        ],
        lambda: {f"{i}.fc1": by_rank(i) for i in range(4)},
    ),
    "end to end along the first axis": (
        [
            TensorRule(f"layers.attn.{name}_proj", "{layer}.qkv", f"({heads} head_dim) embed")
            for name, heads in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))
        ],
        lambda: {f"{i}.qkv": np.concatenate([x[i].reshape(-1, 48) for x in (Q, K, V)]) for i in range(4)},
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, tmp_path: Path):
    """The table, the file's tensors, and the same as numpy arrays."""
    rows, make = CASES[request.param]
    arrays = {name: np.ascontiguousarray(array) for name, array in make().items()}
    save_file(arrays, tmp_path / "file.safetensors")
    specs = {row.path: SPECS[row.path] for row in rows}
    # A row may say how many of the word it holds; sizes of others follow from our axes.
    words = WORDS | ({"side": 1} if "side" in rows[0].axes else {})
    return make_table(rows, specs, words), open_safetensors(tmp_path / "file.safetensors"), arrays


def test_every_row_is_read(case):
    rows, tensors, _ = case
    layout.check_tensors(rows, tensors, "")
    source = slice_reader(rows, tensors)
    for path, part in rows.entries.items():
        layers = range(4) if part.spec.stacked else [None]
        for layer in layers:
            ours = PARAMS[path] if layer is None else PARAMS[path][layer]
            whole = tuple(slice(0, n) for n in ours.shape)
            np.testing.assert_array_equal(source(path, layer, whole, np.dtype(np.float32)), ours)
            # Cut on every axis that a mesh may cut, an outermost word of which is whole heads.
            for axis in {0, ours.ndim - 1}:
                half = ours.shape[axis] // 2
                cut = (*whole[:axis], slice(half, 2 * half), *whole[axis + 1 :])
                np.testing.assert_array_equal(source(path, layer, cut, np.dtype(np.float32)), ours[cut])


@pytest.mark.parametrize("most", [1, 5000, layout.CHUNK_BYTES])
def test_every_row_is_written(case, monkeypatch: pytest.MonkeyPatch, most: int):
    """Byte for byte, in pieces of any size."""
    rows, _, arrays = case
    monkeypatch.setattr(layout, "CHUNK_BYTES", most)
    dtypes = dict.fromkeys(rows.entries, np.dtype(np.float32))
    planned = plan_tensors(rows, dtypes)
    assert {tensor.name: tensor.shape for tensor in planned} == {name: array.shape for name, array in arrays.items()}

    def source(path: str, layer: int | None, index: layout.Index, dtype: np.dtype) -> np.ndarray:
        return np.ascontiguousarray((PARAMS[path] if layer is None else PARAMS[path][layer])[index], dtype)

    for tensor in planned:
        written = list(tensor_chunks(rows, tensor.name, tensor.dtype, source))
        assert most > 1 or len(written) > 1
        assert b"".join(piece.tobytes() for piece in written) == arrays[tensor.name].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("band", [1, 3000, 2**20])
def test_pieces_of_bands_are_those_of_the_whole(case, monkeypatch: pytest.MonkeyPatch, band: int, dtype: str):
    """Read across the rows a few columns at a time, forward, backward, and by two threads in turn."""
    rows, tensors, _ = case
    monkeypatch.setattr("camelid.checkpoint.tensors.COLUMN_CACHE_BYTES", band)
    source, kind = slice_reader(rows, tensors), dtype_named(dtype)
    asked = []
    for path, part in rows.entries.items():
        for layer in range(4) if part.spec.stacked else [None]:
            ours = PARAMS[path] if layer is None else PARAMS[path][layer]
            step = max(1, ours.shape[-1] // 5)
            cuts = [slice(i, min(i + step, ours.shape[-1])) for i in range(0, ours.shape[-1], step)]
            asked += [(path, layer, (*(slice(0, n) for n in ours.shape[:-1]), cut), ours) for cut in cuts]

    def check(one: tuple) -> None:
        path, layer, index, ours = one
        np.testing.assert_array_equal(source(path, layer, index, kind), ours[index].astype(kind))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(check, asked + asked[::-1]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transposed_blocks_are_moved_whole(dtype: str):
    draw = np.random.default_rng(0).standard_normal((3, 130, 70)).astype(np.float32)
    values = draw.astype(dtype_named(dtype))
    for order in ((0, 2, 1), (2, 1, 0), (1, 0, 2)):
        out = np.empty_like(np.ascontiguousarray(values.transpose(order)))
        layout.move(values.transpose(order), out)
        assert out.tobytes() == np.ascontiguousarray(values.transpose(order)).tobytes()
