"""Imports point down. Every import counts: at the top, inside a function, under TYPE_CHECKING, by import_module."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "src" / "camelid"

# Low to high: what each part may import. `data.rows.batch` is that module alone; * is all parts above it.
# `errors` is for everybody, and so is `camelid.__version__`; the other public names are for users of the package.
MAY_IMPORT = {
    "errors": "",
    "inputs": "",
    "recipes": "",
    "extras": "",
    "tables": "",
    "interrupts": "",
    "huge_pages": "",
    "disk": "inputs interrupts",
    "parallel": "disk interrupts",
    "text": "inputs",
    "model": "parallel",
    "data": "text disk inputs extras interrupts",
    "generate": "model parallel",
    "checkpoint": "text model parallel disk inputs interrupts",
    "train": "model parallel data.rows.batch checkpoint.state.orbax_state disk extras",
    "evaluate": "generate text checkpoint model parallel data.rows.batch",
    "completion": "text generate",
    "api": "completion text generate checkpoint model parallel inputs interrupts",
    "runs": "*",
    "describe": "runs train checkpoint model parallel disk inputs tables",
    "trainer": "*",
    "demo": "*",
    "cli": "*",
    "__main__": "*",
    "__init__": "*",
}
NEVER_NAMES_JAX = ("text", "data")
# `camelid --help` must answer at once, so neither these nor what they import may import anything slow at the top.
FAST = ("camelid", "camelid.cli", "camelid.runs.recipe")
SLOW = {"jax", "jaxlib", "numpy", "optax", "orbax", "torch", "transformers"}


@cache
def imports(path: Path) -> list[tuple[int, str, bool]]:
    """Each import of a file: its line, the full dotted name, and whether importing the file runs it."""
    package = ("camelid", *path.relative_to(SOURCE).parts[:-1])

    def visit(node: ast.AST, runs: bool) -> Iterator[tuple[int, str, bool]]:
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name, runs) for alias in node.names)
            case ast.ImportFrom():
                base = [*package[: len(package) + 1 - node.level]] if node.level else []
                base += [node.module] if node.module else []
                yield from ((node.lineno, ".".join([*base, alias.name]), runs) for alias in node.names)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(str(target)), *_]):
                if name in ("import_module", "__import__"):
                    yield node.lineno, target, runs
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                runs = False
            case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                runs = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, runs)

    return list(visit(ast.parse(path.read_text()), True))


def files() -> Iterator[tuple[str, Path]]:
    """Every source file, with the part of the house it belongs to."""
    for path in sorted(SOURCE.rglob("*.py")):
        yield path.relative_to(SOURCE).parts[0].removesuffix(".py"), path


def allowed(part: str, target: str) -> bool:
    rows = list(MAY_IMPORT)
    granted = rows[: rows.index(part)] if MAY_IMPORT[part] == "*" else MAY_IMPORT[part].split()
    return any(f"{target}.".startswith(f"camelid.{name}.") for name in ["__version__", "errors", part, *granted])


def test_every_part_has_a_place_in_the_table():
    unplaced = sorted({part for part, _ in files()} - MAY_IMPORT.keys())
    assert not unplaced, f"say in MAY_IMPORT what these may import: {unplaced}"


def test_imports_point_down():
    wrong = [
        f"{path.relative_to(SOURCE.parent)}:{line}: {part} may not import {target}"
        for part, path in files()
        for line, target, _ in imports(path)
        if target.split(".")[0] == "camelid" and part in MAY_IMPORT and not allowed(part, target)
    ]
    assert not wrong, "\n".join(wrong)


def test_text_and_data_never_name_jax():
    wrong = [
        f"{path.relative_to(SOURCE.parent)}:{line}: {target}"
        for part, path in files()
        for line, target, _ in imports(path)
        if part in NEVER_NAMES_JAX and target.split(".")[0] in ("jax", "jaxlib")
    ]
    assert not wrong, "\n".join(wrong)


def test_the_command_line_starts_without_slow_imports():
    modules = {".".join(("camelid", *path.relative_to(SOURCE).with_suffix("").parts)): path for _, path in files()}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    wrong, seen, queue = [], set(), [name for name in FAST if name in modules]
    while queue:
        if (name := queue.pop()) in seen:
            continue
        seen.add(name)
        for line, target, runs in imports(modules[name]):
            words = target.split(".")
            if runs and words[0] in SLOW:
                wrong.append(f"{name}, line {line}: import {target} inside the function that needs it")
            if runs and words[0] == "camelid":  # importing a.b.c runs a and a.b first
                queue += [m for end in range(len(words)) if (m := ".".join(words[: end + 1])) in modules]
    assert not wrong, "\n".join(wrong)
