"""Overwriting replaces a checkpoint's own files, leaves those of others alone, and survives a kill at every moment."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import camelid
from camelid.checkpoint.compare import compare
from camelid.checkpoint.convert import convert
from camelid.checkpoint.files import check_manifest
from camelid.checkpoint.folder import complete_replacement, new_folder
from camelid.checkpoint.registry import open_checkpoint
from camelid.checkpoint.replacing import MANIFEST, OTHERS, REPLACEMENT_FILE, owned_files
from camelid.errors import UserError
from foreign import add_foreign, assert_kept
from runs import TIMEOUT_S, assert_refused, called, contents
from tiny import save_hf, tiny_config, tiny_params, transformers_twin


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers writes it, with a license."""
    config = tiny_config(head_dim=8, vocab_size=96)
    folder = tmp_path_factory.mktemp("replacing") / "model"
    save_hf(transformers_twin(config, tiny_params(config)), folder)
    (folder / "LICENSE").write_text("free")
    return folder


# What stays, and what goes ---------------------------------------------------------------


@pytest.mark.parametrize("first", ["hf", "meta", "mindspore", "megatron", "easylm", "llama2c", "gguf"])
def test_of_two_checkpoints_in_one_folder_the_second_and_foreign_files_are_left(
    model: Path, tmp_path: Path, first: str
):
    out = tmp_path / "out"
    sharded = {"tensor_parallel": 2} if first in ("meta", "mindspore", "megatron") else {}
    convert(model, out, to=first, shards=3 if first == "hf" else None, **sharded)
    foreign = add_foreign(out)
    convert(model, out, dtype="bfloat16", overwrite=True)
    assert_kept(out, foreign)
    convert(model, tmp_path / "alone", dtype="bfloat16")
    assert {name: content for name, content in contents(out).items() if name not in foreign} == contents(
        tmp_path / "alone"
    )
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"data", "link", "empty"}
    assert check_manifest(out) > 0
    assert {path.name for path in tmp_path.iterdir()} == {"out", "alone"}


def test_a_checkpoint_of_an_older_version_is_known_by_its_names(model: Path, tmp_path: Path):
    convert(model, tmp_path / "out", shards=3)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    del manifest[OTHERS]
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(manifest))
    foreign = add_foreign(tmp_path / "out")
    convert(model, tmp_path / "out", overwrite=True)
    assert_kept(tmp_path / "out", foreign)
    assert not list((tmp_path / "out").glob("model-*")) + list((tmp_path / "out").glob("*.index.json"))


def test_a_checkpoint_of_another_system_is_replaced_with_its_shards(model: Path, tmp_path: Path):
    """Of transformers: no manifest, two shards, and documents that may be the user's."""
    import transformers

    twin = transformers.AutoModelForCausalLM.from_pretrained(model)
    twin.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    (tmp_path / "out" / "README.md").write_text("my card")
    (tmp_path / "out" / "LICENSE").write_text("free")  # the same as that of the source
    foreign = add_foreign(tmp_path / "out")
    convert(model, tmp_path / "out", overwrite=True)
    assert_kept(tmp_path / "out", foreign | {"README.md": b"my card", "LICENSE": b"free"})
    assert [file.name for file in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
    owned = owned_files(tmp_path / "out")
    assert owned is not None
    assert "LICENSE" not in owned, "it was the user's before, and would be removed by the next overwriting"


@pytest.mark.parametrize(
    "name",
    """
    consolidated.00.pth pytorch_model.bin model-00001-of-00002.safetensors adapter_model.safetensors streaming_params
    model.bin pytorch_model.bin.index.json rank_0/model.ckpt
    """.split(),
)
@pytest.mark.parametrize("older", [False, True], ids=["of another system", "of an older version"])
def test_of_two_checkpoints_in_one_folder_the_second_is_in_the_way(model: Path, tmp_path: Path, name: str, older: bool):
    convert(model, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    (tmp_path / "out" / MANIFEST).unlink()
    if older:
        del manifest[OTHERS]
        (tmp_path / "out" / MANIFEST).write_text(json.dumps(manifest))
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("mine")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=f"holds files that camelid did not write.*{re.escape(name)}"):
        convert(model, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == before


def test_every_way_to_overwrite_keeps_foreign_files(model: Path, tmp_path: Path, stories: Path):
    """Python's save, both kinds of delta, and their application."""
    loaded = camelid.load(stories)
    loaded.save(tmp_path / "saved")
    commands = {
        "saved": lambda: loaded.save(tmp_path / "saved", overwrite=True, dtype="bfloat16"),
        **{
            kind: lambda kind=kind: called("delta", "make", model, tuned, tmp_path / kind, "--kind", kind, *more[kind])
            for kind in ("exact", "sum", "lora")
        },
        "applied": lambda: called("delta", "apply", model, tmp_path / "exact", tmp_path / "applied", "--overwrite"),
    }
    tuned = tmp_path / "tuned"
    more = {"exact": ["--overwrite"], "sum": ["--overwrite"], "lora": ["--rank", "2", "--overwrite"]}
    tensors = open_checkpoint(model)
    twin = transformers_twin(tensors.config, tiny_params(tensors.config, seed=5))
    save_hf(twin, tuned)
    for name, run in commands.items():
        if name != "saved":
            assert run().returncode == 0
        foreign = add_foreign(tmp_path / name)
        result = run()
        assert result is None or result.returncode == 0, result
        assert_kept(tmp_path / name, foreign)
    assert all(each.equal for each in compare(open_checkpoint(tmp_path / "applied"), open_checkpoint(tuned)))


# What is refused -------------------------------------------------------------------------


def project(folder: Path, config: str = "{}") -> dict[str, bytes]:
    """A folder that is not a checkpoint, though it has a file named config.json."""
    (folder / "data").mkdir(parents=True)
    (folder / "config.json").write_text(config)
    for name in ("a.txt", "b.txt", "data/x.csv", "src.py"):
        (folder / name).write_text("mine")
    return contents(folder)


@pytest.mark.parametrize("config", ["{}", "not JSON", '{"model_type": "llama"}', "[]"])
def test_a_folder_that_is_not_a_checkpoint_is_refused_with_a_list(model: Path, tmp_path: Path, config: str):
    before = project(tmp_path / "proj", config)
    result = called("convert", model, tmp_path / "proj", "--overwrite")
    assert_refused(result, "is not a checkpoint that can be replaced; it holds a.txt, b.txt, config.json and 2 more")
    assert contents(tmp_path / "proj") == before
    assert {path.name for path in tmp_path.iterdir()} == {"proj"}


def test_a_file_in_the_way_is_refused_and_stays_before_any_tensor_is_read(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    convert(model, tmp_path / "out")
    for name, way in {
        "tokenizer.json": "gguf",  # no name of the new files: not in the way
        "params.json": "meta",
        "consolidated.00.pth": "hf",  # another checkpoint's weights: which one would be read?
        "rank_0": "mindspore",
    }.items():
        (tmp_path / "out" / name).write_text("mine")
        before = contents(tmp_path / "out")
        options = {"tensor_parallel": 2} if way == "mindspore" else {}
        if way == "gguf":
            convert(model, tmp_path / "out", to=way, overwrite=True)
            assert (tmp_path / "out" / name).read_text() == "mine"
        else:
            with pytest.raises(UserError, match=f"camelid did not write, or that were changed since: .*{name}"):
                convert(model, tmp_path / "out", to=way, overwrite=True, **options)
            assert contents(tmp_path / "out") == before
        (tmp_path / "out" / name).unlink()


def test_a_file_that_the_user_changed_is_not_overwritten(model: Path, tmp_path: Path):
    convert(model, tmp_path / "out")
    (tmp_path / "out" / "LICENSE").write_text("free, as I say")
    before = contents(tmp_path / "out")
    assert_refused(called("convert", model, tmp_path / "out", "--overwrite"), "changed since: LICENSE")
    assert contents(tmp_path / "out") == before
    (tmp_path / "out" / "LICENSE").rename(tmp_path / "out" / "LICENSE.mine")
    convert(model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "LICENSE.mine").read_text() == "free, as I say"


@pytest.mark.parametrize("name", ["../outside", "/outside", "link/outside"])
def test_a_manifest_that_names_files_outside_its_folder_removes_none(model: Path, tmp_path: Path, name: str):
    (tmp_path / "outside").write_text("mine")
    convert(model, tmp_path / "out")
    (tmp_path / "out" / "link").symlink_to(tmp_path)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    manifest["files"][name.replace("/outside", f"{tmp_path}/outside") if name[0] == "/" else name] = {"tensors": {}}
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(manifest))
    convert(model, tmp_path / "out", overwrite=True)
    assert (tmp_path / "outside").read_text() == "mine"


def record(folder: Path, add: list[str], remove: list[str], *, inode: int | None = None) -> None:
    """Puts a record into a folder, by default one that was written there, beside new files in `.NAME.incomplete`."""
    new = folder.with_name(f".{folder.name}.incomplete")
    new.mkdir(exist_ok=True)
    (new / "a").write_text("new")
    path = folder / REPLACEMENT_FILE
    path.touch()
    inode = path.stat().st_ino if inode is None else inode
    path.write_text(json.dumps({"inode": inode, "add": add, "remove": remove}))


def everything(folder: Path) -> dict[str, bytes | str | None]:
    """All files, links and folders below a folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }


def assert_nobody_follows_the_record(model: Path, folder: Path, problem: str) -> None:
    """Whoever opens a folder or writes to it is refused, and nothing is changed."""
    root = folder.parent
    before = everything(root)
    for name, use in {
        "open": lambda: camelid.load(folder),
        "complete": lambda: complete_replacement(folder),
        "convert": lambda: convert(folder, root / "other"),
        "overwrite": lambda: convert(model, folder, overwrite=True),
    }.items():
        with pytest.raises(UserError, match=problem) as seen:
            use()
        assert REPLACEMENT_FILE in str(seen.value), name
        assert everything(root) == before, name


OUTSIDE = [
    "../precious/a.txt",
    "/precious/a.txt",
    "sub/../../precious/a.txt",
    "link/a.txt",
    "..",
    ".",
    "",
    "a\0b",
    "a/\udfff\ud800/b",
]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("which", ["add", "remove"])
def test_a_record_that_names_files_outside_its_folder_is_refused(model: Path, tmp_path: Path, which: str, name: str):
    """Even one that was written in its place, and for a file that is alone in its folder, which would go too."""
    convert(model, tmp_path / "out")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a.txt").write_text("mine")
    (tmp_path / "out" / "sub").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "precious")
    name = f"{tmp_path}{name}" if name.startswith("/") else name
    record(tmp_path / "out", **{"add": ["a"], "remove": [], which: ["a", name]})
    assert_nobody_follows_the_record(model, tmp_path / "out", "which is not in the folder")


def test_a_record_that_moves_files_from_where_a_link_leads_is_refused(model: Path, tmp_path: Path):
    convert(model, tmp_path / "out")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a.txt").write_text("mine")
    record(tmp_path / "out", ["link/a.txt"], [])
    (tmp_path / ".out.incomplete" / "link").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"names 'link/a.txt', which is not in .*\.out\.incomplete"):
        open_checkpoint(tmp_path / "out")
    assert (tmp_path / "precious" / "a.txt").read_text() == "mine"
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("inode", [0, -1, "1", [], 12345678901])
def test_a_record_that_came_with_a_folder_is_not_followed(model: Path, tmp_path: Path, inode: Any):
    """Names inside the folder are no proof: the user's own files may have come into it since."""
    convert(model, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    record(tmp_path / "out", ["a"], ["notes.txt", "config.json"], inode=inode)
    assert_nobody_follows_the_record(model, tmp_path / "out", "was not created in this folder")


def test_a_folder_that_was_copied_between_is_refused_and_can_be_mended_by_hand(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    interrupted(model, tmp_path / "here" / "out", monkeypatch)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    out = tmp_path / "there" / "out"
    assert_nobody_follows_the_record(model, out, r"move the new files, which are in .*, to their places yourself")
    shutil.copytree(out.with_name(".out.incomplete"), out, dirs_exist_ok=True)
    (out / REPLACEMENT_FILE).unlink()
    assert all(each.equal for each in compare(open_checkpoint(out), open_checkpoint(tmp_path / "here" / "out")))


def test_a_link_in_the_place_of_the_temporary_folder_is_refused(model: Path, tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a").write_text("mine")
    (tmp_path / ".out.incomplete").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"\.out\.incomplete is a symbolic link"):
        convert(model, tmp_path / "out")
    (tmp_path / ".out.incomplete").unlink()
    convert(model, tmp_path / "out")
    record(tmp_path / "out", ["a"], ["config.json"])
    shutil.rmtree(tmp_path / ".out.incomplete")
    (tmp_path / ".out.incomplete").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"\.out\.incomplete is a symbolic link"):
        open_checkpoint(tmp_path / "out")
    assert contents(tmp_path / "precious") == {"a": b"mine"}
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_refused_command_leaves_no_folders(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    assert_refused(called("convert", model, tmp_path / "a" / "b" / "out"), "0 bytes free")
    assert list(tmp_path.iterdir()) == []


# A kill at every moment ------------------------------------------------------------------

# Runs the replacement in a child that is killed before its n-th operation on the file system, for n = 0, 1, 2, ...
KILLED_AT = """
import os, shutil, signal, sys
from pathlib import Path
import camelid.checkpoint.folder as folder_module

WRITES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
root, count, live = Path(sys.argv[1]), 0, False

def hook(event, arguments):
    global count
    if live and event in WRITES and (event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)):
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

sys.addaudithook(hook)
at = 0
while True:
    place = root / str(at)
    shutil.copytree(root / "before", place, symlinks=True)
    child = os.fork()
    if not child:
        live = True
        with folder_module.new_folder(place / "out", 0, overwrite=True) as new:
            for file in (root / "new").iterdir():
                shutil.copyfile(file, new / file.name)
            (new / "rank_1").mkdir()
            (new / "rank_1" / "model.ckpt").write_text("new")
        live = False
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
    at += 1
print(at)
"""


def test_a_kill_at_every_moment_leaves_the_old_or_the_new_checkpoint_and_all_foreign_files(
    tmp_path: Path, user_env: dict[str, str]
):
    def write(folder: Path, word: str, *names: str) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(word)

    before = tmp_path / "before" / "out"
    before.parent.mkdir()
    with new_folder(before, 0) as folder:
        write(folder, "old", "config.json", "model-00001-of-00002.safetensors", "rank_0/model.ckpt", "LICENSE", "same")
    foreign = add_foreign(before)
    old = {name: content for name, content in contents(before).items() if name not in foreign}
    write(tmp_path / "new", "new", "config.json", "model.safetensors", "LICENSE")
    write(tmp_path / "new", "old", "same")
    words = [sys.executable, "-c", KILLED_AT, str(tmp_path)]
    env = user_env | {"PYTHONPATH": str(Path(camelid.__file__).parents[1])}  # the same code as in this process
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    last = int(done.stdout)
    assert last > 20, "operations on the file system"
    new = {name: content for name, content in contents(tmp_path / str(last) / "out").items() if name not in foreign}
    assert new.keys() == {"config.json", "model.safetensors", "LICENSE", "same", "rank_1/model.ckpt", MANIFEST}
    outcomes = []
    for at in range(last + 1):
        out = tmp_path / str(at) / "out"
        assert_kept(out, foreign)
        found = {name: content for name, content in contents(out).items() if name not in foreign}
        if REPLACEMENT_FILE in found:
            outcomes.append("between")
            # Another program that opens the folder finds no config.json, unless everything is in its place.
            assert (
                "config.json" not in found
                or {**new, REPLACEMENT_FILE: found[REPLACEMENT_FILE]} == found
                or old.items() <= found.items()
            )
            complete_replacement(out)
            assert {name: text for name, text in contents(out).items() if name not in foreign} == new
        else:
            outcomes.append("old" if found == old else "new")
            assert found in (old, new)
        assert_kept(out, foreign)
        # Whatever was left beside it is no obstacle.
        with new_folder(out, 0, overwrite=True) as folder:
            write(folder, "newer", "config.json")
        assert_kept(out, foreign)
        assert contents(out).keys() - foreign.keys() == {"config.json", MANIFEST}
        assert {path.name for path in out.parent.iterdir()} == {"out"}
    assert [word for i, word in enumerate(outcomes) if outcomes[i - 1 : i] != [word]] == ["old", "between", "new"]
    assert outcomes.count("between") > 8


def interrupted(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint whose replacement ended after the old files were removed and one new one was moved in."""
    convert(model, folder)
    with monkeypatch.context() as patch:
        rename, moved = Path.rename, []

        def failing(self: Path, target: Path) -> Path:
            if self.parent.name.endswith(".incomplete") and self.name != REPLACEMENT_FILE:
                moved.append(self)
                if len(moved) == 2:
                    raise OSError("the disk is gone")
            return rename(self, target)

        patch.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="the disk is gone"):
            convert(model, folder, dtype="bfloat16", overwrite=True)
    assert (folder / REPLACEMENT_FILE).is_file()
    assert not (folder / "config.json").exists()


def test_whoever_opens_a_checkpoint_completes_its_replacement(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    interrupted(model, tmp_path / "out", monkeypatch)
    assert set(open_checkpoint(tmp_path / "out").dtypes.values()) == {np.dtype("bfloat16")}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_replacement_that_cannot_be_completed_is_an_error_and_can_be_overwritten(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    interrupted(model, tmp_path / "out", monkeypatch)
    shutil.rmtree(tmp_path / ".out.incomplete")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert_refused(called("inspect", tmp_path / "out"), "was being replaced when the process was killed")
    convert(model, tmp_path / "out", overwrite=True)
    convert(model, tmp_path / "alone")
    assert contents(tmp_path / "out") == {**contents(tmp_path / "alone"), "notes.txt": b"mine"}


def test_a_name_of_the_greatest_length_is_written_and_overwritten(model: Path, tmp_path: Path):
    out = tmp_path / ("n" * 255)
    convert(model, out)
    convert(model, out, overwrite=True)
    assert [os.fspath(path.name) for path in tmp_path.iterdir()] == [out.name]


def test_a_folder_named_in_bytes_that_are_not_utf8_is_written_and_overwritten(model: Path, tmp_path: Path):
    out = Path(os.fsdecode(bytes(tmp_path) + b"/bad\xff"))
    convert(model, out)
    foreign = add_foreign(out)
    convert(model, out, overwrite=True)
    assert_kept(out, foreign)
    assert open_checkpoint(out).config == open_checkpoint(model).config
