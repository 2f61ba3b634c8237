"""A run's own folder as a checkpoint: what Orbax wrote is read slice by slice, damage is told, nothing is changed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import Mesh

from camelid.api import load_params
from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec
from camelid.checkpoint.convert import convert
from camelid.checkpoint.formats import hf
from camelid.checkpoint.formats.hf_config import config_to_hf
from camelid.checkpoint.layout import slice_reader
from camelid.checkpoint.registry import detect, open_checkpoint, write_checkpoint
from camelid.checkpoint.state import run_folder, saved_state
from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.disk.json_files import write_hf_json
from camelid.errors import UserError
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.params import abstract, named
from camelid.parallel.mesh import MeshConfig, make_mesh, one_device
from camelid.runs.adamw_import import import_adamw
from camelid.train.optimizer import make_optimizer
from camelid.train.optimizer_config import OptimizerConfig
from camelid.train.state import TrainState, abstract_state
from families import FAMILIES
from runs import contents
from tiny import tiny_config

CONFIG = tiny_config(vocab_size=96, qkv_bias=True)  # eight devices divide it


def state_of(seed: int, mesh: Mesh, config: ModelConfig = CONFIG, dtype: str = "float32") -> TrainState:
    """Every leaf different; of the moments, one is all zeros, as those of an unused parameter are."""
    specs = declare_decoder(config)
    optimizer = make_optimizer(OptimizerConfig(), 9, specs)
    target = abstract_state(abstract(specs, dtype, mesh), optimizer)
    draw = np.random.default_rng(seed)

    def leaf(path: tuple, spec: jax.ShapeDtypeStruct) -> jax.Array:
        unused = ".mu.final_norm" in jax.tree_util.keystr(path, simple=True, separator=".")
        values = np.zeros(spec.shape) if unused else 1000 * draw.standard_normal(spec.shape)
        return jax.device_put(jnp.asarray(values, spec.dtype), spec.sharding)

    return jax.tree.map_with_path(leaf, target)


def run_of(folder: Path, *steps: int, config: ModelConfig = CONFIG, dtype: str = "float32", mesh: Mesh | None = None):
    """A run's folder with checkpoints of these steps."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text("")
    (folder / "tokenizer_config.json").write_text("{}")
    write_hf_json(folder / "config.json", config_to_hf(config, dtype))
    checkpoints = RunCheckpoints(folder / "checkpoints", 9)
    for step in steps:
        checkpoints.save(step, state_of(step, mesh or one_device(), config, dtype))
    checkpoints.wait()
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 2 and 10; with 10 after 2, the newest is not the last by name."""
    return run_of(tmp_path_factory.mktemp("sound") / "run", 2, 10)


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "run")


def held_by(checkpoint: Checkpoint) -> dict[str, dict[str, np.ndarray]]:
    """Everything that a checkpoint holds, read as the table says."""
    assert checkpoint.training is not None
    parts = {"params": checkpoint.tensors, "mu": checkpoint.training.mu, "nu": checkpoint.training.nu}
    held: dict[str, dict[str, np.ndarray]] = {}
    for kind, tensors in parts.items():
        read, held[kind] = slice_reader(checkpoint.table, tensors), {}
        for path, part in checkpoint.table.entries.items():
            shape, dtype = part.spec.shape[len(part.spec.stacked) :], tensors[path].dtype
            index = tuple(slice(0, n) for n in shape)
            layers = range(part.spec.shape[0]) if part.spec.stacked else [None]
            values = [read(path, layer, index, dtype) for layer in layers]
            held[kind][path] = np.stack(values) if part.spec.stacked else values[0]
    return held


def assert_holds(checkpoint: Checkpoint, state: TrainState, step: int) -> None:
    assert checkpoint.training is not None
    assert checkpoint.training.step == step
    (adam,) = (
        part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")
    )
    held = held_by(checkpoint)
    for kind, tree in {"params": state.trainable, "mu": adam.mu, "nu": adam.nu}.items():
        assert held[kind].keys() == named(tree).keys()
        for path, leaf in named(tree).items():
            assert held[kind][path].dtype == leaf.dtype, (kind, path)
            assert held[kind][path].tobytes() == np.asarray(leaf).tobytes(), (kind, path)


# What is opened ---------------------------------------------------------------------------


def test_moments_are_those_of_the_parameters_that_are_trained(sound: Path, tmp_path: Path):
    """From a run that trains all parameters to one that freezes an entire one, and on from that."""
    specs, mesh, compute = declare_decoder(CONFIG), one_device(), ComputeConfig()

    def target(*freeze: str) -> TrainState:
        optimizer = make_optimizer(OptimizerConfig(), 9, specs, freeze)
        return abstract_state(abstract(specs, "float32", mesh), optimizer)

    def adam(state: TrainState) -> dict[str, dict[str, np.ndarray]]:
        moments = state.opt_state.inner_state[0]
        return {name: named(jax.tree.map(np.asarray, getattr(moments, name))) for name in ("mu", "nu")}

    everything = open_checkpoint(sound / "checkpoints" / "10")
    state = import_adamw(everything, target("embed"), compute, mesh)
    for name, found in adam(state).items():
        held = held_by(everything)[name]
        assert found.keys() == held.keys() - {"embed"}
        for path, values in found.items():
            np.testing.assert_array_equal(values, held[path], err_msg=path)

    run = shutil.copytree(sound, tmp_path / "run")
    checkpoints = RunCheckpoints(run / "checkpoints", 9)
    checkpoints.save(11, state)
    checkpoints.wait()
    checkpoints.close()
    opened = open_checkpoint(run)
    assert opened.training is not None
    assert (opened.training.step, opened.training.mu.keys()) == (11, adam(state)["mu"].keys())
    again = import_adamw(opened, target("embed"), compute, mesh)
    jax.tree.map(np.testing.assert_array_equal, adam(again), adam(state))
    with pytest.raises(UserError, match=r"no moments of embed, which it did not train\nAdd it to train.freeze"):
        import_adamw(opened, target(), compute, mesh)
    with pytest.raises(UserError, match="no step and no AdamW moments"):
        convert(run, tmp_path / "state", to="easylm-trainstate")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)], ids=["one device", "eight"])
@pytest.mark.parametrize("chunk", [saved_state.CHUNK, 3000])
def test_what_a_run_saved_is_read_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, mesh: MeshConfig | None, chunk: int
):
    monkeypatch.setattr(saved_state, "CHUNK", chunk)
    devices = one_device() if mesh is None else make_mesh(mesh)
    # What a URL would read otherwise than a path.
    folder = run_of(tmp_path / "a run #2%20?", 3, dtype=dtype, mesh=devices)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.format, checkpoint.folder, checkpoint.config) == ("run", folder, CONFIG)
    assert_holds(checkpoint, state_of(3, devices, dtype=dtype), 3)
    assert [file.name for file in checkpoint.companions] == ["tokenizer_config.json"]
    for tensor in checkpoint.tensors.values():
        assert isinstance(tensor, saved_state.SavedArray)
        cut = tensor.store.chunk_layout.read_chunk.shape
        assert np.prod(cut) * tensor.dtype.itemsize <= chunk, "more than a slice needs is in memory"
        assert cut[0] == 1 or not tensor.name.startswith("params.layers."), "a layer is read with its neighbours"


@pytest.mark.parametrize("name", ["gemma2", "qwen3", "phi", "llama, linear scaling"])
def test_every_family_has_a_run(tmp_path: Path, name: str):
    config = FAMILIES[name].ours
    checkpoint = open_checkpoint(run_of(tmp_path / "run", 1, config=config))
    assert checkpoint.config == config
    assert_holds(checkpoint, state_of(1, one_device(), config), 1)


def test_any_slice_in_any_dtype_is_that_slice(sound: Path):
    tensor = open_checkpoint(sound).tensors["layers.attn.q_proj"]
    array = np.asarray(state_of(10, one_device()).trainable.layers.attn.q_proj)
    draw = np.random.default_rng(0)
    for _ in range(50):
        cuts = [sorted(draw.integers(0, n + 1, 2)) for n in array.shape]
        index = tuple(slice(*map(int, cut)) for cut in cuts)
        for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
            out = np.empty(array[index].shape, dtype)
            tensor.read_into(out, index)
            np.testing.assert_array_equal(out, array[index].astype(dtype))


@pytest.mark.parametrize("mesh", [None, MeshConfig(data=2, fsdp=2, tensor=2)], ids=["one device", "eight"])
def test_each_device_reads_its_part_once_and_what_changed_on_the_disk_is_seen(
    run: Path, monkeypatch: pytest.MonkeyPatch, mesh: MeshConfig | None
):
    read, bytes_read = saved_state.SavedArray._read, []

    def counted(tensor: saved_state.SavedArray, out: np.ndarray, index: tuple[slice, ...]) -> None:
        bytes_read.append(out.nbytes)
        read(tensor, out, index)

    monkeypatch.setattr(saved_state.SavedArray, "_read", counted)
    params = load_params(open_checkpoint(run), ComputeConfig(), make_mesh(mesh) if mesh else one_device())
    assert sum(bytes_read) == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for path, leaf in named(state_of(10, one_device()).trainable).items():
        assert np.asarray(named(params)[path]).tobytes() == np.asarray(leaf).tobytes(), path
    store = saved_state.open_arrays(run / "checkpoints" / "10")["params.layers.mlp.up_proj"].store
    store[1, 2, 3].write(store[1, 2, 3].read().result() + 1).result()
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(UserError, match=r"layers\.mlp\.up_proj differs from what was saved.*\nStep 2 is intact"):
            load_params(
                open_checkpoint(run), ComputeConfig(param_dtype=dtype), make_mesh(mesh) if mesh else one_device()
            )


def test_the_newest_step_is_opened_or_the_one_that_is_asked_for(
    sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for path, step in ((sound, 10), (sound / "checkpoints" / "10", 10), (sound / "checkpoints" / "2", 2)):
        assert detect(path) == "run"
        for named_so in (path, f"run::{path}"):
            assert_holds(open_checkpoint(named_so), state_of(step, one_device()), step)
    monkeypatch.chdir(sound / "checkpoints")
    assert_holds(open_checkpoint("2"), state_of(2, one_device()), 2)
    monkeypatch.chdir(sound)
    assert_holds(open_checkpoint("."), state_of(10, one_device()), 10)


def test_a_half_written_step_is_passed_over_and_nothing_is_changed(run: Path):
    shutil.copytree(run / "checkpoints" / "2", run / "checkpoints" / "20.orbax-checkpoint-tmp")
    before = contents(run)
    assert_holds(open_checkpoint(run), state_of(10, one_device()), 10)
    assert contents(run) == before


def test_without_a_complete_step_the_model_is_opened(run: Path, tmp_path: Path):
    convert(run, tmp_path / "hf")
    shutil.rmtree(run / "checkpoints" / "2")
    (run / "checkpoints" / "10").rename(run / "checkpoints" / "10.orbax-checkpoint-tmp-1")
    with pytest.raises(UserError, match="run has no complete checkpoint yet"):
        open_checkpoint(run)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="run has no complete checkpoint yet"):
        open_checkpoint(run)
    shutil.copytree(tmp_path / "hf", run / "model")
    checkpoint = open_checkpoint(run)
    assert (checkpoint.format, checkpoint.folder, checkpoint.training) == ("hf", run / "model", None)


def test_a_run_becomes_a_checkpoint_of_another_format(sound: Path, tmp_path: Path):
    (note,) = convert(sound, tmp_path / "hf")
    assert note == "the step and the optimizer's moments are left out; --to easylm-trainstate keeps them"
    theirs = hf.open_checkpoint(tmp_path / "hf")
    params = named(state_of(10, one_device()).trainable)
    for path, part in theirs.table.entries.items():
        layer = 2 if part.spec.stacked else None
        leaf = np.asarray(params[path])[() if layer is None else layer]
        index = tuple(slice(0, n) for n in leaf.shape)
        np.testing.assert_array_equal(theirs.read_slice(path, layer, index, leaf.dtype), leaf, err_msg=path)
    assert (tmp_path / "hf" / "tokenizer_config.json").is_file()


def test_it_is_not_written(sound: Path, tmp_path: Path):
    checkpoint = open_checkpoint(sound)
    export = ExportSpec(checkpoint.config, checkpoint.dtypes, checkpoint.read_slice)
    with pytest.raises(UserError, match="the format 'run' can only be read"):
        write_checkpoint(tmp_path / "new", export, "run")
    assert list(tmp_path.iterdir()) == []


# What is refused --------------------------------------------------------------------------


def test_a_folder_without_a_config_says_how_to_get_one(run: Path):
    (run / "config.json").unlink()
    with pytest.raises(
        UserError, match=r"run has no config\.json, so it was started by an older .*\nStart the same comm"
    ):
        open_checkpoint(run)
    assert_holds(open_checkpoint(run, config=CONFIG), state_of(10, one_device()), 10)
    with pytest.raises(UserError, match=r"embed has shape \(96, 48\), and the given config asks for \(96, 56\)"):
        open_checkpoint(run, config=replace(CONFIG, embed_dim=56))


@pytest.mark.parametrize("path", [".", "notes", "checkpoints", "checkpoints/7", "checkpoints/2"])
def test_what_is_no_run_is_refused(tmp_path: Path, sound: Path, path: str):
    (tmp_path / "notes").mkdir()
    shutil.copytree(sound / "checkpoints" / "2", tmp_path / "checkpoints" / "2")
    (tmp_path / "checkpoints" / "7").write_text("")
    assert not run_folder.matches(tmp_path / path)
    with pytest.raises(UserError, match="is not the folder of a run"):
        open_checkpoint(tmp_path / path, "run")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, r"has shape \(4, .*json asks for \(3, "),
        ({"vocab_size": 104}, r"embed has shape \(96, 48\), and config\.json asks for \(104, 48\)"),
        ({"tie_word_embeddings": True}, "no place for: lm_head"),
    ],
    ids=str,
)
def test_another_model_than_config_json_says_is_refused(run: Path, change: dict, problem: str):
    table = json.loads((run / "config.json").read_text())
    write_hf_json(run / "config.json", table | change)
    with pytest.raises(UserError, match=problem):
        open_checkpoint(run)


def lose(name: str) -> Callable[[Path], object]:
    return lambda step: (step / "default" / name).unlink()


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda step: (step / "default" / name).write_bytes(content)


def cut(step: Path) -> None:
    """The files of numbers, each cut short."""
    for file in (step / "default").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-100])


def lose_a_piece(step: Path) -> None:
    """One chunk of an array, which zarr would read as zeros."""
    files = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{step / 'default'}/"}}
    ts.KvStore.open(files).result().write("params.embed/0.0", None).result()


def flip(step: Path) -> None:
    """One bit of the numbers, which neither TensorStore nor Orbax notices."""
    file = max((step / "default").rglob("d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda step: [shutil.rmtree(inner) for inner in step.iterdir() if inner.is_dir()],
    "without a manifest": lose("manifest.ocdbt"),
    "garbage for a manifest": put("manifest.ocdbt", b"\xff" * 200),
    "a piece lost": lose_a_piece,
    "numbers cut short": cut,
    "a bit flipped": flip,
    "without its metadata": lambda step: (step / "_CHECKPOINT_METADATA").unlink(),
    "metadata cut short": lambda step: (step / "_CHECKPOINT_METADATA").write_bytes(b'{"item_'),
    "without numbers": lambda step: [file.unlink() for file in (step / "default").rglob("d/*")],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_step_is_an_error_that_names_it_and_the_one_before_opens(run: Path, damage: Callable[[Path], object]):
    damage(run / "checkpoints" / "10")
    with pytest.raises(UserError, match=r"the checkpoint of step 10 in .*run/checkpoints is damaged: ") as refusal:
        held_by(open_checkpoint(run))
    assert refusal.value.advice == f"Step 2 is intact. To open step 2, give {run / 'checkpoints' / '2'}."
    assert_holds(open_checkpoint(run / "checkpoints" / "2"), state_of(2, one_device()), 2)
