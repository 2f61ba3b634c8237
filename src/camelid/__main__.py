"""The process of the command `camelid`, also as `python -m camelid`."""

from camelid.interrupts import run_command


def main() -> None:
    """Runs the command of sys.argv and exits with its status."""
    run_command(_command)


def _command() -> None:
    from camelid.cli import main

    main()


if __name__ == "__main__":
    main()
