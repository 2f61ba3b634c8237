"""Plants each fault in a copy of src and runs the test that must notice it.

    python tests/mutations/run.py                 all of them; some minutes
    python tests/mutations/run.py blockwise rope  those with one of these words in their name or file

Ends with status 1 when a fault goes unnoticed.
"""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
sys.path.insert(0, str(TESTS))

from mutations.fault import Fault  # noqa: E402

# A file of faults belongs to one part of the code; a new file is found by its name.
MODULES = sorted(file.stem for file in Path(__file__).parent.glob("*faults.py") if not file.stem.startswith("test"))
FAULTS = tuple(f for module in MODULES for f in importlib.import_module(f"mutations.{module}").FAULTS)
JOBS = 2
# Fails the session where the tests did not see the copy: a fault would seem to go unnoticed, or to be noticed.
PLUGIN = """
def pytest_sessionfinish(session):
    import camelid
    assert camelid.__file__.startswith({copy!r}), camelid.__file__
"""


def planted(fault: Fault) -> str:
    """The text of the fault's file with the fault in it."""
    text = (ROOT / "src" / "camelid" / fault.file).read_text("utf-8")
    found = text.count(fault.text)
    assert found == 1, f"{fault.name}: {fault.file} has {found} times {fault.text!r}; bring tests/mutations up to date"
    return text.replace(fault.text, fault.instead)


def run_tests(tests: Iterable[str], fault: Fault | None = None) -> tuple[int, str]:
    """pytest's exit status and what it said, with the fault in a copy of src."""
    with tempfile.TemporaryDirectory(prefix="camelid-fault-") as folder:
        copy = Path(folder) / "src"
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        (Path(folder) / "sees_the_copy.py").write_text(PLUGIN.format(copy=str(copy)))
        if fault is not None:
            (copy / "camelid" / fault.file).write_text(planted(fault), "utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "sees_the_copy"]
        command += ["-o", f"pythonpath={copy} {TESTS}", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
        # The copy is for commands that the tests start.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([folder, str(copy)])}
        done = subprocess.run(
            [*command, *(str(TESTS / test) for test in tests)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    return done.returncode, done.stdout + done.stderr


def notice(fault: Fault) -> str | None:
    """What the fault's test says against it, None where it passes; raises where it could not run."""
    status, said = run_tests([fault.test], fault)
    if status not in (0, 1):
        raise RuntimeError(f"{fault.name}: pytest ended with {status}\n{said}")
    return None if status == 0 else next((line[2:].strip() for line in said.splitlines() if line[:2] == "E "), said)


def main(words: list[str]) -> int:
    chosen = [f for f in FAULTS if not words or any(word in f"{f.name} {f.file}" for word in words)]
    status, said = run_tests(dict.fromkeys(fault.test for fault in chosen))
    if status:
        print(said, "these tests fail without any fault", sep="\n", file=sys.stderr)
        return status

    def timed(fault: Fault) -> tuple[str | None, float]:
        start = time.monotonic()
        return notice(fault), time.monotonic() - start

    missed = 0
    with ThreadPoolExecutor(JOBS) as pool:
        for fault, (why, seconds) in zip(chosen, pool.map(timed, chosen), strict=True):
            missed += why is None
            print(f"{'MISSED' if why is None else 'caught'}  {seconds:4.0f} s  {fault.name}", flush=True)
            print(f"        {fault.test}\n        {(why or 'passed')[:100]}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
