"""EasyLM's files: what EasyLM wrote is read, what camelid writes is what EasyLM wrote, byte for byte."""

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import msgpack as reference  # another implementation, which Orbax brings along
import numpy as np
import pytest

from camelid.api import Model, load_params
from camelid.checkpoint import layout
from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec
from camelid.checkpoint.containers import msgpack
from camelid.checkpoint.convert import convert
from camelid.checkpoint.files import raw_payload, write_files
from camelid.checkpoint.formats import easylm, hf
from camelid.checkpoint.formats.config_source import read_model_config
from camelid.checkpoint.tensors import PlannedTensor, Tensor
from camelid.errors import UserError
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.params import named
from camelid.parallel.mesh import one_device
from families import FAMILIES
from runs import tensor_bytes
from tiny import save_hf, tiny_config, tiny_params, transformers_twin
from writing import in_pieces, put

WRITERS = {"streaming_params": easylm.plan_files, "flax_params": easylm.flax_files}
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
CONFIGS = {
    "grouped queries": tiny_config(head_dim=8),
    "grouped queries, tied": tiny_config(head_dim=8, tie_embeddings=True, rope_theta=500.0),
    "every head its own keys": tiny_config(head_dim=8, num_kv_heads=6),
    "every head its own keys, tied": tiny_config(head_dim=8, num_kv_heads=6, tie_embeddings=True),
}
SMALL = tiny_config(vocab_size=11, embed_dim=4, mlp_dim=6, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=2)


@pytest.fixture
def golden(assets: Path) -> Path:
    """stories260K as EasyLM wrote it; tied in Hugging Face's files, with a head of its own in these."""
    return assets / "golden" / "easylm"


@pytest.fixture
def config(stories: Path) -> ModelConfig:
    return read_model_config(stories)


def export(checkpoint: Checkpoint, dtype: np.dtype | None = None) -> ExportSpec:
    dtypes = checkpoint.dtypes if dtype is None else dict.fromkeys(checkpoint.dtypes, dtype)
    return ExportSpec(checkpoint.config, dtypes, checkpoint.read_slice, checkpoint.companions)


def written(
    folder: Path, checkpoint: Checkpoint, name: str = "streaming_params", dtype: np.dtype | None = None
) -> Path:
    folder.mkdir()
    put(folder, WRITERS[name], export(checkpoint, dtype))
    return folder / name


def model_of(checkpoint: Checkpoint) -> Model:
    compute, mesh = ComputeConfig(), one_device()
    return Model(checkpoint.config, load_params(checkpoint, compute, mesh), None, compute, mesh)


def numbers_of(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in named(model_of(checkpoint).params).items()}


def whole(tensor: Tensor) -> np.ndarray:
    out = np.empty(tensor.shape, tensor.dtype)
    tensor.read_into(out, tuple(slice(0, n) for n in tensor.shape))
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model of a few numbers, in Hugging Face's form."""
    twin = transformers_twin(SMALL, tiny_params(SMALL))
    return hf.open_checkpoint(save_hf(twin, tmp_path_factory.mktemp("small") / "theirs"))


def records_of(file: Path) -> list[tuple[list[str], bytes]]:
    """A stream, by another implementation of msgpack."""
    unpacker = reference.Unpacker(max_buffer_size=0)
    unpacker.feed(file.read_bytes())
    return [tuple(record) for record in unpacker]


def write_records(file: Path, records: list[tuple[list[str], bytes]]) -> Path:
    file.write_bytes(b"".join(map(reference.packb, records)))
    return file


# What EasyLM wrote ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bound"),
    # Logits reach 20; bfloat16 keeps 8 bits of every weight.
    [("streaming_params_fp32", 1e-4), ("flax_params_fp32", 1e-4), ("streaming_params_bf16", 0.2)],
)
def test_logits_of_what_easylm_wrote_are_the_reference_logits(
    golden: Path, stories: Path, config: ModelConfig, name: str, bound: float
):
    checkpoint = easylm.open_checkpoint(golden / name, config)
    assert checkpoint.config == config
    assert checkpoint.notes == ()
    model, arrays = model_of(checkpoint), np.load(stories.parent / "reference.npz")
    for prompt in range(3):
        logits = model.logits(arrays[f"prompt{prompt}_ids"][None])
        np.testing.assert_allclose(logits[0], arrays[f"prompt{prompt}_logits"], rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("streaming_params_fp32", None), ("streaming_params_bf16", BFLOAT16), ("flax_params_fp32", None)],
)
def test_the_same_weights_are_written_byte_for_byte_as_easylm_writes_them(
    golden: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dtype: np.dtype | None
):
    file = written(tmp_path / "new", hf.open_checkpoint(stories), re.sub("_[a-z]*[0-9]*$", "", name), dtype)
    assert file.read_bytes() == (golden / name).read_bytes()
    assert {"config.json", "tokenizer.model"} <= {companion.name for companion in file.parent.iterdir()}
    monkeypatch.setattr(layout, "CHUNK_BYTES", 9999)
    again = written(tmp_path / "in small pieces", hf.open_checkpoint(stories), file.name, dtype)
    assert again.read_bytes() == file.read_bytes()


def test_a_real_untied_model_keeps_its_logits(assets: Path, tmp_path: Path):
    folder = assets / "golden" / "hf_variants" / "hf_mha_untied"
    logits = np.array(json.loads((folder / "logits.json").read_text())["logits"], np.float32)
    model = model_of(easylm.open_checkpoint(written(tmp_path / "new", hf.open_checkpoint(folder))))
    ours = np.asarray(model.logits(np.array([[1, 403, 407, 261, 378]])))
    np.testing.assert_allclose(ours.reshape(logits.shape), logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CONFIGS)
def test_there_and_back_is_the_same_to_the_bit(tmp_path: Path, case: str):
    twin = transformers_twin(CONFIGS[case], tiny_params(CONFIGS[case]))
    original = hf.open_checkpoint(save_hf(twin, tmp_path / "original"))
    for dtype in (np.dtype(np.float32), BFLOAT16):
        theirs = tmp_path / dtype.name
        theirs.mkdir()
        put(theirs, hf.plan_files, export(original, dtype))
        for name in WRITERS:
            there = easylm.open_checkpoint(written(theirs / f"to {name}", hf.open_checkpoint(theirs), name).parent)
            assert there.config == CONFIGS[case]
            back = theirs / f"from {name}"
            back.mkdir()
            put(back, hf.plan_files, export(there))
            assert tensor_bytes(back) == tensor_bytes(theirs)
            assert (back / "config.json").read_text() == (theirs / "config.json").read_text()


@pytest.mark.parametrize("gap", [0.0, 1e-3])
def test_a_head_is_tied_where_it_is_the_table_to_the_bit(
    small: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gap: float
):
    monkeypatch.setattr("camelid.checkpoint.tensors.COMPARED_BYTES", 3 * 11 * 4)  # three features of four
    params = tiny_params(SMALL)
    params = replace(params, lm_head=params.embed.at[10, 3].add(gap))
    held = hf.open_checkpoint(save_hf(transformers_twin(SMALL, params), tmp_path / "theirs"))
    file = written(tmp_path / "new", held)
    checkpoint = easylm.open_checkpoint(file, replace(SMALL, tie_embeddings=True))
    assert checkpoint.config.tie_embeddings == (gap == 0)
    assert any("not tied" in note for note in checkpoint.notes) == (gap > 0)


# Arrays in pieces -------------------------------------------------------------------------


def packed(value: Any, limit: int) -> Any:
    """flax's form of an array, or of a tree of them, by another implementation of msgpack."""
    if isinstance(value, dict):
        return {name: packed(inner, limit) for name, inner in value.items()}

    def ext(array: np.ndarray) -> reference.ExtType:
        return reference.ExtType(1, reference.packb((array.shape, array.dtype.name, array.tobytes())))

    if value.nbytes <= limit:
        return ext(value)
    flat, most = value.reshape(-1), max(1, int(limit / value.itemsize))
    chunks = [flat[start : start + most] for start in range(0, len(flat), most)]
    shape = {str(i): n for i, n in enumerate(value.shape)}
    return {msgpack.MARK: True, "shape": shape, "chunks": {str(i): ext(chunk) for i, chunk in enumerate(chunks)}}


def drawn(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return np.random.default_rng(math.prod(shape)).standard_normal(shape, np.float32).astype(dtype)


# Each of msgpack's heads comes in several widths: 1 bfloat16 is an ext of 16 bytes, which has a head of its own.
SHAPES = [(1,), (15,), (16,), (127,), (128,), (120, 1), (31, 257), (255,), (70000, 1), (2, 3, 4, 5)]


@pytest.mark.parametrize("limit", [2**30, 400, 2])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
def test_arrays_of_every_size_are_written_as_flax_does_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: Any, limit: int
):
    monkeypatch.setattr(msgpack, "LIMIT", limit)
    shapes = [shape for shape in SHAPES if math.prod(shape) < 20 * limit]
    arrays = {f"h/{i}/{'x' * (i * 7)}/kernel": drawn(shape, dtype) for i, shape in enumerate(shapes * 2)}
    planned = [PlannedTensor(name, array.shape, array.dtype) for name, array in arrays.items()]
    stream, tree = tmp_path / "stream", tmp_path / "tree"
    payloads = [in_pieces(one, array.reshape(-1), 37) for one, array in zip(planned, arrays.values(), strict=True)]
    write_files(tmp_path, [msgpack.stream_file("stream", payloads), msgpack.tree_file("tree", payloads)])

    records = [(name.split("/"), reference.packb(packed(array, limit))) for name, array in arrays.items()]
    assert stream.read_bytes() == b"".join(map(reference.packb, records))
    nested: dict[str, Any] = {"h": {}}
    for i, (name, array) in enumerate(arrays.items()):
        nested["h"][str(i)] = {name.split("/")[2]: {"kernel": array}}
    assert tree.read_bytes() == reference.packb(packed(nested, limit))
    for leaves in (msgpack.open_stream(stream), msgpack.open_tree(tree)):
        assert leaves.keys() == arrays.keys()
        for name, leaf in leaves.items():
            assert isinstance(leaf, Tensor)
            assert whole(leaf).tobytes() == arrays[name].tobytes()
            assert leaf.shape == arrays[name].shape


def test_any_slice_of_an_array_in_pieces_is_that_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Pieces of 11 numbers, rows of 7 x 5."""
    monkeypatch.setattr(msgpack, "LIMIT", 44)
    array = drawn((13, 7, 5), np.float32)
    payloads = [in_pieces(PlannedTensor("a", array.shape, array.dtype), array.reshape(-1), array.size)]
    write_files(tmp_path, [msgpack.stream_file("x", payloads)])
    (tensor,) = msgpack.open_stream(tmp_path / "x").values()
    assert isinstance(tensor, msgpack.ChunkedTensor)
    assert [part.shape[0] for part in tensor.parts] == [11] * 41 + [4]
    monkeypatch.setattr(msgpack, "CHUNK", 300)  # two rows at a time
    draw = np.random.default_rng(0)
    for _ in range(100):
        cuts = [sorted(draw.integers(0, n + 1, 2)) for n in array.shape]
        index = tuple(
            slice(*map(int, cut)) if draw.random() < 0.7 else slice(0, n)
            for cut, n in zip(cuts, array.shape, strict=True)
        )
        for dtype in (np.float32, BFLOAT16):
            out = np.empty(array[index].shape, dtype)
            tensor.read_into(out, index)
            np.testing.assert_array_equal(out, array[index].astype(dtype))


def test_a_model_in_pieces_is_the_same_model(
    stories: Path, golden: Path, config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(msgpack, "LIMIT", 9000)
    for name in WRITERS:
        file = written(tmp_path / name, hf.open_checkpoint(stories), name)
        assert msgpack.MARK.encode() in file.read_bytes()
        ours, theirs = (numbers_of(easylm.open_checkpoint(path, config)) for path in (file, golden / f"{name}_fp32"))
        assert all(np.array_equal(leaf, theirs[path]) for path, leaf in ours.items())


def test_a_record_that_the_stream_cannot_count_is_refused(tmp_path: Path):
    planned = PlannedTensor("transformer/wte/embedding", (2**17, 2**13), np.dtype(np.float32))
    with pytest.raises(UserError, match=r"wte/embedding has 4,29.* bytes.*\n.*bfloat16"):
        msgpack.stream_file("x", [raw_payload(planned, list)])


# Train states -----------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [None, "trainstate"])
def test_a_train_state_holds_parameters_moments_and_counts(golden: Path, config: ModelConfig, prefix: str | None):
    state = easylm.open_checkpoint(golden / "streaming_train_state", config, prefix)
    steps = json.loads((golden / "training_run.json").read_text())["steps"]
    assert state.training is not None
    assert state.training.step == len(steps)
    assert state.config == replace(config, tie_embeddings=False)
    assert any("not tied" in note for note in state.notes)
    held = {"params": numbers_of(state)}
    held |= {name: numbers_of(replace(state, tensors=getattr(state.training, name))) for name in ("mu", "nu")}
    for name, leaves in held.items():
        assert {path: leaf.shape for path, leaf in leaves.items()} == {
            path: part.spec.shape for path, part in state.table.entries.items()
        }, name
    # EasyLM's own norm of all parameters after its last step; the moments lie in the places of their parameters.
    norm = math.sqrt(sum(float(np.sum(np.square(leaf, dtype=np.float64))) for leaf in held["params"].values()))
    assert norm == pytest.approx(steps[-1]["param_norm"], rel=1e-6)
    assert all((leaf >= 0).all() for leaf in held["nu"].values())
    assert all((leaf < 0).any() for leaf in held["mu"].values())
    for path, nu in held["nu"].items():  # |sum of w g| <= sqrt(sum of w) sqrt(sum of w g^2), for AdamW's weights w
        assert (np.square(held["mu"][path]) <= 3 * nu + 1e-12).all(), path


def test_a_train_state_is_written_byte_for_byte_as_easylm_writes_it(golden: Path, config: ModelConfig, tmp_path: Path):
    described = replace(config, tie_embeddings=False)
    convert(golden / "streaming_train_state", tmp_path / "ours", to="easylm-trainstate", config=described)
    ours = tmp_path / "ours" / "streaming_train_state"
    assert ours.read_bytes() == (golden / "streaming_train_state").read_bytes()
    assert easylm.open_checkpoint(ours).training is not None


def test_other_formats_say_that_they_leave_the_training_out(golden: Path, config: ModelConfig, tmp_path: Path):
    described = replace(config, tie_embeddings=False)
    state = golden / "streaming_train_state"
    notes = convert(state, tmp_path / "hf", config=described)
    assert notes[-1] == "the step and the optimizer's moments are left out; --to easylm-trainstate keeps them"
    with pytest.raises(UserError, match="the source has no step and no AdamW moments to write"):
        convert(tmp_path / "hf", tmp_path / "out", to="easylm-trainstate")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "prefix"), [("streaming_train_state", "trainstate_params"), ("streaming_params_fp32", None)]
)
def test_parameters_alone_have_no_training(golden: Path, config: ModelConfig, name: str, prefix: str | None):
    assert easylm.open_checkpoint(golden / name, config, prefix).training is None


def test_parameters_of_a_train_state_are_what_its_training_reached(golden: Path, config: ModelConfig):
    """Six steps from the model that it began with: near it, and not the same."""
    names = "streaming_params_fp32", "streaming_train_state"
    checkpoints = [easylm.open_checkpoint(golden / name, replace(config, tie_embeddings=False)) for name in names]
    before, after = map(model_of, checkpoints)
    tokens = np.array([[1, 403, 407, 261, 378]])
    gap = np.abs(np.asarray(after.logits(tokens)) - np.asarray(before.logits(tokens))).max()
    assert 0.01 < gap < 5
    first, last = map(numbers_of, checkpoints)
    for path, leaf in last.items():
        difference = np.abs(leaf - first[path]).max()
        assert 0 < difference < 6 * 1.5e-3, path  # six steps of Adam, each at most 0.001 and a little decay


def test_a_train_state_with_accumulated_gradients_is_the_same(golden: Path, config: ModelConfig, tmp_path: Path):
    """optax's MultiSteps puts AdamW's state below inner_opt_state."""
    records = []
    for key, value in records_of(golden / "streaming_train_state"):
        if key[0] == "opt_state":
            records.append((["opt_state", "inner_opt_state", *key[1:]], value))
        else:
            records.append((key, value))
        if key[0] == "params":
            records.append((["opt_state", "acc_grads", *key[1:]], value))
    records += [
        (["opt_state", name], reference.packb(count)) for name, count in (("mini_step", 3), ("gradient_step", 6))
    ]
    # Its own step counts microbatches, AdamW's count the updates.
    records = [(key, reference.packb(27) if key == ["step"] else value) for key, value in records]
    write_records(tmp_path / "streaming_train_state_6", records)
    states = [easylm.open_checkpoint(path, config) for path in (tmp_path, golden / "streaming_train_state")]
    assert any("3 microbatches" in note for note in states[0].notes)
    trainings = [state.training for state in states]
    assert [training and training.step for training in trainings] == [6, 6]
    held = [states[0].tensors, states[1].tensors]
    for tensors in (held, *([getattr(training, name) for training in trainings] for name in ("mu", "nu"))):
        assert tensors[0].keys() == tensors[1].keys()
        assert all(whole(tensor).tobytes() == whole(tensors[1][key]).tobytes() for key, tensor in tensors[0].items())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda r: r.pop("step"), "has no step"),
        (lambda r: r.pop("opt_state/1/0/count"), "has no opt_state/1/0/count"),
        (lambda r: r.pop("opt_state/1/0/nu/params/lm_head/kernel"), "lacks lm_head/kernel"),
        (
            lambda r: r.update({"opt_state/1/0/count": reference.packb(-1)}),
            "0/count = -1, which is not a number of updates",
        ),
        (lambda r: r.update({"opt_state/1/3/count": r["step"]}), "opt_state/1/3/count"),
        (
            lambda r: r.update({"opt_state/1/0/mu/params/lm_head/kernel": r["step"]}),
            "lm_head/kernel .* is 6, and not an array",
        ),
    ],
)
def test_other_train_states_are_refused(golden: Path, config: ModelConfig, tmp_path: Path, change, problem: str):
    records = {"/".join(key): value for key, value in records_of(golden / "streaming_train_state")}
    change(records)
    held = [(name.split("/"), value) for name, value in records.items()]
    file = write_records(tmp_path / "streaming_train_state", held)
    with pytest.raises(UserError, match=problem):
        easylm.open_checkpoint(file, config)
    if "lm_head" not in problem:
        assert easylm.open_checkpoint(file, config, "trainstate_params").tensors


# What is opened ---------------------------------------------------------------------------


def test_a_prefix_must_agree_with_the_file(golden: Path, config: ModelConfig):
    files = {
        "params": "streaming_params_bf16",
        "flax_params": "flax_params_fp32",
        "trainstate": "streaming_train_state",
    }
    for prefix, kind in easylm.PREFIXES.items():
        for found, name in files.items():
            if found == kind:
                assert easylm.open_checkpoint(golden / name, config, prefix).tensors
            else:
                with pytest.raises(
                    UserError, match=re.escape(f"{golden / name} is {easylm.FILE_TYPES[found]}, and not")
                ):
                    easylm.open_checkpoint(golden / name, config, prefix)
    with pytest.raises(UserError, match=r"params_fp32 is .*, and not a stream with a train state"):
        easylm.open_checkpoint(golden / "flax_params_fp32", config, "trainstate")


def test_a_folder_needs_one_file_of_the_kind(golden: Path, config: ModelConfig, tmp_path: Path):
    assert easylm.matches(golden)
    with pytest.raises(
        UserError, match=r"contains flax_params_fp32, streaming_params_bf16, streaming_params_fp32, streaming_"
    ):
        easylm.open_checkpoint(golden, config)
    assert easylm.open_checkpoint(golden, config, "flax").tensors
    assert easylm.open_checkpoint(golden, config, "trainstate_params").tensors
    with pytest.raises(UserError, match="contains streaming_params_bf16, streaming_params_fp32, not exactly one"):
        easylm.open_checkpoint(golden, config, "params")
    with pytest.raises(UserError, match="contains nothing named"):
        easylm.open_checkpoint(tmp_path, config)
    with pytest.raises(UserError, match="does not exist"):
        easylm.open_checkpoint(tmp_path / "absent", config)


def test_only_its_own_files_look_like_it(golden: Path, stories: Path, assets: Path, tmp_path: Path):
    for file in golden.iterdir():
        assert easylm.matches(file) == (file.suffix not in (".json", ".jsonl")), file
    (tmp_path / "streaming_params").write_bytes(b"\x80\x02}q\x00.")
    others = [tmp_path, tmp_path / "streaming_params", tmp_path / "absent", stories, *stories.iterdir()]
    others += [path for path in (assets / "golden").rglob("*") if path.is_file() and path.parent != golden]
    assert not any(map(easylm.matches, others))


def test_a_model_is_said_or_refused(golden: Path, stories: Path, tmp_path: Path):
    file = tmp_path / "streaming_params"
    file.write_bytes((golden / "streaming_params_fp32").read_bytes())
    (tmp_path / "metadata.pkl").write_bytes(b"cos\nsystem\n")
    with pytest.raises(UserError, match=r"metadata\.pkl is a pickle(.|\n)*--config llama_7b"):
        easylm.open_checkpoint(file)
    (tmp_path / "config.json").write_bytes((stories / "config.json").read_bytes())
    checkpoint = easylm.open_checkpoint(tmp_path)
    assert checkpoint.config == read_model_config(stories)
    assert checkpoint.notes == ("metadata.pkl was not opened, because unpickling can run code.",)
    with pytest.raises(UserError, match=r"transformer/wte/embedding has shape \(512, 64\).*\(512, 96\)"):
        easylm.open_checkpoint(file, replace(checkpoint.config, embed_dim=96, tie_embeddings=False))
    with pytest.raises(UserError, match="no place for: transformer/h/4"):
        easylm.open_checkpoint(file, replace(checkpoint.config, num_layers=4))
    with pytest.raises(UserError, match="lacks transformer/h/5"):
        easylm.open_checkpoint(file, replace(checkpoint.config, num_layers=6))


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (FAMILIES["gemma"].ours, "norm_offset"),
        (FAMILIES["qwen3"].ours, "qk_norm"),
        (FAMILIES["mistral, sliding window"].ours, "sliding_window"),
        (FAMILIES["llama, linear scaling"].ours, "rope_scaling"),
        (tiny_config(), r"head_dim = 10: it is embed_dim / num_heads there, 48 / 6"),
    ],
)
def test_a_model_that_easylm_cannot_compute_is_refused(tmp_path: Path, config: ModelConfig, field: str):
    params = named(tiny_params(config))
    held = ExportSpec(config, dict.fromkeys(params, np.dtype(np.float32)), lambda *_: pytest.fail("read"))
    for write in WRITERS.values():
        with pytest.raises(UserError, match=f"EasyLM cannot hold {field}"):
            put(tmp_path, write, held)
    assert not list(tmp_path.iterdir())


# Damage -----------------------------------------------------------------------------------

NORM = ["transformer", "ln_f", "kernel"]
ARRAY = reference.packb(reference.ExtType(1, reference.packb(([4], "float32", bytes(16)))))


def array(shape: Any = (4,), dtype: Any = "float32", data: Any = bytes(16), code: int = 1) -> bytes:
    return reference.packb(reference.ExtType(code, reference.packb((shape, dtype, data))))


def cut(**parts: Any) -> bytes:
    one = reference.ExtType(1, reference.packb(([2], "float32", bytes(8))))
    held = {msgpack.MARK: True, "shape": {"0": 4}, "chunks": {"0": one, "1": one}}
    return reference.packb({key: value for key, value in (held | parts).items() if value is not None})


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (array(data=bytes(15)), "15 bytes are not a float32 array of shape"),
        (array(shape=(5,)), "16 bytes are not a float32"),
        (array(shape=(2**40, 2**40)), "16 bytes are not a float32"),
        (array(shape=(-4,)), "does not consist of integers"),
        (array(shape=(4.0,)), "does not consist of integers"),
        (array(shape=("1234",)), "does not consist of integers"),
        (array(shape=(True,) * 4), "does not consist of integers"),
        (array(shape=(1,) * 33), "absurd"),
        (array(shape=4), "no array"),
        (array(dtype="complex64"), "is complex64; camelid reads bfloat16, float16"),
        (array(dtype="x\x1b[2J"), "cannot be printed"),
        (array(dtype="float64", data=bytes(32)), "is float64; parameters are"),
        (array(dtype="int32"), "is int32; parameters are"),
        (array(data="0123456789abcdef"), "no bin"),
        (array(code=2), "type 2"),
        (array(code=3), None),
        (array(shape=(), data=bytes(4)), "is 0.0, and not an array"),
        (reference.packb(bytes(16)), "msgpack's bin"),
        (reference.packb([1.0] * 4), "msgpack's array"),
        (b"\xc1", "does not use"),
        (ARRAY + b"\x00", "length of the record differs"),
        (ARRAY[:-1], "not a float32|bytes should follow|length of the record differs"),
        (b"\xc9\xff\xff\xff\xff\x01", "4,294,967,295 bytes should follow"),
        (b"\xdf\xff\xff\xff\xff", "no str|follow"),
        (b"\x81\xa1x" * 40 + b"\x00", "more than 32 nested maps"),
        (cut(), None),
        (cut(shape={"0": 5}), "do not form an array"),
        (cut(shape={"1": 4}), "numbered from 0"),
        (cut(shape={}), "numbered from 0"),
        (cut(shape=[4]), "msgpack's array"),
        (cut(chunks={"0": 4}), "do not form"),
        (cut(chunks=None), "other entries"),
        (cut(more=1), "other entries"),
    ],
    ids=itertools.count(),
)
def test_a_damaged_value_is_an_error_with_file_and_key(
    small: Checkpoint, tmp_path: Path, value: bytes, problem: str | None
):
    file = written(tmp_path / "new", small)
    write_records(file, [(key, value if key == NORM else held) for key, held in records_of(file)])
    if problem is None:
        assert not whole(easylm.open_checkpoint(file).tensors["/".join(NORM)]).any()
        return
    with pytest.raises(UserError, match=problem) as caught:
        easylm.open_checkpoint(file)
    assert "transformer/ln_f/kernel" in caught.value.problem
    tree = {"transformer": {"ln_f": {"kernel": 0}}}
    start = reference.packb(tree)[:-1]
    file.write_bytes(start + value)
    if not re.search("parameters are|not an array$|length of the record differs", problem):
        with pytest.raises(UserError, match=problem) as caught:
            msgpack.open_tree(file)
        assert str(file) in caught.value.problem


def test_names_and_ends_are_checked(small: Checkpoint, tmp_path: Path):
    file = written(tmp_path / "new", small)
    data = file.read_bytes()
    tree = written(tmp_path / "tree", small, "flax_params").read_bytes()
    for change, problem in [
        (data + data, "the key occurs twice"),
        (data + b"\x93\x91\xa4step\xc4\x01\x00", "a record is not a key and a value"),
        (data + b"\x92\x91\x05\xc4\x01\x00", "no str"),
        (data + b"\x92\x91\xdb\xff\xff\xff\xff", "absurd"),
        (data + b"\x92\xdd\xff\xff\xff\xff", "absurd"),
        (data + b"\x92\x91\xa4step\xc6\xff\xff\xff\xff\x00", "length of the record differs"),
        (data + b"\x92\x91\xa1\xff\xc4\x01\x00", "decode"),
        (data + b"\x92\x91\xa1\n\xc4\x01\x00", "cannot be printed"),
        (data + reference.packb((["vit"], ARRAY)), "no place for: vit"),
        (tree + b"\x00", "after the tree's end"),
        (tree.replace(b"wte", b"h00"), "lacks transformer/wte"),
        (tree.replace(b"lm_head", b"\xabtransformer"[:8]), "no place for|cut short|damaged"),
        (b"\x81\xabtransformer\x82\xa1h\x00\xa1h\x00", "the key occurs twice"),
        (b"\x93" + data[1:], "does not start like"),
        (b"", "does not start like"),
    ]:
        file.write_bytes(change)
        with pytest.raises(UserError, match=problem) as caught:
            easylm.open_checkpoint(file, SMALL)
        if "place for" not in problem and "lacks" not in problem:
            assert str(file) in caught.value.problem


@pytest.mark.parametrize("name", WRITERS)
def test_no_damage_is_more_than_an_error(small: Checkpoint, tmp_path: Path, name: str):
    """Every cut is noticed; a changed byte is noticed, or leaves a model of the same shapes."""
    file = written(tmp_path / "new", small, name)
    data, draw = file.read_bytes(), np.random.default_rng(7)
    names = easylm.open_checkpoint(file, SMALL).tensors.keys()
    for length in draw.integers(0, len(data), 50):
        file.write_bytes(data[:length])
        with pytest.raises(UserError):
            easylm.open_checkpoint(file, SMALL)
    for _ in range(100):
        changed = bytearray(data)
        for at in draw.integers(0, len(data), draw.integers(1, 4)):
            changed[at] = draw.integers(256)
        file.write_bytes(changed)
        easylm.matches(file)
        try:
            tensors = easylm.open_checkpoint(file, SMALL).tensors
        except UserError:
            continue
        assert tensors.keys() == names
        for tensor in tensors.values():
            whole(tensor)
