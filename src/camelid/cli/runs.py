"""Commands that show training runs."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from camelid.cli.shared import note, print_json
from camelid.errors import UserError

if TYPE_CHECKING:
    from camelid.runs.listing import RunStatus


def runs(
    folder: Annotated[Positional[Path], arg(metavar="FOLDER", help="the folder of runs")] = Path("runs"),
    json: bool = False,
) -> None:
    """List the runs below a folder with their progress and last losses.

    camelid runs
    camelid runs experiments/ --json

    A run is running (a process of this machine trains it), finished, stopped (its command resumes it from the newest
    checkpoint), or without a checkpoint.

    Args:
        json: print one JSON object
    """
    from camelid.runs.listing import find_runs, read_status

    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder", "Name the folder in which recipes put their runs.")
    found = [read_status(run) for run in find_runs(folder)]
    if json:
        return print_json({"folder": str(folder), "runs": [_described(status, folder) for status in found]})
    if not found:
        return note(f"there is no run below {folder}")
    return _show([_described(status, folder) for status in found])


def plot(
    runs: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN", help="folders of runs")],
    out: Annotated[Path, arg(metavar="FILE.png")] = Path("losses.png"),
) -> None:
    """Draw the losses of several runs in one picture.

    camelid plot runs/adamw runs/lion
    camelid plot runs/* --out losses.png

    Args:
        out: the PNG to write; an existing one is replaced
    """
    from camelid.runs.file_names import METRICS
    from camelid.train.loggers import draw_losses, read_metrics

    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out} is not a .png", "The picture is a PNG: choose a name such as losses.png.")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out.absolute().parent} is not a folder", "Choose another --out.")
    for run in runs:
        if not (run / METRICS).is_file():
            raise UserError(f"{run} has no {METRICS}", "Name the folders of runs; `camelid runs` lists them.")
    draw_losses({str(run): read_metrics(run / METRICS) for run in runs}, out)
    note(f"losses {out}")


def _described(status: "RunStatus", root: Path) -> dict[str, Any]:
    """What `runs --json` prints of a run."""
    name = status.folder.relative_to(root)
    return {
        "name": str(name) if name.parts else root.name,
        "state": status.state,
        "step": status.step,
        "steps": status.steps,
        "loss": status.loss,
        "validation_loss": status.validation_loss,
        "changed": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(status.changed)),
    }


def _show(found: list[dict[str, Any]]) -> None:
    from camelid.tables import console, grid

    table = grid("run", "state", ">step", ">of", ">loss", ">validation", "last change")
    for run in found:
        losses = ("" if loss is None else f"{loss:.4f}" for loss in (run["loss"], run["validation_loss"]))
        steps = "" if run["steps"] is None else f"{run['steps']:,}"
        changed = run["changed"].replace("T", " ").replace("Z", " UTC")
        table.add_row(run["name"], run["state"], f"{run['step']:,}", steps, *losses, changed)
    console().print(table)
