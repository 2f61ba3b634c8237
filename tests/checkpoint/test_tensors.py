"""Numbers on their way from one dtype to another: what the new one cannot hold is an error, not an infinity."""

import re
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
import torch
from safetensors.numpy import load_file, save_file

import camelid
from camelid.checkpoint.containers import mindspore_file
from camelid.checkpoint.containers.mindspore_file import ckpt_file, open_ckpt
from camelid.checkpoint.containers.safetensors import open_safetensors
from camelid.checkpoint.containers.torch_files import open_torch
from camelid.checkpoint.containers.torch_tensors import StridedTensor
from camelid.checkpoint.convert import convert
from camelid.checkpoint.files import write_files
from camelid.checkpoint.registry import open_checkpoint
from camelid.checkpoint.state.saved_state import SavedArray
from camelid.checkpoint.tensors import ColumnCache, PlannedTensor, Tensor, dtype_named, file_names
from camelid.errors import UserError
from runs import assert_refused, called
from tiny import save_hf, tiny_config, tiny_params, transformers_twin
from writing import in_pieces

WHOLE = (slice(0, 6), slice(0, 8))
UP = "model.layers.2.mlp.up_proj.weight"


def plain(values: np.ndarray, folder: Path) -> Tensor:
    save_file({"w": values}, folder / "a.safetensors")
    return open_safetensors(folder / "a.safetensors")["w"]


def strided(values: np.ndarray, folder: Path) -> Tensor:
    bits = torch.from_numpy(np.ascontiguousarray(values.T).view(f"i{values.itemsize}"))
    torch.save({"w": bits.view(getattr(torch, values.dtype.name)).T}, folder / "a.bin")
    tensor = open_torch(folder / "a.bin")["w"]
    assert isinstance(tensor, StridedTensor)
    return tensor


def flat(values: np.ndarray, folder: Path) -> Tensor:
    write_files(
        folder,
        [ckpt_file("a.ckpt", [in_pieces(PlannedTensor("w", values.shape, values.dtype), values.reshape(-1), 3)])],
    )
    tensor = open_ckpt(folder / "a.ckpt")["w"]
    assert isinstance(tensor, mindspore_file.FlatTensor)
    return tensor


def saved_state(values: np.ndarray, folder: Path) -> Tensor:
    """As a run's folder holds it."""
    (folder / "a").mkdir(exist_ok=True)
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder / "a")}}
    store = ts.open(spec, create=True, delete_existing=True, dtype=ts.dtype(values.dtype), shape=values.shape).result()
    store.write(values).result()
    return SavedArray(folder / "a", "w", 0, values.shape, values.dtype, store)


Opener = Callable[[np.ndarray, Path], Tensor]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mindspore_file, "SLICE", 40)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("opener", [plain, strided, flat, saved_state])
@pytest.mark.parametrize(
    ("held", "wanted", "value", "about"),
    [
        ("float32", "float16", 1e30, "holds 1e+30, and the largest float16 is 65504\nChoose float32 or bfloat16."),
        ("bfloat16", "float16", -(2.0**20), "holds -1.05e+06, and the largest float16 is 65504\nChoose float32 or bf"),
        ("float32", "bfloat16", 3.4e38, "holds 3.4e+38, and the largest bfloat16 is 3.3895e+38\nChoose float32."),
    ],
)
def test_a_number_that_is_too_large_for_its_dtype_is_named(
    tmp_path: Path, opener: Opener, held: str, wanted: str, value: float, about: str
):
    values = np.ones((6, 8), dtype_named(held))
    values[4, 5] = value
    tensor, dtype = opener(values, tmp_path), dtype_named(wanted)
    for read in (tensor.read, lambda index, dtype: ColumnCache().read(tensor, index, dtype)):
        for index in (WHOLE, (slice(4, 5), slice(0, 8)), (slice(0, 6), slice(5, 6))):
            with pytest.raises(UserError, match=re.escape(f"w in {tensor.file} {about}")):
                read(index, dtype)
        assert (read((slice(0, 6), slice(0, 5)), dtype) == 1).all()


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("opener", [plain, strided, flat, saved_state])
@pytest.mark.parametrize("held", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16", "float16"])
def test_infinities_and_what_is_no_number_stay_what_they_are(tmp_path: Path, opener: Opener, held: str, wanted: str):
    values = np.linspace(-60000, 60000, 48).reshape(6, 8).astype(dtype_named(held))
    values[1, :3] = [np.inf, -np.inf, np.nan]
    tensor, dtype = opener(values, tmp_path), dtype_named(wanted)
    for found in (tensor.read(WHOLE, dtype), ColumnCache().read(tensor, WHOLE, dtype)):
        assert found.tobytes() == values.astype(dtype).tobytes()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one weight that float16 cannot hold."""
    config = tiny_config(head_dim=8)
    folder = save_hf(transformers_twin(config, tiny_params(config)), tmp_path_factory.mktemp("large") / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[UP][3, 4] = 1e30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
@pytest.mark.parametrize("to", ["hf", "easylm", "gguf", "mindspore"])
def test_a_model_that_float16_cannot_hold_is_refused_and_nothing_is_left(
    large: Path, tmp_path: Path, held: str, to: str
):
    convert(large, tmp_path / "model", dtype=held)
    about = f"{UP} in {tmp_path / 'model' / 'model.safetensors'} holds 1e+30, and the largest float16 is 65504"
    done = called("convert", tmp_path / "model", tmp_path / "out", "--to", to, "--dtype", "float16")
    assert_refused(done, about)
    assert {file.name for file in tmp_path.iterdir()} == {"model"}
    with pytest.raises(UserError, match="the largest float16 is"):
        camelid.load(tmp_path / "model", dtype="float16")


@pytest.mark.filterwarnings("error")
def test_bfloat16_holds_what_float16_cannot(large: Path, tmp_path: Path):
    convert(large, tmp_path / "rounded", dtype="bfloat16")
    held, source = (open_checkpoint(folder).tensors[UP] for folder in (tmp_path / "rounded", large))
    whole = tuple(slice(0, n) for n in source.shape)
    expected = source.read(whole, source.dtype).astype(ml_dtypes.bfloat16)
    assert held.read(whole, held.dtype).tobytes() == expected.tobytes()


def test_files_are_named_from_their_folder_and_the_rest_is_counted(tmp_path: Path):
    files = [tmp_path / f"rank_{i}" / "a.pt" for i in range(5)]
    assert file_names(files[:2], tmp_path) == "rank_0/a.pt, rank_1/a.pt"
    assert file_names(files[::-1], tmp_path) == "rank_0/a.pt, rank_1/a.pt, rank_2/a.pt and 2 more"
    assert file_names([Path("/elsewhere/b.pt")], tmp_path) == "/elsewhere/b.pt"
