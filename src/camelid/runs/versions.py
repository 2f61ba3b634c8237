"""versions.json in the folder of a run: with which software and on which devices it was trained."""

import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

from camelid import __version__
from camelid.disk.atomic import write_atomically
from camelid.extras import installed_commit
from camelid.parallel.hosts import is_main
from camelid.runs.file_names import VERSIONS


def record_versions(folder: Path, step: int) -> None:
    """Adds what `current_versions` returns to versions.json if it has changed since an earlier start.

    `step` is the number of steps that were made before this start.
    """
    if not is_main():
        return
    file, now = folder / VERSIONS, current_versions()
    starts = json.loads(file.read_text("utf-8")) if step and file.is_file() else []
    kept = [start for start in starts if start["after_step"] <= step]
    if not kept or {**kept[-1], "after_step": 0} != {**now, "after_step": 0}:
        kept.append({"after_step": step, **now})
    write_atomically(file, json.dumps(kept, indent=1) + "\n")


def current_versions() -> dict[str, Any]:
    """The versions of camelid, its git commit if it is known, JAX and Python; the kind and the number of devices."""
    return {
        "camelid": __version__,
        "commit": installed_commit() or _commit(Path(__file__)),
        **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "optax", "orbax-checkpoint")},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def _commit(file: Path) -> str | None:
    """The commit of the git repository that a file is tracked in, with `-dirty` if files in it were changed."""
    git = ["git", "-C", str(file.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", file.name], capture_output=True, check=True, timeout=10)
        told = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            check=True,
            timeout=10,
            text=True,
        )
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        return None
    return told.stdout.strip()
