"""Paths and files as users give them: home folders, encodings, and what is not the file that its name says."""

import codecs
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from camelid.checkpoint.folder import new_folder
from camelid.checkpoint.registry import open_checkpoint
from camelid.cli.shared import model_config
from camelid.disk.json_files import read_json
from camelid.errors import UserError
from camelid.inputs import decode, expand_home, read_text
from camelid.text.tokenizer import load_tokenizer
from runs import called
from text.tiny import save_byte_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
PAGE = "<!doctype html>\n<html><title>Hugging Face</title>"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home of [somebody]"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


# Home folders ---------------------------------------------------------------------------


def test_a_leading_tilde_is_expanded_as_the_shell_does(home: Path):
    for path in ("~", "~/", "~/a b/c.txt", "~root/x", "~unknown-user/x", "a/~/b", "a~", "", "./~"):
        expected = subprocess.run(
            ["bash", "-c", f"printf %s {path.replace(' ', chr(92) + ' ')}"], stdout=subprocess.PIPE
        )
        assert expand_home(path) == expected.stdout.decode()
    assert expand_home("easylm::~/x") == f"easylm::{home}/x"
    assert expand_home("a/b::~/x") == "a/b::~/x"
    assert expand_home(Path("~/x\ny")) == f"{home}/x\ny"


def test_python_and_the_command_line_take_paths_below_home(home: Path, assets: Path):
    shutil.copytree(assets / "models" / "stories260K" / "hf", home / "m")
    assert open_checkpoint("~/m").folder == home / "m"
    assert open_checkpoint("hf::~/m").folder == home / "m"
    assert load_tokenizer("~/m").files == load_tokenizer(home / "m").files
    assert model_config("~/m") == open_checkpoint(home / "m").config
    with new_folder(Path("~/new"), 0) as folder:
        (folder / "x").write_text("x")
    assert (home / "new" / "x").is_file()
    (home / "a.txt").write_text("One day, Tim saw a dog.")
    for line in (
        "data prepare ~/a.txt --tokenizer=~/m --out=~/store",
        "convert ~/m ~/f16 --dtype=float16",
        "evaluate perplexity ~/m ~/a.txt --sequence-length 8",
    ):
        result = called(*line.split())
        assert result.returncode == 0, result.stderr
    assert (home / "store" / "tokens.bin").is_file()
    assert (home / "f16" / "config.json").is_file()
    assert not Path("~").exists()


# Encodings ------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_is_decoded_by_its_byte_order_mark(encoding: str, tmp_path: Path):
    text = "zwölf\n\U0001f600"
    assert decode(text.replace("\n", "\r\n").encode(encoding)) == text
    (tmp_path / "config.json").write_bytes('{"ä": "\U0001f600"}\r\n'.encode(encoding))
    assert read_json(tmp_path / "config.json") == {"ä": "\U0001f600"}


def test_text_of_no_known_encoding_is_named(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match="a is not utf-8 at byte 2"):
        read_text(tmp_path / "a")
    (tmp_path / "a").write_bytes(codecs.BOM_UTF16_LE + b"a")
    with pytest.raises(UserError, match="a is not utf-16 at byte"):
        read_text(tmp_path / "a")


def test_a_chat_template_and_its_configuration_may_have_windows_encodings(tmp_path: Path):
    folder = save_byte_tokenizer(tmp_path)
    template = "{% for m in messages %}\n{{ m.content }}é\n{% endfor %}"
    config = (folder / "tokenizer_config.json").read_text() if (folder / "tokenizer_config.json").exists() else "{}"
    for encoding in ("utf-8-sig", "utf-16"):
        (folder / "chat_template.jinja").write_bytes(template.replace("\n", "\r\n").encode(encoding))
        (folder / "tokenizer_config.json").write_bytes(config.encode(encoding))
        assert load_tokenizer(folder).chat_templates == {"default": template}


# What is not the file -------------------------------------------------------------------


def cases() -> dict[str, tuple[str, Callable[[Path], Any]]]:
    """By name: the file below the assets' model that is replaced, and what reads it."""
    return {
        "config.json": ("config.json", open_checkpoint),
        "model.safetensors": ("model.safetensors", open_checkpoint),
        "tokenizer.json": ("tokenizer.json", load_tokenizer),
        "tokenizer_config.json": ("tokenizer_config.json", load_tokenizer),
        "tokenizer.model": ("tokenizer.model", lambda folder: load_tokenizer(folder / "tokenizer.model")),
    }


@pytest.mark.parametrize("content", [POINTER, PAGE, "\ufeff" + PAGE], ids=["pointer", "page", "page with a mark"])
@pytest.mark.parametrize("name", cases())
def test_a_file_of_a_checkpoint_that_is_another_is_called_what_it_is(
    name: str, content: str, tmp_path: Path, assets: Path
):
    folder = tmp_path / "m"
    shutil.copytree(assets / "models" / "stories260K" / "hf", folder)
    file, read = cases()[name]
    (folder / file).write_text(content)
    what = "a Git LFS pointer, not the file itself\n.*git lfs pull" if content is POINTER else "a web page .*\nDownload"
    with pytest.raises(UserError, match=rf"{re.escape(file)} is {what}"):
        read(folder)


@pytest.mark.parametrize(
    "name",
    ["m.gguf", "pytorch_model.bin", "consolidated.00.pth", "streaming_params", "m.ckpt", "m.pickle", "stories15M.bin"],
)
def test_weights_of_any_format_that_are_a_pointer_are_called_one(name: str, tmp_path: Path):
    (tmp_path / name).write_text(POINTER)
    (tmp_path / "index.html").write_text(PAGE)
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=rf"{re.escape(name)} is a Git LFS pointer"):
            open_checkpoint(place)


def test_a_pointer_that_is_not_read_is_no_fault(tmp_path: Path, assets: Path):
    folder = tmp_path / "m"
    shutil.copytree(assets / "models" / "stories260K" / "hf", folder)
    (folder / "pytorch_model.bin").write_text(POINTER)
    (folder / "README.md").write_text("<html>")
    assert open_checkpoint(folder).config == open_checkpoint(assets / "models" / "stories260K" / "hf").config
