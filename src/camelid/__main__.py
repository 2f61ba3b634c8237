"""The entry point of the command `camelid` and of `python -m camelid`."""

import sys

from camelid.huge_pages import use_huge_pages
from camelid.interrupts import run_command


def main() -> None:
    """Runs the command in `sys.argv` and exits with its status."""
    use_huge_pages(sys.argv[1:])
    run_command(_command)


def _command() -> None:
    from camelid.cli import main

    main()


if __name__ == "__main__":
    main()
