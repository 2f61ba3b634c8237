"""Renders what a command prints into an SVG:  python docs/images/render.py OUT.svg COMMAND...

The command runs in the current folder, as in a terminal of 110 columns with colors.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

COLUMNS = 110


def main() -> None:
    out, *command = sys.argv[1:]
    env = os.environ | {"FORCE_COLOR": "1", "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    printed = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text(f"$ {shlex.join(command)}\n", style="bold"))
    console.print(Text.from_ansi(printed))
    Path(out).write_text(console.export_svg(title="camelid"))


if __name__ == "__main__":
    main()
