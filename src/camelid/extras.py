"""Installation commands for the libraries of optional features, for messages."""

import json
import re
import shlex
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlparse

NAME = "camelid"


def install_hint(extra: str) -> str:
    """A pip command that installs the libraries of an extra of pyproject.toml.

    It uses the source from which camelid itself was installed: a local folder (perhaps editable), a local file, or a
    repository. The name of the package is never looked up in an index, where anybody may have registered it; without a
    record of the installation, the command names the libraries.
    """
    try:
        installed = metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        return f"Install the libraries of the extra `{extra}` in camelid's pyproject.toml."
    source = _source(json.loads(installed.read_text("direct_url.json") or "{}"), extra)
    return f"Run: pip install {source or ' '.join(_libraries(installed.requires or [], extra))}"


def installed_commit() -> str | None:
    """The commit from which camelid was installed, if it was installed from a repository."""
    try:
        record = json.loads(metadata.distribution(NAME).read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        return None
    return record.get("vcs_info", {}).get("commit_id")


def _source(record: dict, extra: str) -> str | None:
    """The requirement for pip of the same source with an extra; None if the source is unknown or no longer exists.

    The record is that of https://packaging.python.org/en/latest/specifications/direct-url/.
    """
    url = record.get("url", "")
    below = f"#subdirectory={record['subdirectory']}" if "subdirectory" in record else ""
    if (version := record.get("vcs_info")) is not None:
        return shlex.quote(f"{NAME}[{extra}] @ {version['vcs']}+{url}@{version['commit_id']}{below}")
    if not url.startswith("file:"):
        return shlex.quote(f"{NAME}[{extra}] @ {url}{below}") if url else None
    path = unquote(urlparse(url).path)
    if not Path(path).exists():
        return None
    if "dir_info" not in record:
        return shlex.quote(f"{NAME}[{extra}] @ {url}")
    editable = "--editable " if record["dir_info"].get("editable") else ""
    return editable + shlex.quote(f"{path}[{extra}]")


def _libraries(requires: list[str], extra: str) -> list[str]:
    """The requirements of an extra, without their markers."""
    marker = re.compile(rf"""\s*;\s*extra\s*==\s*['"]{re.escape(extra)}['"]\s*$""")
    return [shlex.quote(marker.sub("", text)) for text in requires if marker.search(text)]
