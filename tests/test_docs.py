"""The documentation keeps its word: its commands run, its links lead somewhere, its subcommands exist.

A block with `<!-- run -->` above it is run; one that is not says why: `<!-- not run: reason -->`. All blocks of one
document are one story, told in one empty folder by one shell. Lines that start with "$ " are the commands, with what
they read up to the end of a here-document; the others are what they print.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from runs import called

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SHELLS = ("bash", "console", "sh", "shell")
DONE = "the end of all blocks"

FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>```+|~~~+) *(?P<language>\w*)(?P<rest>.*)$")
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
HERE = re.compile(r"<<-?'?(\w+)'?")
# `camelid train …` where a command can stand: at the start, or after a prompt, a variable, a pipe, && or python -m.
BEFORE = r"(?:^|[|&;])\s*(?:\$ +)?(?:\w+=\S* +)*(?:\S*python3? -m )?(?:\S*bin/)?"
COMMAND = re.compile(BEFORE + r"camelid +([a-z][a-z_-]*)", re.M)


class Block(NamedTuple):
    line: int
    language: str
    run: bool
    text: str


def parse(document: Path) -> tuple[list[Block], str]:
    """The fenced blocks of a document, and the document without them."""
    blocks, prose, inside = [], [], None
    lines = document.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        fence = FENCE.match(line)
        if inside is None and fence:
            wanted = lines[number - 2].strip() == "<!-- run -->" if number > 1 else False
            inside = number, fence, wanted or "run" in fence["rest"].split(), []
        elif inside and fence and fence["ticks"].startswith(inside[1]["ticks"]) and not fence["language"]:
            start, opening, run, body = inside
            blocks.append(Block(start, opening["language"], run, "\n".join(body)))
            inside = None
        elif inside:
            inside[3].append(line.removeprefix(inside[1]["indent"]))
        else:
            prose.append(line)
    assert inside is None, f"{document.name}:{inside and inside[0]}: this block never ends"
    return blocks, "\n".join(prose)


def commands(text: str) -> str:
    """The shell script in a block: its "$ " lines with what belongs to them, or all of it when it has none."""
    if not re.search(r"^\$ ", text, re.M):
        return text
    kept, goes_on, end = [], False, None
    for line in text.splitlines():
        if end is not None:
            kept.append(line)
            end = None if line == end else end
        elif goes_on or line.startswith("$ "):
            kept.append(line if goes_on else line.removeprefix("$ "))
            goes_on = line.endswith("\\")
            here = HERE.search(line)
            end = here and here[1]
    assert end is None, f"{end} never comes in {text!r}"
    return "\n".join(kept)


def script(document: Path, folder: Path) -> str:
    """One shell script for all the blocks of a document that ask to be run; it says DONE at its end."""
    steps = ["PS4='$ '", "set -exo pipefail"]
    for block in parse(document)[0]:
        if not block.run:
            continue
        where = f"{document.name}:{block.line}"
        assert block.language in (*SHELLS, "python"), f"{where}: nothing here can run {block.language!r}"
        step = commands(block.text)
        if block.language == "python":
            file = folder / f"{document.stem}_line_{block.line}.py"
            file.write_text(block.text)
            step = f"python {shlex.quote(str(file))}"
        if "CAMELID_ASSETS" in block.text and "CAMELID_ASSETS" not in os.environ:
            return "\n".join([*steps, "exit 75"])
        steps.append(f": {where}\n{step}")
    return "\n".join([*steps, f"echo {DONE}"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_commands_of_a_document_run(document: Path, tmp_path: Path, user_env: dict[str, str]):
    if not any(block.run for block in parse(document)[0]):
        return
    (work := tmp_path / "work").mkdir()
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL, "text": True}
    done = subprocess.run(["bash", "-c", script(document, tmp_path)], cwd=work, env=user_env, **output)
    if done.returncode == 75:
        pytest.skip("CAMELID_ASSETS is not set; what this document does with the assets was not run")
    if done.returncode or not done.stdout.endswith(f"{DONE}\n"):
        pytest.fail(f"{document.name} breaks off:\n{done.stdout[-4000:]}", pytrace=False)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document: Path):
    _, prose = parse(document)
    targets = {link.split("#")[0] for link in LINK.findall(re.sub(r"`[^`]*`", "", prose))}
    local = [target for target in targets if target and not re.match(r"[a-z]+:", target)]
    missing = [target for target in local if not (document.parent / target).exists()]
    assert not missing, f"{document.name} links to what is not there: {missing}"


def test_every_command_of_ours_is_run_or_says_why_not():
    silent = []
    for document in DOCUMENTS:
        lines = document.read_text().splitlines()
        for block in parse(document)[0]:
            told = block.line > 1 and lines[block.line - 2].startswith("<!-- not run: ")
            # The pages about other systems have a test of their own, which runs all.
            if COMMAND.search(commands(block.text)) and not (block.run or told or document.parent.name == "migrating"):
                silent.append(f"{document.name}:{block.line}")
    assert not silent, f"put <!-- run --> above {silent}"


def printed_subcommands() -> dict[str, str]:
    """Each subcommand of camelid that a document prints, with the first place that does."""
    found = {}
    for document in DOCUMENTS:
        blocks, prose = parse(document)
        code = [commands(block.text) for block in blocks if block.language in (*SHELLS, "", "text")]
        for text in [*code, *re.findall(r"`+([^`]+)`+", prose)]:
            for name in COMMAND.findall(text):
                found.setdefault(name, document.name)
    return found


def test_every_printed_subcommand_exists():
    help_text = called("--help").stdout
    listed = set(re.findall(r"^[^\w\n]*([a-z][a-z_-]*)\b", help_text, re.M))
    listed |= {name for names in re.findall(r"\{([^}\n]+)\}", help_text) for name in names.split(",")}
    unknown = {name: place for name, place in printed_subcommands().items() if name not in listed}
    assert not unknown, f"not among the subcommands of camelid --help: {unknown}"


def test_every_printed_make_target_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    texts = [document.read_text() for document in DOCUMENTS]
    printed = {name for text in texts for name in re.findall(r"(?:^|`|\$ )make ([a-z]+)\b", text, re.M)}
    assert printed <= targets, f"the Makefile has no {sorted(printed - targets)}"
