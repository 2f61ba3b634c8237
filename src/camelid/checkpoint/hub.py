"""Finds a checkpoint: a local folder, or a repository of the Hugging Face Hub, which is downloaded into its cache."""

import json
import re
from collections.abc import Callable, Iterable
from glob import escape
from pathlib import Path
from typing import Any

from camelid.checkpoint.checkpoint import COMPANIONS
from camelid.errors import UserError
from camelid.inputs import expand_home

NAME = re.compile(r"(?P<repo>\w[\w.-]*/[\w.-]+)(@(?P<revision>\S+))?")
FORMS = ("model.safetensors", "pytorch_model.bin")
"""files of weights, in the order of preference; each may also be shards that an index lists"""
UNREACHABLE = ("ConnectError", "ConnectTimeout")
"""names of the errors of a connection; the module of their classes depends on the version of huggingface_hub"""
ERROR_NUMBER = re.compile(r"^\[Errno -?\d+\] ")
ADAPTER, ADAPTER_FORMS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")


def find_checkpoint_folder(path: str | Path, inspect: Callable[[Path], object] = lambda folder: None) -> Path:
    """The folder of a checkpoint or an adapter, given its path or its Hub name, `org/name` or `org/name@revision`.

    `inspect` is called with a downloaded folder before the weights are downloaded, and may raise UserError to prevent
    that. Raises UserError if there is no such checkpoint, or if the Hub cannot be reached.
    """
    folder = Path(expand_home(path))
    if not folder.exists():
        name = NAME.fullmatch(str(path))
        if name is None:
            raise UserError(
                f"{folder} does not exist", "Give a checkpoint's folder, or a name on the Hugging Face Hub."
            )
        folder = _download(name["repo"], name["revision"], inspect)
    if not any((folder / name).is_file() for name in ("config.json", ADAPTER)):
        raise UserError(f"{path} has no config.json", "Give the folder or the Hub name of a Hugging Face checkpoint.")
    return folder


def with_revision(name: str, revision: str | None) -> str:
    """A name on the Hub with its revision, as `find_checkpoint_folder` reads it."""
    return f"{name}@{revision}" if revision else name


def split_revision(name: str) -> tuple[str, str | None]:
    """What `with_revision` joined; a folder that exists has no revision."""
    found = None if Path(expand_home(name)).exists() else NAME.fullmatch(name)
    return (name, None) if found is None else (found["repo"], found["revision"])


def _download(repo: str, revision: str | None, inspect: Callable[[Path], object]) -> Path:
    """Downloads a snapshot with one form of the weights, which come last: a folder that has them is complete."""
    folder = _snapshot(repo, revision, COMPANIONS, quiet=True)
    commit = folder.name  # the following downloads are of this commit, even if the branch moves
    if (folder / ADAPTER).is_file():
        any(_fetched(form, folder, repo, commit) for form in ADAPTER_FORMS)  # the first that exists
    if not (folder / "config.json").is_file():
        return folder
    inspect(folder)
    for form in FORMS:
        if _fetched(form, folder, repo, commit):
            break
        index = f"{form}.index.json"
        _snapshot(repo, commit, [index], quiet=True)
        files = _shards(folder / index)
        if not all((folder / name).is_file() for name in files):
            _snapshot(repo, commit, map(escape, files))
        if files:
            break
    return folder


def _fetched(name: str, folder: Path, repo: str, commit: str) -> bool:
    """Downloads a file unless it is there already; returns whether the repository has it."""
    if not (folder / name).is_file():
        _snapshot(repo, commit, [name])
    return (folder / name).is_file()


def _shards(index: Path) -> list[str]:
    """The files that an index lists; none if it does not exist, or is damaged, which its reader reports."""
    try:
        return sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return []


def _snapshot(repo: str, revision: str | None, wanted: Iterable[str], *, quiet: bool = False) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options | {"disable": quiet or None})  # None: shown on a terminal

    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                allow_patterns=["config.json", ADAPTER, *wanted],  # the library warns where nothing matches
                ignore_patterns="*/*",  # the library's * does not stop at a /
                tqdm_class=Bar,
            )
        )
    except Exception as error:  # errors of its HTTP client, of Xet and of the disk are not wrapped
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise _refusal(repo, revision, error) from error


def _refusal(repo: str, revision: str | None, error: BaseException) -> UserError:
    from huggingface_hub import constants, errors

    # If the Hub fails, the library looks into its cache, and reports that; the failure of the Hub is the cause.
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    page = f"{constants.ENDPOINT}/{repo}"
    match error:
        case errors.OfflineModeIsEnabled():
            why = f"offline mode finds no complete copy of it in {constants.HF_HUB_CACHE}"
            advice = "Open it once with a network, and without HF_HUB_OFFLINE."
        case errors.GatedRepoError():
            why = "the Hub gives it only to those who have accepted its license"
            advice = f"Accept it on {page}, and set HF_TOKEN to a token of the same account."
        case errors.RepositoryNotFoundError():
            why = "the Hub shows you no such model"
            advice = "Check the name; if it is private or gated, set HF_TOKEN to a token that may read it."
        case errors.RevisionNotFoundError():
            why, advice = f"on the Hub it has no revision {revision}", f"Its branches and tags are on {page}."
        case errors.HfHubHTTPError() if error.response.status_code in (401, 403):
            why = f"the Hub refused it: {_first_line(error)}"
            advice = f"Set HF_TOKEN to a valid token that may read {page}."
        case _ if type(error).__name__ in UNREACHABLE:
            why = f"the Hub cannot be reached: {ERROR_NUMBER.sub('', _first_line(error))}"
            advice = (
                "Check the path. If it is a name on the Hub, check the network; what was downloaded before opens "
                "without one."
            )
        case _:
            why = f"the Hub did not give it: {_first_line(error)}"
            advice = "Check the name and the network, and try again; what was downloaded before opens without one."
    return UserError(f"{repo} is not a local folder, and {why}", advice)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
