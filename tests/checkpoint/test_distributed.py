"""Distributed checkpoints of PyTorch: what megatron-core and torch wrote opens with the numbers of its source."""

import contextlib
import json
import pickle
import random
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import metadata as torch_metadata

from camelid.checkpoint.checkpoint import Checkpoint
from camelid.checkpoint.compare import compare
from camelid.checkpoint.containers import dcp, torch_files, torch_zip
from camelid.checkpoint.formats import hf
from camelid.checkpoint.formats import megatron_distributed as distributed
from camelid.checkpoint.registry import detect, open_checkpoint
from camelid.errors import UserError

DATA = Path(__file__).parent / "torch_dist"
SOURCE, TIED = DATA / "source", DATA / "source_tied"
# What megatron-core's GPTModel wrote (torch_dist/write.py), and the checkpoint whose numbers it held.
MEGATRON = {"tp2_pp2": SOURCE, "pp4_one_by_one": SOURCE, "tied_tp2_optimizer": TIED}


def assert_equal(checkpoint: Checkpoint, source: Path) -> None:
    differences = list(compare(open_checkpoint(source), checkpoint))
    assert differences
    assert all(difference.equal for difference in differences)
    assert {difference.dtypes for difference in differences} == {("float32", "float32")}


def hugging_face(folder: Path = SOURCE) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def torchtitan() -> dict[str, torch.Tensor]:
    """The parameters under torchtitan's names, which are Meta's, with Meta's order of rotary pairs."""
    words = {
        "self_attn.": "attention.",
        "mlp.": "feed_forward.",
        "lm_head": "output",
        "input_layernorm": "attention_norm",
    }
    words |= {"post_attention_layernorm": "ffn_norm", "embed_tokens": "tok_embeddings", "model.": ""}
    words |= {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}
    words |= {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    state, head_dim = {}, json.loads((SOURCE / "config.json").read_text())["head_dim"]
    for name, tensor in hugging_face().items():
        if "q_proj" in name or "k_proj" in name:  # halves become neighbors
            width = tensor.shape[1]
            tensor = tensor.reshape(-1, 2, head_dim // 2, width).transpose(1, 2).reshape(-1, width).contiguous()
        for theirs, ours in words.items():
            name = name.replace(theirs, ours)
        state[name] = tensor
    return state


def save(state: dict[str, Any], folder: Path) -> Path:
    """What one process writes with torch.distributed.checkpoint."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch_dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


# Whole files --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEGATRON)
def test_what_megatron_core_wrote_has_the_numbers_of_its_source(name: str):
    checkpoint = open_checkpoint(DATA / name)
    assert checkpoint.format == "megatron"
    assert_equal(checkpoint, MEGATRON[name])
    stacked = "decoder.layers.self_attention.linear_qkv.weight" in checkpoint.tensors
    assert stacked != (name == "pp4_one_by_one")


def test_a_folder_of_megatron_opens_at_its_last_iteration_with_the_config_beside_it(tmp_path: Path):
    shutil.copytree(DATA / "tp2_pp2", tmp_path / "iter_0000005")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    assert any("norm_eps" in note for note in open_checkpoint(tmp_path).notes)  # which its args do not say reliably
    shutil.copy(SOURCE / "config.json", tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.folder == tmp_path
    assert not checkpoint.notes
    assert checkpoint.config == open_checkpoint(SOURCE).config
    assert_equal(checkpoint, SOURCE)


@pytest.fixture(scope="module")
def of_ranks(torchtitan: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders 1, 2 and 4, written by so many processes, under torchtitan's names."""
    folder = tmp_path_factory.mktemp("ranks")
    others = {"optimizer.state.norm.weight.exp_avg": torch.zeros(16), "train_state": {"step": 3}}
    torch.save({**torchtitan, **others}, folder / "state.pt")
    command = [sys.executable, str(DATA / "save_dcp.py"), str(folder / "state.pt"), str(folder)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return folder


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_torch_wrote_from_several_ranks_has_the_numbers_of_its_source(of_ranks: Path, ranks: int):
    folder = of_ranks / str(ranks)
    with pytest.raises(UserError, match="does not describe its model"):
        open_checkpoint(folder)
    checkpoint = open_checkpoint(folder, config=open_checkpoint(SOURCE).config)
    assert checkpoint.format == "dcp"
    assert_equal(checkpoint, SOURCE)
    assert len(checkpoint.files) == ranks
    assert any(isinstance(tensor, dcp.Assembled) for tensor in checkpoint.tensors.values()) == (ranks > 1)


def test_slices_across_chunks_are_what_numpy_cuts(of_ranks: Path, torchtitan: dict[str, torch.Tensor]):
    held = dcp.DistributedCheckpoint(of_ranks / "4")
    draw = random.Random(0)
    for name, values in torchtitan.items():
        for _ in range(5):
            starts = [draw.randrange(n) for n in values.shape]
            index = tuple(slice(a, draw.randrange(a + 1, n + 1)) for a, n in zip(starts, values.shape, strict=True))
            for dtype in (np.dtype(np.float32), np.dtype(np.float16)):
                expected = values.numpy()[index].astype(dtype)
                np.testing.assert_array_equal(held.tensor(name).read(index, dtype), expected, err_msg=name)


@pytest.mark.parametrize("prefix", ["", "model.", "state.app.model."])
def test_hugging_face_names_are_read_below_any_prefix(tmp_path: Path, prefix: str):
    state = {f"{prefix}{name}": tensor.bfloat16() for name, tensor in hugging_face().items()}
    folder = save({**state, "optimizer": {"state": {"x": torch.ones(3)}}, "lr_scheduler": {"last": 1}}, tmp_path / "x")
    shutil.copy(SOURCE / "config.json", tmp_path)
    checkpoint = open_checkpoint(folder)
    assert {dtype.name for dtype in checkpoint.dtypes.values()} == {"bfloat16"}
    for name, tensor in checkpoint.tensors.items():
        index = tuple(slice(0, n) for n in tensor.shape)
        expected = state[prefix + name].float().numpy()
        np.testing.assert_array_equal(tensor.read(index, np.dtype(np.float32)), expected)


def test_names_that_wrappers_left_are_read_with_a_note(tmp_path: Path, torchtitan: dict[str, torch.Tensor]):
    shutil.copy(SOURCE / "config.json", tmp_path)

    def wrapped(name: str) -> str:
        return re.sub(r"(layers\.\d+)\.", r"\1._checkpoint_wrapped_module.", f"model._orig_mod.{name}")

    for folder, state in (("hf", hugging_face()), ("titan", torchtitan)):
        checkpoint = open_checkpoint(save({wrapped(name): x for name, x in state.items()}, tmp_path / folder))
        assert_equal(checkpoint, SOURCE)
        assert any("_checkpoint_wrapped_module" in note for note in checkpoint.notes)


def test_a_head_alone_is_the_table_of_a_tied_model(tmp_path: Path):
    shutil.copy(TIED / "config.json", tmp_path)
    state = hugging_face(TIED)
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    assert_equal(open_checkpoint(save(state, tmp_path / "x")), TIED)


def test_checksums_of_many_files_are_not_read_at_every_open(of_ranks: Path, monkeypatch: pytest.MonkeyPatch):
    files = [*(of_ranks / "4").glob("*.distcp")]
    config = open_checkpoint(SOURCE).config
    read = []
    monkeypatch.setattr(torch_zip, "_crc", lambda file, start, count: read.append(count))
    for limit in (sum(file.stat().st_size for file in files) - 1, max(file.stat().st_size for file in files)):
        monkeypatch.setattr(torch_files, "CRC_BYTES", limit)
        monkeypatch.setattr(dcp, "CRC_BYTES", limit)
        notes = open_checkpoint(of_ranks / "4", config=config).notes
        assert not read
        assert any("convert --check" in note for note in notes)


def test_a_tied_model_may_hold_its_head_if_it_is_the_table(tmp_path: Path):
    state = hugging_face(TIED)
    shutil.copy(TIED / "config.json", tmp_path)
    head = state["model.embed_tokens.weight"].clone()
    assert_equal(open_checkpoint(save({**state, "lm_head.weight": head}, tmp_path / "same")), TIED)
    with pytest.raises(UserError, match=r"lm_head\.weight differs from it"):
        open_checkpoint(save({**state, "lm_head.weight": head + 1}, tmp_path / "other"))


def test_rows_that_fill_up_the_vocabulary_of_megatron_are_left_out(tmp_path: Path):
    held, state = dcp.DistributedCheckpoint(DATA / "tp2_pp2"), {}
    for name in held.items:
        if not distributed.OTHERS.fullmatch(name):
            tensor = held.tensor(name)
            state[name] = torch.tensor(tensor.read(tuple(slice(0, n) for n in tensor.shape), tensor.dtype))
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        state[name] = torch.cat([state[name], torch.full((160, 16), 7.0)])  # to 256, of 128 for each of two ranks
    folder = save(state, tmp_path / "x")
    shutil.copy(DATA / "tp2_pp2" / "metadata.json", folder)
    common = torch.load(DATA / "tp2_pp2" / "common.pt", weights_only=False)
    common["args"].padded_vocab_size, common["args"].make_vocab_size_divisible_by = 256, 128
    torch.save(common, folder / "common.pt")
    assert_equal(open_checkpoint(folder), SOURCE)


# Files that are not what they should be -------------------------------------------------------


def rewritten(folder: Path, change: Callable[[torch_metadata.Metadata], Any]) -> None:
    reader = torch_dcp.FileSystemReader(folder)
    held = reader.read_metadata()
    change(held)
    (folder / ".metadata").write_bytes(pickle.dumps(held))


def dropped(held: torch_metadata.Metadata) -> None:
    key = next(key for key in held.storage_data if key.fqn == "output.weight")
    del held.storage_data[key]


def chunk_dropped(held: torch_metadata.Metadata) -> None:
    held.state_dict_metadata["output.weight"].chunks.pop()


def chunk_doubled(held: torch_metadata.Metadata) -> None:
    chunks = held.state_dict_metadata["output.weight"].chunks
    chunks.append(chunks[0])


def chunk_moved(held: torch_metadata.Metadata) -> None:
    chunk = held.state_dict_metadata["output.weight"].chunks[-1]
    chunk.offsets = torch.Size([chunk.offsets[0] + 1, *chunk.offsets[1:]])


def outside(held: torch_metadata.Metadata) -> None:
    next(iter(held.storage_data.values())).relative_path = "../../secret.distcp"


def beyond(held: torch_metadata.Metadata) -> None:
    key = next(key for key in held.storage_data if key.fqn == "output.weight")
    held.storage_data[key].offset = 10**9


def other_shape(held: torch_metadata.Metadata) -> None:
    entry = held.state_dict_metadata["norm.weight"]
    entry.size = torch.Size([8])
    entry.chunks = [torch_metadata.ChunkStorageMetadata(torch.Size([0]), torch.Size([8]))]


def other_dtype(held: torch_metadata.Metadata) -> None:
    held.state_dict_metadata["norm.weight"].properties.dtype = torch.float8_e4m3fn


def renamed(held: torch_metadata.Metadata) -> None:
    held.state_dict_metadata["stray.weight"] = held.state_dict_metadata["norm.weight"]


def without_table(held: torch_metadata.Metadata) -> None:
    del held.state_dict_metadata["tok_embeddings.weight"]


def nested(held: torch_metadata.Metadata) -> None:
    key = next(key for key in held.storage_data if key.fqn == "norm.weight")
    info = held.storage_data.pop(key)
    object.__setattr__(key, "offset", ((0,),))  # it is frozen
    held.storage_data[key] = info


DAMAGES = {
    "the place of a chunk is missing": (dropped, r"lacks the chunk of output\.weight"),
    "a chunk is missing": (chunk_dropped, r"lacks some of the elements of output\.weight"),
    "a chunk is there twice": (chunk_doubled, r"has some twice of the elements of output\.weight"),
    "a chunk lies elsewhere": (chunk_moved, r"reaches beyond its shape"),
    "a file outside of the folder": (outside, "in an unsupported way"),
    "a place beyond the file": (beyond, "are not inside the file"),
    "a chunk of another shape": (other_shape, r"\.metadata has \(8,\)"),
    "a dtype of another kind": (other_dtype, r"norm\.weight .* has a dtype"),
    "a stray tensor": (renamed, r"lacks the chunk of stray\.weight"),
    "no table of embeddings": (without_table, r"lacks tok_embeddings\.weight"),
    "offsets within offsets": (nested, r"describes norm\.weight in an unsupported way"),
}


@pytest.fixture
def damaged(of_ranks: Path, tmp_path: Path) -> Path:
    """A copy of what two ranks wrote, with the config of its model around it."""
    shutil.copy(SOURCE / "config.json", tmp_path)
    shutil.copytree(of_ranks / "2", tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_description_is_refused_by_name(damaged: Path, damage: str):
    change, about = DAMAGES[damage]
    rewritten(damaged, change)
    with pytest.raises(UserError, match=about):
        open_checkpoint(damaged)


def test_a_missing_or_shortened_file_is_named(damaged: Path):
    file = damaged / "__1_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="__1_0"):
        open_checkpoint(damaged)
    file.unlink()
    with pytest.raises(UserError, match="__1_0"):
        open_checkpoint(damaged)


def test_a_changed_number_is_found_by_its_checksum(damaged: Path, torchtitan: dict[str, torch.Tensor]):
    file = damaged / "__1_0.distcp"
    assert torch_zip.verify_checksums(file)
    whole = bytearray(file.read_bytes())
    values = torchtitan["output.weight"].numpy()
    at = whole.find(values[-1].tobytes())
    assert at > 0
    whole[at] ^= 1
    file.write_bytes(whole)
    assert torch_zip.verify_checksums(file) is False
    with pytest.raises(UserError, match="does not match its checksum"):
        open_checkpoint(damaged)


def test_nothing_of_a_description_is_called(damaged: Path):
    (damaged / ".metadata").write_bytes(b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.")
    with pytest.raises(UserError, match=r"would call os\.system"):
        open_checkpoint(damaged)


def test_zarr_is_refused_by_name(tmp_path: Path):
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    with pytest.raises(UserError, match="zarr"):
        open_checkpoint(tmp_path)
    shutil.copytree(DATA / "tp2_pp2", folder, dirs_exist_ok=True)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "fsdp_dtensor"}))
    with pytest.raises(UserError, match="fsdp_dtensor"):
        open_checkpoint(tmp_path)


def test_other_folders_do_not_look_like_it(of_ranks: Path):
    assert detect(of_ranks / "1") == "dcp"
    assert detect(DATA / "tp2_pp2") == "megatron"
    assert detect(SOURCE) == "hf"
    assert hf.matches(SOURCE)
    assert not dcp.matches(SOURCE)


def test_damaged_bytes_never_do_more_than_a_refusal(damaged: Path):
    draw = random.Random(0)
    files = [damaged / ".metadata", damaged / "__0_0.distcp"]
    wholes = [file.read_bytes() for file in files]
    end = time.monotonic() + 2
    for _ in range(100):
        if time.monotonic() > end:
            break
        which = draw.randrange(2)
        data = bytearray(wholes[which])
        for _ in range(draw.randrange(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        files[which].write_bytes(data[: draw.randrange(len(data))] if draw.random() < 0.2 else data)
        with contextlib.suppress(UserError):
            open_checkpoint(damaged)
        files[which].write_bytes(wholes[which])
