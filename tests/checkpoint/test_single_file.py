"""A destination that ends in .gguf is one file, which appears whole or not at all."""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

import camelid
from camelid.checkpoint.checkpoint import ExportSpec
from camelid.checkpoint.convert import convert
from camelid.checkpoint.registry import open_checkpoint, write_checkpoint
from camelid.disk.locks import locked
from camelid.errors import UserError
from runs import command


def saving_of(source: Path) -> ExportSpec:
    checkpoint = open_checkpoint(source)
    return ExportSpec(checkpoint.config, checkpoint.dtypes, checkpoint.read_slice, checkpoint.companions)


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


WRITTEN = {"a.gguf", "a.gguf.manifest.json"}


@pytest.mark.parametrize("format", ["gguf", "gguf-q8_0", "gguf-q4_0"])
def test_it_holds_what_the_folder_holds_and_nothing_lies_beside_but_its_checksums(
    stories: Path, tmp_path: Path, format: str
):
    convert(stories, tmp_path / "one" / "a.gguf", to=format)
    assert names(tmp_path / "one") == WRITTEN
    convert(stories, tmp_path / "folder", to=format)
    assert {"model.gguf", "config.json", "tokenizer.json"} <= names(tmp_path / "folder")
    assert (tmp_path / "one" / "a.gguf").read_bytes() == (tmp_path / "folder" / "model.gguf").read_bytes()
    gguf.GGUFReader(tmp_path / "one" / "a.gguf")
    manifest = json.loads((tmp_path / "one" / "a.gguf.manifest.json").read_text())
    assert manifest["files"].keys() == {"a.gguf"}


def test_a_model_is_saved_as_one_file_too(stories: Path, tmp_path: Path):
    model = camelid.load(stories)
    model.save(tmp_path / "a.gguf", format="gguf")
    assert names(tmp_path) == WRITTEN
    tokens = np.array([[1, 403, 407, 261]], np.int32)
    again = camelid.load(tmp_path / "a.gguf")
    np.testing.assert_array_equal(again.logits(tokens), model.logits(tokens))
    assert (
        again.generate("Once upon", max_new_tokens=5)[0].text == model.generate("Once upon", max_new_tokens=5)[0].text
    )


def test_files_of_others_stay_and_an_existing_one_is_replaced_only_when_asked(stories: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text("mine")
    (tmp_path / "b.gguf").write_text("mine")
    (tmp_path / "a.gguf").write_text("GGUF, an old one")
    with pytest.raises(UserError, match=r"a\.gguf exists already"):
        convert(stories, tmp_path / "a.gguf", to="gguf")
    assert (tmp_path / "a.gguf").read_text() == "GGUF, an old one"
    convert(stories, tmp_path / "a.gguf", to="gguf", overwrite=True)
    assert open_checkpoint(tmp_path / "a.gguf").format == "gguf"
    assert names(tmp_path) == WRITTEN | {"config.json", "b.gguf"}
    assert (tmp_path / "config.json").read_text() == (tmp_path / "b.gguf").read_text() == "mine"


def test_a_failure_leaves_the_old_file_and_nothing_else(stories: Path, tmp_path: Path):
    (tmp_path / "a.gguf").write_text("GGUF, an old one")
    export = saving_of(stories)

    def source(path: str, layer: int | None, *rest):
        if layer == 3:
            raise OSError("the disk was taken out")
        return export.read_slice(path, layer, *rest)

    with pytest.raises(OSError, match="taken out"):
        write_checkpoint(tmp_path / "a.gguf", replace(export, read_slice=source), "gguf", overwrite=True)
    assert names(tmp_path) == {"a.gguf"}
    assert (tmp_path / "a.gguf").read_text() == "GGUF, an old one"


def test_what_was_finished_before_an_interruption_is_kept_by_resume(stories: Path, tmp_path: Path):
    whole, export = tmp_path / "whole" / "a.gguf", saving_of(stories)
    write_checkpoint(whole, export, "gguf")
    read: list[tuple] = []

    def counted(path: str, layer: int | None, *rest):
        read.append((path, layer))
        if interrupted and len(read) == 20:
            raise KeyboardInterrupt
        return export.read_slice(path, layer, *rest)

    saved = replace(export, read_slice=counted)
    interrupted = True
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "a.gguf", saved, "gguf", resume=True, workers=1)
    assert names(tmp_path) == {"whole", ".a.gguf.incomplete"}
    interrupted = False
    first, read[:] = len(read), []
    write_checkpoint(tmp_path / "a.gguf", saved, "gguf", resume=True, workers=1)
    assert len(read) == 47 - (first - 1)
    assert names(tmp_path) == WRITTEN | {"whole"}
    assert (tmp_path / "a.gguf").read_bytes() == whole.read_bytes()


def test_a_link_is_written_where_it_leads(stories: Path, tmp_path: Path):
    (tmp_path / "links").mkdir()
    (tmp_path / "real.gguf").write_text("GGUF, an old one")
    (tmp_path / "links" / "a.gguf").symlink_to(tmp_path / "real.gguf")
    convert(stories, tmp_path / "links" / "a.gguf", to="gguf", overwrite=True)
    assert names(tmp_path / "links") == {"a.gguf"}
    assert (tmp_path / "links" / "a.gguf").is_symlink()
    assert open_checkpoint(tmp_path / "real.gguf").format == "gguf"


def test_two_processes_do_not_write_the_same_file(stories: Path, tmp_path: Path):
    with (
        locked(tmp_path / ".a.gguf.incomplete"),
        pytest.raises(UserError, match=r"another process is writing .*/a\.gguf"),
    ):
        convert(stories, tmp_path / "a.gguf", to="gguf")


def test_a_file_is_not_a_folder_and_its_name_says_its_format(stories: Path, tmp_path: Path):
    (tmp_path / "a.gguf").mkdir()
    (tmp_path / "a.gguf" / "mine").write_text("")
    with pytest.raises(UserError, match=r"a\.gguf is a folder"):
        convert(stories, tmp_path / "a.gguf", to="gguf", overwrite=True)
    assert names(tmp_path / "a.gguf") == {"mine"}
    for format in ("hf", "meta", "llama2c"):
        with pytest.raises(UserError, match=f"name of a file of the format gguf, and the requested format is {format}"):
            convert(stories, tmp_path / "b.GGUF", to=format)
    assert names(tmp_path) == {"a.gguf"}


def test_the_command_writes_a_file_and_checks_its_sums(stories: Path, tmp_path: Path, user_env: dict[str, str]):
    written = command("convert", stories, "a.gguf", "--verify", cwd=tmp_path, env=user_env)
    assert written.returncode == 0, written.stderr
    assert "all tensors are equal" in written.stderr
    assert names(tmp_path) == WRITTEN
    content = bytearray((tmp_path / "a.gguf").read_bytes())
    content[-1000] ^= 1
    (tmp_path / "a.gguf").write_bytes(content)
    checked = command("convert", "a.gguf", "--check", cwd=tmp_path, env=user_env)
    assert checked.returncode != 0
    assert "differs from what was written: its checksum does not match" in checked.stderr


def test_a_file_of_another_kind_is_never_replaced(stories: Path, tmp_path: Path):
    destination = tmp_path / "notes.gguf"
    destination.write_text("mine")
    with pytest.raises(UserError, match="is not a GGUF file"):
        convert(stories, destination, to="gguf", overwrite=True)
    assert destination.read_text() == "mine"
    destination.unlink()
    other = tmp_path / "notes.gguf.manifest.json"
    other.write_text('{"mine": 1}')
    with pytest.raises(UserError, match="was not written by camelid"):
        convert(stories, destination, to="gguf")
    assert [path.name for path in tmp_path.iterdir()] == [other.name]
    assert other.read_text() == '{"mine": 1}'
