"""What an install brings and costs: declared dependencies, and a command line that starts at once."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from runs import TIMEOUT_S

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "camelid"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Where the name that is imported is not the name that is installed.
DISTRIBUTIONS = {
    "google": "protobuf",
    "jaxlib": "jax",
    "mlflow": "mlflow-skinny",
    "orbax": "orbax-checkpoint",
}
HEAVY = ("jax", "optax", "orbax", "torch", "transformers", "matplotlib")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", name)[0]).lower()


def third_party(tree: ast.AST, runs: bool = True) -> Iterator[tuple[str, bool]]:
    """Distributions that a file imports, and whether importing the file needs them."""
    for node in ast.iter_child_nodes(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"camelid"}:
            yield normal(DISTRIBUTIONS.get(name, name)), runs
        yield from third_party(node, runs and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.If))


def run(*arguments: str, env: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_import_is_a_declared_dependency():
    core = {normal(requirement) for requirement in PROJECT["dependencies"]}
    optional = PROJECT["optional-dependencies"].items()
    extras = {name: set(map(normal, requirements)) for name, requirements in optional if name != "dev"}
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE).as_posix()
        for name, runs in sorted(set(third_party(ast.parse(path.read_text())))):
            if name not in (core if runs else core.union(*extras.values())):
                way_out = "import it inside the function that needs it" if runs else "declare it in pyproject.toml"
                wrong.append(f"{place}: {name} is not in the core install; {way_out}")
    assert not wrong, "\n".join(wrong)


def test_every_extra_installs_something_that_is_imported():
    """Each library of an extra is imported by the code; those of the accelerators are plugins of JAX."""
    used = {name for path in SOURCE.rglob("*.py") for name, _ in third_party(ast.parse(path.read_text()))}
    for extra, requirements in PROJECT["optional-dependencies"].items():
        if extra not in ("dev", "cuda", "tpu", "llama-cpp"):  # the last one is for tests
            unused = set(map(normal, requirements)) - used - {"tensorboard"}  # which shows what tensorboardX writes
            assert not unused, (extra, unused)


@pytest.mark.parametrize("part", [".", "text", "data"])
def test_importing_it_does_not_import_jax(part: str, user_env: dict[str, str]):
    paths = sorted((SOURCE / part).rglob("*.py")) if part != "." else [SOURCE]
    names = [".".join(path.relative_to(SOURCE.parent).with_suffix("").parts) for path in paths]
    imports = [f"import {name.removesuffix('.__init__')}" for name in names]
    code = "\n".join(["import sys", *imports, "print(*sorted(sys.modules))"])
    assert not {"jax", "torch", "transformers"} & set(run("-c", code, env=user_env).split())


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_the_command_line_answers_without_importing_jax(option: str, user_env: dict[str, str]):
    code = f"""
import sys
from camelid.cli import main
sys.argv = ["camelid", {option!r}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
print("heavy:", *(name for name in {HEAVY!r} if name in sys.modules))
"""
    assert run("-c", code, env=user_env).splitlines()[-1].split() == ["heavy:"]


def test_the_version_is_the_one_of_pyproject(user_env: dict[str, str]):
    assert PROJECT["version"] in run("-m", "camelid", "--version", env=user_env).split()
    assert run("-c", "import camelid; print(camelid.__version__)", env=user_env).strip() == PROJECT["version"]
