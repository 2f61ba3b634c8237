"""Files of the user's in a folder that camelid writes to, and that they are left alone."""

from pathlib import Path

from runs import contents

NAMES = "notes.txt", ".hidden", "data/x.csv", "data/deep/model.safetensors", "other.safetensors", "a [1]*?.md"


def add_foreign(folder: Path) -> dict[str, bytes]:
    """Puts all kinds of files of the user's into a folder; returns what must be there afterwards."""
    before = set(contents(folder))
    for name in NAMES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"my {name}")
    (folder / "link").symlink_to("data")
    (folder / "empty").mkdir()
    return {name: content for name, content in contents(folder).items() if name not in before}


def assert_kept(folder: Path, foreign: dict[str, bytes]) -> None:
    found = contents(folder)
    assert {name: found.get(name) for name in foreign} == foreign
    assert (folder / "empty").is_dir()
