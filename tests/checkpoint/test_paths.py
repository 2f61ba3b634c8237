"""Any legal path works, for everything that is read and written, and a checkpoint is verified before it counts."""

import functools
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
import tensorstore as ts

from camelid.checkpoint.compare import compare
from camelid.checkpoint.convert import convert
from camelid.checkpoint.formats.hf_config import config_to_hf
from camelid.checkpoint.registry import FORMATS, open_checkpoint
from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.checkpoint.state.saved_state import DESCRIPTORS, ITEM, SafePath, find_damage
from camelid.data.config import Source
from camelid.data.preparation.prepare import prepare
from camelid.data.preparation.store import Store
from camelid.disk.json_files import write_hf_json
from camelid.errors import UserError
from camelid.model.decoder import declare_decoder
from camelid.model.params import abstract
from camelid.parallel.mesh import one_device
from camelid.text.tokenizer import load_tokenizer
from camelid.train.optimizer import make_optimizer
from camelid.train.optimizer_config import OptimizerConfig
from camelid.train.state import TrainState, abstract_state
from names import KINDS, random_names
from runs import contents, write_text
from text.tiny import save_byte_tokenizer
from tiny import tiny_config

CONFIG = tiny_config(head_dim=8, vocab_size=96, num_layers=2)
WRITTEN = [name for name, format in FORMATS.items() if format.plan_files is not None and not format.lossy]


def target() -> TrainState:
    specs = declare_decoder(CONFIG)
    optimizer = make_optimizer(OptimizerConfig(), 9, specs)
    return abstract_state(abstract(specs, "float32", one_device()), optimizer)


def state_of(seed: int) -> TrainState:
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(target()))))
    return jax.tree.map(lambda x: (1000 * jax.random.normal(next(keys), x.shape)).astype(x.dtype), target())


def run_of(folder: Path, state: TrainState) -> Path:
    """A run's folder with one checkpoint."""
    folder.mkdir(parents=True)
    (folder / "recipe.toml").write_text("")
    write_hf_json(folder / "config.json", config_to_hf(CONFIG, "float32"))
    checkpoints = RunCheckpoints(folder / "checkpoints", 1)
    checkpoints.save(1, state)
    checkpoints.wait()
    checkpoints.close()
    return folder


def restored(folder: Path, step: int = 1) -> TrainState:
    checkpoints = RunCheckpoints(folder / "checkpoints", 1)
    assert checkpoints.latest() == step
    state = checkpoints.restore(step, target())
    checkpoints.close()
    return state


def bits(state: TrainState) -> list[bytes]:
    return [jax.device_get(leaf).tobytes() for leaf in jax.tree.leaves(state)]


# Names -----------------------------------------------------------------------------------


def test_100_names_are_saved_restored_opened_and_converted(tmp_path: Path):
    """Runs below ten folders each, which saves much time; and a checkpoint in a folder of each name."""
    names, state = random_names(100), state_of(0)
    plain = open_checkpoint(run_of(tmp_path / "plain", state))
    for start in range(0, len(names), 10):
        run = run_of(tmp_path.joinpath(*names[start : start + 10]), state)
        assert bits(restored(run)) == bits(state)
        for place in (run, run / "checkpoints" / "1"):
            assert all(difference.equal for difference in compare(plain, open_checkpoint(place)))
        for number, name in enumerate(names[start : start + 10], start):
            to = WRITTEN[number % len(WRITTEN)]
            convert(run, run / name, to=to)
            assert all(difference.equal for difference in compare(plain, open_checkpoint(run / name, to))), name
            convert(run, run / name, overwrite=True)
            assert all(difference.equal for difference in compare(plain, open_checkpoint(run / name, "hf"))), name
            assert {path.name for path in run.iterdir() if path.name.startswith(f".{name}")} <= {name}
        shutil.rmtree(tmp_path / names[start])


@pytest.mark.parametrize("name", KINDS)
def test_a_run_of_every_kind_of_name_is_restored(tmp_path: Path, name: str):
    """Each alone: what one of them needs does not help another."""
    state = state_of(0)
    assert bits(restored(run_of(tmp_path / name, state))) == bits(state)


@pytest.mark.parametrize("name", KINDS)
def test_data_of_every_kind_of_name_is_prepared(tmp_path: Path, name: str):
    """The text, the tokenizer and the store."""
    folder = tmp_path / name
    folder.mkdir()
    tokenizer = load_tokenizer(save_byte_tokenizer(folder / "tokenizer"))
    write_text(folder / f"{name}.jsonl")
    sources = [Source(files=(str(folder / f"{name}.jsonl"),))]
    store = prepare(sources, tokenizer, folder / "store" / name, validation_fraction=0.1)
    store.verify()
    assert Store.open(folder / "store" / name).num_tokens == store.num_tokens > 1000
    assert [path.name for path in (folder / "store").iterdir()] == [name]


def test_runs_whose_names_match_each_other_are_not_mixed(tmp_path: Path):
    """As patterns, the first and the last match the folder of the second; all write at the same time."""
    names = ("v*", "vX", "v?")
    runs = [RunCheckpoints(tmp_path / name / "checkpoints", 2) for name in names]
    for step in range(1, 4):
        for seed, run in enumerate(runs):
            run.save(step, state_of(100 * seed + step))
    for run in runs:
        run.wait()
        run.close()
    # However fast they are: what a run of the second name is writing is there as long as the others write theirs.
    begun = tmp_path / "vX" / "checkpoints" / "4.orbax-checkpoint-tmp" / f"{ITEM}.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "vX" / "checkpoints" / "3" / ITEM, begun)
    for seed, name in enumerate(names):
        if name != "vX":
            run = RunCheckpoints(tmp_path / name / "checkpoints", 2)
            run.save(4, state_of(100 * seed + 4))
            run.wait()
            run.close()
        for step in (2, 3) if name == "vX" else (3, 4):
            checkpoints = RunCheckpoints(tmp_path / name / "checkpoints", 2)
            assert bits(checkpoints.restore(step, target())) == bits(state_of(100 * seed + step)), (name, step)
            checkpoints.close()


def test_a_path_with_dots_in_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    state = state_of(0)
    run_of(tmp_path / "a" / "run", state)
    (tmp_path / "b").mkdir()
    (tmp_path / "c").symlink_to("a/run")
    monkeypatch.chdir(tmp_path / "b")
    for path in ("../a/run", "../a/../a/./run", "../c", "../c/../run", "../a/run/checkpoints/1", "../c/checkpoints/1"):
        assert open_checkpoint(path).config == CONFIG, path
    assert bits(restored(Path("../a/run"))) == bits(state)
    monkeypatch.chdir(tmp_path / "a" / "run")
    assert open_checkpoint(".").config == CONFIG
    monkeypatch.chdir(tmp_path / "a" / "run" / "checkpoints")
    assert open_checkpoint("1").config == open_checkpoint("..").config == CONFIG


def test_an_open_checkpoint_keeps_its_descriptor_no_longer_than_it_needs_it(tmp_path: Path):
    run = run_of(tmp_path / "[1]", state_of(0))

    def held() -> int:
        return sum(str(tmp_path) in str(file.readlink()) for file in DESCRIPTORS.iterdir() if file.is_symlink())

    def assert_holds(count: int) -> None:
        """TensorStore's threads may close a file some time after it was read."""
        end = time.monotonic() + 60
        while held() != count and time.monotonic() < end:
            time.sleep(0.01)
        assert held() == count

    opened = open_checkpoint(run)
    assert_holds(1)
    del opened
    assert_holds(0)


def test_a_system_without_descriptor_paths_refuses_a_path_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("camelid.checkpoint.state.saved_state.DESCRIPTORS", tmp_path / "nowhere")
    assert SafePath(tmp_path / "plain-1.0_a+b").path == str(tmp_path / "plain-1.0_a+b")
    with pytest.raises(UserError, match=r"\[1\] has characters in its path"):
        SafePath(tmp_path / "[1]")


# What was written is opened again --------------------------------------------------------


def lose_everything(item: Path) -> None:
    (item / "manifest.ocdbt").unlink()


def edit(change: Callable[[ts.KvStore], object]) -> Callable[[Path], None]:
    def damage(item: Path) -> None:
        change(ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}}).result())

    return damage


def lose(key: str) -> Callable[[Path], None]:
    return edit(lambda store: store.delete_range(ts.KvStore.KeyRange(key, f"{key}\x00")).result())


def change_shape(store: ts.KvStore) -> None:
    key = "params.final_norm.scale/.zarray"
    store[key] = store[key].replace(b'"shape":[48]', b'"shape":[47]')


NAME = "opt_state.0.mu.layers.mlp.up_proj"
ALL_OF_IT = ts.KvStore.KeyRange(f"{NAME}/", f"{NAME}0")
DAMAGES = {
    "no arrays": (lose_everything, ""),
    "an array": (edit(lambda store: store.delete_range(ALL_OF_IT).result()), "missing"),
    "a layer": (lose(f"{NAME}/1.0.0"), r"mlp.up_proj has 1 of its 2 chunks"),
    "a scalar": (lose("step/0"), "step has 0 of its 1 chunks"),
    "a shape": (edit(change_shape), r"params.final_norm.scale is float32 \(47,\), not float32 \(48,\)"),
}


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("last", [False, True], ids=["found by the next save", "found at the end"])
def test_a_checkpoint_that_was_not_written_completely_ends_training_and_removes_none(
    tmp_path: Path, what: str, last: bool, monkeypatch: pytest.MonkeyPatch
):
    damage, about = DAMAGES[what]
    folder = tmp_path / "run" / "checkpoints"
    checkpoints = RunCheckpoints(folder, 1)
    checkpoints.save(1, state_of(1))
    checkpoints.wait()
    checkpoints.save(2, state_of(2))
    manager = checkpoints._manager
    finish = manager.wait_until_finished

    def finish_badly() -> None:
        finish()
        damage(folder / "2" / ITEM)

    monkeypatch.setattr(manager, "wait_until_finished", finish_badly)
    go_on = checkpoints.wait if last else functools.partial(checkpoints.save, 3, state_of(3))
    with pytest.raises(UserError, match=rf"(?s)step 2 in .* was not written completely: .*{about}.* step 1\.") as error:
        go_on()
    monkeypatch.undo()
    assert f"remove {folder / '2'}" in error.value.advice
    checkpoints.close()
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]
    shutil.rmtree(folder / "2")
    assert bits(restored(tmp_path / "run")) == bits(state_of(1))


def test_what_another_program_writes_into_every_checkpoint_is_never_an_error(tmp_path: Path):
    run = run_of(tmp_path / "run", state_of(1))
    outline = {name: (x.shape, x.dtype.name) for name, x in open_checkpoint(run).tensors.items()}
    (run / "checkpoints" / "1" / "notes.txt").write_text("the best so far")
    before = contents(run)
    whole = {f"params.{name}": about for name, about in outline.items()}
    assert find_damage(run / "checkpoints", 1, whole) is None
    assert contents(run) == before


def test_files_and_folders_of_others_among_the_checkpoints_stay(tmp_path: Path):
    run = run_of(tmp_path / "run", state_of(1))
    (run / "checkpoints" / "2024").write_text("a file")
    (run / "checkpoints" / "0").mkdir()
    (run / "checkpoints" / "0" / "x.csv").write_text("data")
    (run / "checkpoints" / "best").symlink_to("1")
    checkpoints = RunCheckpoints(run / "checkpoints", 1)
    assert checkpoints.latest() == 1
    checkpoints.save(2, state_of(2))
    checkpoints.wait()
    checkpoints.close()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["0", "2", "2024", "best"]
    assert (run / "checkpoints" / "0" / "x.csv").read_text() == "data"
