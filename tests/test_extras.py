"""What a message says to install is what the user installed, and never a name that anybody could take."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from camelid.extras import install_hint

REQUIRES = [
    "jax>=0.10.2",
    "wandb<1,>=0.22; extra == 'wandb'",
    'tensorboardX<3,>=2.6.2; extra == "tensorboard"',
    "tensorboard; extra == 'tensorboard'",
]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    def install(record: dict[str, Any] | None) -> None:
        class Distribution:
            requires = REQUIRES

            def read_text(self, name: str) -> str | None:
                return json.dumps(record) if record is not None and name == "direct_url.json" else None

        monkeypatch.setattr("importlib.metadata.distribution", lambda name: Distribution())

    return install


def words(hint: str) -> list[str]:
    first, *rest = shlex.split(hint.removeprefix("Run: "))
    assert [first, rest[0]] == ["pip", "install"]
    return rest[1:]


def test_a_local_folder_is_named_with_its_path(installed, tmp_path: Path):
    folder = tmp_path / "a folder's"
    folder.mkdir()
    url = folder.as_uri()
    installed({"url": url, "dir_info": {"editable": True}})
    assert words(install_hint("wandb")) == ["--editable", f"{folder}[wandb]"]
    installed({"url": url, "dir_info": {}})
    assert words(install_hint("wandb")) == [f"{folder}[wandb]"]
    folder.rmdir()
    assert words(install_hint("wandb")) == ["wandb<1,>=0.22"]


def test_a_repository_is_named_at_its_commit(installed):
    record = {
        "url": "https://example.org/x.git",
        "vcs_info": {"vcs": "git", "commit_id": "abc", "requested_revision": "v1"},
    }
    installed(record)
    assert words(install_hint("data")) == ["camelid[data] @ git+https://example.org/x.git@abc"]
    installed(record | {"subdirectory": "python"})
    assert words(install_hint("data")) == ["camelid[data] @ git+https://example.org/x.git@abc#subdirectory=python"]


def test_a_wheel_is_named_by_its_address(installed, tmp_path: Path):
    wheel = tmp_path / "camelid-0.1.0-py3-none-any.whl"
    wheel.touch()
    installed({"url": wheel.as_uri(), "archive_info": {}})
    assert words(install_hint("wandb")) == [f"camelid[wandb] @ {wheel.as_uri()}"]
    installed({"url": "https://example.org/camelid.whl", "archive_info": {"hash": "sha256=0"}})
    assert words(install_hint("wandb")) == ["camelid[wandb] @ https://example.org/camelid.whl"]


def test_without_a_record_the_libraries_are_named(installed):
    installed(None)  # from an index, or by something else than pip
    assert words(install_hint("wandb")) == ["wandb<1,>=0.22"]
    assert words(install_hint("tensorboard")) == ["tensorboardX<3,>=2.6.2", "tensorboard"]


def test_this_installation_names_the_libraries_of_every_extra():
    for extra in ("data", "wandb", "tensorboard"):
        assert extra in install_hint(extra) or "pyarrow" in install_hint(extra)


def test_no_message_of_the_code_names_the_package_in_an_index():
    source = Path(__file__).parent.parent / "src" / "camelid"
    for file in source.rglob("*.py"):
        assert "pip install 'camelid" not in file.read_text(), file
