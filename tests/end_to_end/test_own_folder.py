"""A run that has begun needs its own folder, and the text or what was prepared from it; nothing else."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import camelid.runs.components
import camelid.runs.run
from camelid.data.preparation.store import Store
from camelid.parallel.mesh import one_device
from camelid.runs.recipe import structure
from camelid.text.tokenizer import load_tokenizer
from runs import assert_refused, called, lay_over, losses, recipe, tensor_bytes, tiny_run, write_recipe_file

pytestmark = pytest.mark.quick_compile


@pytest.fixture(autouse=True)
def _on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())


def train(folder: Path, table: dict[str, Any], steps: int):
    return called("train", write_recipe_file(lay_over(table, {"train__steps": steps}), folder / "recipe.toml"))


def finetuning(folder: Path, base: Path, **fields: Any) -> dict[str, Any]:
    folder.mkdir()
    table = tiny_run(folder, init=str(base), optimizer__decay_steps=4, **fields)
    del table["model"], table["tokenizer"]
    return table


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer, and a file that goes along with it."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())
        camelid.runs.run.run(recipe(tiny_run(folder, train={"steps": 1})))
    (folder / "run" / "model" / "LICENSE").write_text("free")
    return folder / "run" / "model"


def test_init_may_be_gone(tmp_path: Path, base: Path):
    kept = finetuning(tmp_path / "kept", base)
    whole = camelid.runs.run.run(structure(lay_over(kept, {"train__steps": 4}))).folder
    moved = shutil.copytree(base, tmp_path / "moved")
    table = finetuning(tmp_path / "cut", moved)
    assert train(tmp_path, table, 2).returncode == 0
    shutil.rmtree(moved)
    done = train(tmp_path, table, 4)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "cut" / "run"
    assert [row["loss"] for row in losses(run)] == [row["loss"] for row in losses(whole)]
    assert tensor_bytes(run / "model") == tensor_bytes(whole / "model")
    assert {file.name for file in (run / "model").iterdir()} == {file.name for file in (whole / "model").iterdir()}
    assert (run / "model" / "LICENSE").read_text() == "free"


def test_an_init_that_is_another_model_now_is_not_looked_at(tmp_path: Path, base: Path):
    moved = shutil.copytree(base, tmp_path / "moved")
    table = finetuning(tmp_path / "run", moved)
    assert train(tmp_path, table, 2).returncode == 0
    (moved / "config.json").write_text("{}")
    (moved / "tokenizer.json").write_text("{}")
    assert train(tmp_path, table, 4).returncode == 0


def test_an_init_on_the_hub_is_not_asked_for(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch):
    table = finetuning(tmp_path / "run", base) | {"init": "somebody/something"}
    with monkeypatch.context() as patch:
        opened = camelid.runs.components.open_checkpoint
        patch.setattr(camelid.runs.components, "open_checkpoint", lambda path, **options: opened(base, **options))
        assert train(tmp_path, table, 2).returncode == 0
    done = train(tmp_path, table, 4)
    assert done.returncode == 0, done.stderr


def test_before_the_first_checkpoint_init_is_needed(tmp_path: Path, base: Path):
    moved = shutil.copytree(base, tmp_path / "moved")
    table = finetuning(tmp_path / "run", moved)
    assert train(tmp_path, table, 2).returncode == 0
    for name in ("checkpoints", "model"):
        shutil.rmtree(tmp_path / "run" / "run" / name)
    shutil.rmtree(moved)
    assert_refused(train(tmp_path, table, 2), f"{moved} does not exist")


@pytest.mark.parametrize("name", ["", "tokenizer.json", "other.json"])
def test_the_tokenizer_may_be_gone(tmp_path: Path, name: str):
    table = tiny_run(tmp_path)
    folder = Path(table["tokenizer"])
    if name == "other.json":
        (folder / "tokenizer.json").rename(folder / name)
    table["tokenizer"] = str(folder / name)
    assert train(tmp_path, table, 2).returncode == 0
    before = load_tokenizer(table["tokenizer"])
    shutil.rmtree(folder)
    done = train(tmp_path, lay_over(table, {"tokenizer": table["tokenizer"]}), 4)
    assert done.returncode == 0, done.stderr
    after = load_tokenizer(tmp_path / "run" / "model" / (name or "tokenizer.json"))
    assert (after.fingerprint, after.eos_ids, after.bos_id) == (before.fingerprint, before.eos_ids, before.bos_id)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("template", ["zephyr", "own", None])
def test_the_template_that_is_learnt_is_found_in_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str | None, cached: bool
):
    table = tiny_run(tmp_path)
    folder = Path(table["tokenizer"])
    text = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "default", "template": text}, {"name": "own", "template": f"!{text}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    row = {"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "It is said."}]}
    (tmp_path / "chats.jsonl").write_text(f"{json.dumps(row)}\n" * 20)
    source = {"files": [str(tmp_path / "chats.jsonl")], "kind": "chat"}
    table = lay_over(table, {"data__train": [source | ({} if template is None else {"template": template})]})
    assert train(tmp_path, table, 2).returncode == 0
    run = tmp_path / "run"
    learnt = {file.name: file.read_bytes() for file in (run / "model").glob("*template*")}
    shutil.rmtree(folder)
    if cached:  # nothing is tokenized again, though the run's folder has other files beside its tokenizer
        monkeypatch.setattr("camelid.data.rows.stores.prepare", None)
    else:
        table = lay_over(table, {"data__cache": str(tmp_path / "cache")})
        shutil.rmtree(json.loads((run / "data.json").read_text())["train"][0]["folder"])
    done = train(tmp_path, table, 4)
    assert done.returncode == 0, done.stderr
    assert {file.name: file.read_bytes() for file in (run / "model").glob("*template*")} == learnt
    assert bool(learnt) == (template is not None)


def _stores(run: Path) -> dict[str, list[dict[str, Any]]]:
    data = json.loads((run / "data.json").read_text())
    return {split: data[split] for split in ("train", "validation") if split in data}


@pytest.mark.parametrize("validated", ["", "held out", "a file"])
def test_text_may_be_gone_where_what_was_prepared_from_it_is_there(tmp_path: Path, validated: str):
    table = tiny_run(tmp_path)
    text = Path(table["data"]["train"][0])
    if validated == "held out":
        table["data"]["validation_fraction"] = 0.2
    if validated == "a file":
        table["data"]["validation"] = [str(shutil.copy(text, tmp_path / "validation.jsonl"))]
    (tmp_path / "whole").mkdir()
    lay_over(table, {"optimizer__decay_steps": 4, "train__steps": 4})
    whole = camelid.runs.run.run(structure(table | {"run": str(tmp_path / "whole" / "run")})).folder
    assert train(tmp_path, table, 2).returncode == 0
    text.unlink()
    prepared = {Path(store["folder"]) for stores in _stores(tmp_path / "run").values() for store in stores}
    prepared = {folder.parent if folder.name == "validation" else folder for folder in prepared}
    for folder in prepared:
        os.utime(folder, (100, 100))
    done = train(tmp_path, table, 4)
    assert done.returncode == 0, done.stderr
    assert all(folder.stat().st_mtime > 100 for folder in prepared), "`data cache --prune` goes by it"
    assert f"{text} no longer exists; the tokens that were prepared from it are used" in done.stderr
    assert tensor_bytes(tmp_path / "run" / "model") == tensor_bytes(whole / "model")
    # Without the store there is nothing to go on with, and the text is named.
    for folder in prepared:
        shutil.rmtree(folder)
    assert_refused(train(tmp_path, table, 5), f"{text} matches no file")


def test_text_that_came_is_refused_by_name(tmp_path: Path):
    table = tiny_run(tmp_path)
    shutil.copy(table["data"]["train"][0], tmp_path / "a.jsonl")
    table["data"]["train"] = [str(tmp_path / "*.jsonl")]
    assert train(tmp_path, table, 2).returncode == 0
    shutil.copy(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert_refused(train(tmp_path, table, 4), f"{tmp_path / 'b.jsonl'} changed since {tmp_path / 'run'} was started")


def test_a_store_that_is_another_now_is_not_taken(tmp_path: Path):
    table = tiny_run(tmp_path)
    assert train(tmp_path, table, 2).returncode == 0
    text = Path(table["data"]["train"][0])
    text.unlink()
    (store,) = json.loads((tmp_path / "run" / "data.json").read_text())["train"]
    manifest = Path(store["folder"]) / "manifest.json"
    about = json.loads(manifest.read_text())
    about["files"]["tokens.bin"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(about))
    assert Store.open(manifest.parent).fingerprint != store["fingerprint"]
    assert_refused(train(tmp_path, table, 4), f"{text} matches no file")


def test_a_folder_that_was_moved_goes_on(tmp_path: Path):
    table = tiny_run(tmp_path)
    assert train(tmp_path, table, 2).returncode == 0
    (tmp_path / "run").rename(tmp_path / "moved")
    done = train(tmp_path, table | {"run": str(tmp_path / "moved")}, 4)
    assert done.returncode == 0, done.stderr
    assert "resuming after step 2" in done.stderr
    assert not (tmp_path / "run").exists()
