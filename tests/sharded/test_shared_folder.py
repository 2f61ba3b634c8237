"""Processes that see different states of a shared folder do what the main process decides, and name the same damage."""

import shutil
from pathlib import Path

import pytest

import camelid.runs.run
from camelid.checkpoint.state.saved_state import open_arrays
from camelid.parallel.mesh import one_device
from camelid.train.loggers import read_metrics
from runs import TIMEOUT_S, losses, recipe, tiny_run, write_recipe_file
from sharded.test_failing_processes import COMMAND, logs, two_processes

pytestmark = pytest.mark.quick_compile

BLIND = f"""
# As on a network file system whose cached listings are old: the run has no recipe and no checkpoints yet.
from pathlib import Path

is_dir, is_file, iterdir, glob = Path.is_dir, Path.is_file, Path.iterdir, Path.glob
Path.is_dir = lambda path: path.parent.name != "checkpoints" and is_dir(path)
Path.is_file = lambda path: path.name != "recipe.toml" and is_file(path)
Path.iterdir = lambda path: iter(()) if path.name == "checkpoints" else iterdir(path)
Path.glob = lambda path, pattern: iter(()) if "checkpoints" in pattern else glob(path, pattern)
{COMMAND}
"""
SLOW = f"""
import time
from camelid.checkpoint.state import saved_state

verify_step = saved_state.verify_step

def verify_slowly(place):
    time.sleep(1)
    return verify_step(place)

saved_state.verify_step = verify_slowly
{COMMAND}
"""


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of which 6 steps were made, with checkpoints of steps 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("shared")
    table = tiny_run(folder, train={"steps": 6, "checkpoint_every": 2, "keep_checkpoints": 9}, data__cache=str(folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())
        camelid.runs.run.run(recipe(table))
    return write_recipe_file(table, folder / "recipe.toml")


@pytest.fixture
def file(begun: Path, tmp_path: Path) -> Path:
    """The recipe of a copy of that run."""
    shutil.copytree(begun.with_name("run"), tmp_path / "run")
    text = begun.read_text().replace(str(begun.with_name("run")), str(tmp_path / "run"))
    (tmp_path / "recipe.toml").write_text(text)
    return tmp_path / "recipe.toml"


def test_a_process_that_sees_an_old_state_of_the_folder_goes_on_with_the_main_process(
    file: Path, user_env: dict[str, str]
):
    text = file.read_text().replace("steps = 6", "steps = 10").replace("keep_checkpoints = 9", "keep_checkpoints = 2")
    file.write_text(text)
    with two_processes(file, user_env, COMMAND, BLIND) as processes:
        statuses = [process.wait(TIMEOUT_S) for process in processes]
    assert statuses == [0, 0], logs(file)
    assert "resuming after step 6" in logs(file)[0]
    run = file.with_name("run")
    assert [row["step"] for row in losses(run)] == list(range(1, 11))
    assert {folder.name for folder in (run / "checkpoints").iterdir()} == {"8", "10"}


def test_both_processes_name_the_steps_that_are_whole(file: Path, user_env: dict[str, str]):
    run = file.with_name("run")
    store = open_arrays(run / "checkpoints" / "6")["params.layers.mlp.up_proj"].store
    store[1, 2, 3].write(store[1, 2, 3].read().result() + 1).result()
    with two_processes(file, user_env, SLOW, COMMAND) as processes:
        statuses = [process.wait(TIMEOUT_S) for process in processes]
    assert statuses == [2, 2], logs(file)
    for log in logs(file):
        assert "the checkpoint of step 6" in log, log
        assert "params.layers.mlp.up_proj differs from what was saved" in log, log
        assert "Steps 4, 2 are intact. To resume from step 4, add --from-step 4" in log, log
        assert "No other step" not in log, log
    assert len(read_metrics(run / "metrics.jsonl")) == 6
