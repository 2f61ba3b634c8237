"""`camelid data prepare` and `camelid data inspect`: what they make, tell and show, and what they refuse."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from camelid.data import report
from camelid.data.config import Source, SourceOptions
from camelid.data.preparation.store import Store
from camelid.data.rows.loader import Loader
from camelid.recipes import path_of
from camelid.runs.notes import silent_row_notes
from camelid.runs.recipe import read_recipe
from camelid.text.tokenizer import load_tokenizer
from runs import assert_refused, called, write_recipe_file
from text.tiny import save_byte_tokenizer

ESCAPE = "\x1b"
CHAT = [{"from": "human", "value": "Say it."}, {"from": "gpt", "value": "You say ASSISTANT: and then you speak."}]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """One id for every byte; 256 begins a text and 257 ends it."""
    return save_byte_tokenizer(tmp_path / "tokenizer")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepared(*arguments: object) -> dict[str, Any]:
    done = called("data", "prepare", *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


def inspected(*arguments: object) -> dict[str, Any]:
    done = called("data", "inspect", *arguments, "--json")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return json.loads(done.stdout)


# prepare --------------------------------------------------------------------------------


def test_help_describes_every_option_of_a_source():
    shown = called("data", "prepare", "--help").stdout
    words = " ".join(word for word in shown.split() if word != "│")
    assert {field.name for field in dataclasses.fields(Source)} == {
        "files",
        "weight",
        "name",
        *(field.name for field in dataclasses.fields(SourceOptions)),
    }
    for field in dataclasses.fields(SourceOptions):
        option = f"--{field.name.replace('_', '-')} ".replace("--add-eos", "--no-add-eos")
        assert option in words, field.name
    assert "fields: alternatively, the key under which each record holds its own list of fields" in words
    assert "--weight" not in words


@pytest.mark.parametrize(
    ("kind", "row", "advice"),
    [
        ("text", {"messages": []}, "Set --kind chat."),
        (
            "chat",
            {"question": "q", "answer": "a"},
            "Set --kind fields and --fields '[question],answer', or --kind gsm8k.",
        ),
    ],
)
def test_advice_is_in_the_options_of_the_command(kind: str, row: dict, advice: str, tokenizer: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", [row])
    options = ["--template", "chatml"] if kind == "chat" else []
    done = called("data", "prepare", rows, "--kind", kind, *options, "--tokenizer", tokenizer, "--out", "store")
    assert done.stderr.splitlines()[-1].strip() == advice


@pytest.mark.parametrize(
    "options",
    [
        {"text_key": "body", "split": "marker:###", "clean": "wikitext", "add_bos": True, "max_unreadable": 0.5},
        {"text_key": "body", "add_bos": False, "add_eos": False},
        {"kind": "fields", "fields": "body", "prepend_text": "Read: "},
        {"kind": "fields", "fields_from_example": "body"},
        {"kind": "chat", "template": "chatml", "loss": "all"},
        {"kind": "chat", "compat": "mindformers"},
    ],
    ids=str,
)
def test_options_reach_the_source(options: dict[str, Any], tokenizer: Path, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"body": "body", "conversations": CHAT}])
    words = [rows, "--tokenizer", tokenizer, "--out", "store"]
    for name, value in options.items():
        option = f"--{name.replace('_', '-')}"
        words += ["--no-add-eos"] if name == "add_eos" else [option, value]
    if "compat" in options:
        words += ["--sequence-length", 64]
    prepared(*words)
    manifest = Store.open("store").manifest["prepared"]["options"]
    expected = dataclasses.asdict(Source(files=(str(rows),), **options)) | {"files": [str(rows)]}
    del expected["name"]  # which is of no use without a recipe
    assert manifest["sources"] == [expected]
    assert manifest["sequence_length"] == (64 if "compat" in options else None)


@pytest.mark.parametrize(
    ("kind", "template", "file", "documents"),
    [
        ("instruct", "alpaca", "instruct/rasbt-instruction-data.json", 1100),
        ("chat", "vicuna_v1.1", "chat/dummy_conversation.json", 500),
        ("gsm8k", None, "gsm8k/test.jsonl", 1319),
    ],
)
def test_real_rows_are_prepared_with_none_left_out(
    kind: str, template: str | None, file: str, documents: int, assets: Path, stories: Path
):
    options = ["--template", template] if template else []
    told = prepared(assets / "data" / file, "--kind", kind, *options, "--tokenizer", stories, "--out", "store")
    store = Store.open("store")
    assert (told["documents"], told["rows_read"]) == (store.num_documents, documents)
    assert told["documents"] == documents
    assert (told["unreadable"], told["empty"], told["documents_without_loss"]["count"]) == (0, 0, 0)
    assert told["tokens"] == store.num_tokens
    assert 0.1 < told["with_loss"] / told["tokens"] < 0.6
    assert told["bytes"] == sum((store.folder / name).stat().st_size for name in store.manifest["files"])
    lost = told["mindformers"]
    assert lost == (
        {"sequence_length": 2048, "conversations": 500, "lost": 0, "refused": 0} if kind == "chat" else None
    )


def test_the_same_again_is_there_already_and_other_options_are_refused(tokenizer: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    words = ["data", "prepare", "a.txt", "--tokenizer", tokenizer, "--out", "store", "--split"]
    first = called(*words, "line")
    assert (first.returncode, first.stderr) == (0, "")
    assert "documents  2 of 5 tokens\n" in _unpadded(first.stdout)
    assert "tokens     10; 8 with loss (80.0%)" in first.stdout
    assert "tokens/s" in first.stdout
    again = called(*words, "line")
    assert again.stdout.splitlines()[:4] == first.stdout.splitlines()[:4]
    assert "The store exists already" in again.stdout
    assert "tokens/s" not in again.stdout
    assert_refused(called(*words, "blank_line"), "store was prepared before")
    assert called(*words, "file", "--overwrite").returncode == 0
    assert Store.open("store").num_documents == 1


def test_rows_that_were_left_out_are_named(tokenizer: Path, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\nbroken \x1b[31m\n{"text": 5}\n{"text": "well"}\n')
    words = ["data", "prepare", "a.jsonl", "--tokenizer", tokenizer, "--out", "store"]
    assert_refused(called(*words), "a.jsonl, line 2")
    done = called(*words, "--max-unreadable", 0.5)
    assert done.returncode == 0
    assert "unreadable  2 of 4 records" in _unpadded(done.stdout)
    assert "a.jsonl, line 2" in done.stdout
    assert "a.jsonl, line 3" in done.stdout
    assert ESCAPE not in done.stdout
    told = prepared(*words[2:], "--max-unreadable", 0.5)
    assert (told["unreadable"], len(told["problems"]), told["tokens_per_second"]) == (2, 2, None)


def test_what_mindformers_would_lose_is_said(tokenizer: Path, tmp_path: Path):
    fine = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello."}]
    other = {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]}
    rows = [{"conversations": CHAT}, {"conversations": fine}, {"conversations": CHAT}, other]
    write_rows(tmp_path / "a.jsonl", rows)
    words = ["a.jsonl", "--kind", "chat", "--tokenizer", tokenizer]
    done = called("data", "prepare", *words, "--template", "vicuna_v1.1", "--out", "right")
    assert "excludes 2 of 3 conversations at 2,048 tokens; it cannot read 1 more" in done.stdout
    assert Store.open("right").num_documents == 4
    assert prepared(*words, "--template", "chatml", "--out", "other")["mindformers"] is None
    write_rows(tmp_path / "a.jsonl", rows[:3])
    told = prepared(*words, "--compat", "mindformers", "--sequence-length", 300, "--out", "faults")
    assert told["mindformers"] == {"sequence_length": 300, "conversations": 3, "lost": 2, "refused": 0}
    assert told["documents_without_loss"] == {"count": 2, "first": [0, 2]}


def test_documents_are_held_out(tokenizer: Path, tmp_path: Path):
    write_rows(tmp_path / "a.jsonl", [{"text": f"text {n}"} for n in range(40)])
    words = ["a.jsonl", "--tokenizer", tokenizer, "--validation-fraction", 0.25, "--out"]
    told = prepared(*words, "store", "--seed", 3)
    assert (told["documents"], told["held_out"]["documents"]) == (30, 10)
    assert Store.open("store/validation").num_tokens == told["held_out"]["tokens"]
    prepared(*words, "other", "--seed", 4)
    assert Store.open("store").fingerprint != Store.open("other").fingerprint


@pytest.mark.parametrize(("asked", "used"), [(1, 0), (3, 3)])
def test_one_worker_is_this_process(asked: int, used: int, tokenizer: Path, monkeypatch: pytest.MonkeyPatch):
    from camelid.data.preparation import prepare as module

    seen = []
    prepare = module.prepare
    monkeypatch.setattr(module, "prepare", lambda *a, workers, **b: seen.append(workers) or prepare(*a, workers=0, **b))
    Path("a.txt").write_text("text")
    prepared("a.txt", "--tokenizer", tokenizer, "--out", "store", "--workers", asked)
    assert seen == [used]


def test_the_speed_is_of_what_this_process_did(tokenizer: Path, monkeypatch: pytest.MonkeyPatch):
    from camelid.data.preparation import prepare as module

    prepare = module.prepare

    def resumed(*arguments: Any, progress: Any, **options: Any) -> Store:
        progress(3, 4)  # so much a killed process had done
        return prepare(*arguments, progress=progress, **options)

    monkeypatch.setattr(module, "prepare", resumed)
    Path("a.txt").write_text("text" * 100)
    told = prepared("a.txt", "--tokenizer", tokenizer, "--out", "store")
    assert told["tokens_per_second"] * told["seconds"] == pytest.approx(told["tokens"] / 4)


def test_help_has_examples():
    for name in ("data prepare", "data inspect"):
        done = called(*name.split(), "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count(f"camelid {name} ") >= 3
        assert f"\n  {name} " in called("--help").stdout


@pytest.mark.parametrize(
    ("options", "about"),
    [
        (["--sequence-length", "9"], "--sequence-length applies to --compat mindformers"),
        (["--compat", "mindformers"], "--compat mindformers needs a --sequence-length"),
        (["--compat", "mindformers", "--sequence-length", "0"], "--sequence-length 0"),
        (["--kind", "chat", "--split", "line"], "--split line does not apply to --kind chat"),
        (["--workers", "0"], "--workers 0"),
        (["--validation-fraction", "1"], "--validation-fraction 1.0"),
        (["--seed", "-1"], "--seed -1"),
        (["--out", "full"], "full holds something other than a store"),
        (["--tokenizer", "full"], "no tokenizer: looked for full"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_without_a_meaning_are_refused(options: list[str], about: str, tokenizer: Path, tmp_path: Path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    given = [] if "--tokenizer" in options else ["--tokenizer", tokenizer]
    given += [] if "--out" in options else ["--out", "store"]
    assert_refused(called("data", "prepare", "a.txt", *given, *options), about)
    assert not (tmp_path / "store").exists()


def test_a_source_is_needed(tokenizer: Path):
    refused = called("data", "prepare", "--tokenizer", tokenizer, "--out", "store")
    assert_refused(refused, "data prepare needs SOURCE...")
    assert_refused(called("data", "prepare", "none.txt", "--tokenizer", tokenizer, "--out", "store"), "none.txt")
    assert_refused(called("data", "perpare"), "there is no command 'data perpare'")


# inspect, a store -----------------------------------------------------------------------


@pytest.fixture
def store(tokenizer: Path) -> Path:
    """Two fields a row, the second learnt."""
    rows = [{"a": "Ask\n⟦me⟧", "b": f"a\\b \x1b[31m\u200b</s> {'long ' * n}"} for n in range(4)]
    write_rows(Path("rows.jsonl"), rows)
    prepared("rows.jsonl", "--kind", "fields", "--fields", "[a],b", "--tokenizer", tokenizer, "--out", "store")
    return Path("store")


def test_without_colours_marks_tell_what_is_learnt(store: Path):
    done = called("data", "inspect", store, "--rows", 1)
    assert (done.returncode, done.stderr) == (0, "")
    assert ESCAPE not in done.stdout
    shown = done.stdout.split("document 0")[1]
    assert "⟨<s>⟩Ask\\n\n\\u27e6me\\u27e7⟦a\\\\b \\x1b[31m\\u200b</s> ⟨</s>⟩⟧\n" in shown
    assert "document 1" not in done.stdout
    assert "⟦loss⟧  ⟦⟨special token⟩⟧  ⟨special token⟩  no loss" in shown


def test_colours_tell_what_is_learnt_unless_they_are_refused(store: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = called("data", "inspect", store, "--rows", 1).stdout
    learnt, special, read, end = "\x1b[1;32m", "\x1b[1;36m", "\x1b[36m", "\x1b[0m"
    assert (
        f"{read}<s>{end}Ask\\n\n\\u27e6me\\u27e7{learnt}a\\\\b \\x1b[31m\\u200b</s> {end}{special}</s>{end}\n" in shown
    )
    assert "⟦" not in shown
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦a\\\\b" in called("data", "inspect", store, "--rows", 1).stdout


def test_what_counts_neither_0_nor_1_says_how_much(tokenizer: Path, monkeypatch: pytest.MonkeyPatch):
    ask, whole = {"role": "user", "content": "Ask"}, {"role": "assistant", "content": "whole"}
    messages = [ask, whole | {"content": "half", "weight": 0.5}, ask, whole]
    write_rows(Path("rows.jsonl"), [{"messages": messages}])
    template = ("--kind", "chat", "--template", "vicuna_v1.1")
    prepared("rows.jsonl", *template, "--tokenizer", tokenizer, "--out", "store")
    shown = called("data", "inspect", "store").stdout.split("document 0")[1]
    assert "Ask ASSISTANT:⟦0.5:  half⟨</s>⟩⟧USER: Ask ASSISTANT:⟦ whole⟨</s>⟩⟧\n" in shown
    assert "no loss  ⟦0.5: loss with this weight⟧" in shown
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[1;32m⟦0.5: \x1b[0m\x1b[1;32m half\x1b[0m" in called("data", "inspect", "store").stdout


def test_a_store_is_told_in_json(store: Path):
    told = inspected(store, "--rows", 9)
    (source,) = told["sources"]
    assert (source["store"], source["documents"]) == ("store", 4)
    assert len(told["shown"]) == 4
    pieces = told["shown"][2]["documents"][0]
    assert [(piece["text"], piece["weight"] > 0, piece["special"]) for piece in pieces] == [
        ("<s>", False, True),
        ("Ask\n⟦me⟧", False, False),
        ("a\\b \x1b[31m\u200b</s> long long ", True, False),
        ("</s>", True, True),
    ]
    bars = told["histogram"]
    assert sum(bars["documents"][0]) == 4
    assert bars["edges"][0] <= source["lengths"]["shortest"] <= source["lengths"]["longest"] < bars["edges"][-1]


def test_the_tokenizer_of_a_store_is_found_or_asked_for(store: Path, tokenizer: Path, stories: Path):
    tokenizer.rename("elsewhere")
    assert_refused(called("data", "inspect", store), f"was prepared with {tokenizer.resolve()}")
    assert inspected(store, "--rows", 0)["shown"] == []
    assert len(inspected(store, "--tokenizer", "elsewhere")["shown"]) == 2
    assert_refused(called("data", "inspect", store, "--tokenizer", stories), "another tokenizer than")


def test_the_histogram_is_a_picture_of_the_bars(store: Path):
    done = called("data", "inspect", store, "--rows", 0, "--histogram", "lengths.png")
    bars = [line.split() for line in done.stdout.splitlines() if "█" in line]
    assert sum(int(bar[-2]) for bar in bars) == 4
    assert {bar[-2]: len(bar[-1]) for bar in bars} == {"1": 50}
    with Image.open("lengths.png") as image:
        assert image.size == (960, 540)
        colours = image.convert("RGB").getcolors(1 << 20) or []
    assert max(count for count, colour in colours if colour == (31, 119, 180)) > 1000, "bars"
    assert not list(Path().glob(".*incomplete"))


@pytest.mark.parametrize("count", [3, 30])
def test_any_number_of_sources_of_any_name_is_drawn(count: int, tokenizer: Path):
    rows = [{"text": "words " * n} for n in range(1, 9)]
    train = [{"files": str(write_rows(Path(f"a_$\\of{n}$.jsonl"), rows)), "weight": n} for n in range(1, count + 1)]
    data = {"train": train, "sequence_length": 8, "batch_size": 4, "cache": "cache"}
    model = {"preset": "tinyllama_1b"}
    table = {"run": "run", "tokenizer": str(tokenizer), "model": model, "data": data, "train": {"steps": 5}}
    recipe = write_recipe_file(table, Path("recipe.toml"))
    done = called("data", "inspect", recipe, "--rows", 0, "--histogram", "lengths.png")
    assert (done.returncode, done.stderr) == (0, "")
    with Image.open("lengths.png") as image:
        found = {colour: number for number, colour in image.convert("RGB").getcolors(1 << 20) or []}
    blue, orange = found.get((31, 119, 180), 0), found.get((255, 127, 14), 0)
    assert blue > 1000
    assert (orange > 1000) == (count == 3), "colours tell sources apart, as long as there are some"


@pytest.fixture
def masked_recipe(tokenizer: Path) -> Path:
    """Long prompts, whose answers do not fit into rows of 16 tokens, and short ones."""
    rows = [{"prompt": "prompt " * n, "answer": "answer"} for n in (9, 9, 9, 1)]
    source = {"files": str(write_rows(Path("rows.jsonl"), rows)), "kind": "fields", "fields": "[prompt],answer"}
    data = {"train": [source], "sequence_length": 16, "batch_size": 1, "overlong": "truncate", "cache": "cache"}
    table = {"run": "run", "tokenizer": str(tokenizer), "model": {"preset": "tinyllama_1b"}, "train": {"steps": 4}}
    return write_recipe_file(table | {"data": data | {"packing": "none"}}, Path("recipe.toml"))


def test_overrides_change_what_is_inspected(masked_recipe: Path):
    done = called("data", "inspect", masked_recipe, "--json", "--data.sequence_length", 128, "--train.steps=7")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert (told["sources"][0]["packing"]["sequence_length"], told["steps"]) == (128, 7)
    wrong = called("data", "inspect", masked_recipe, "--data.sequence-lenght", 128)
    assert_refused(wrong, "the recipe has no field 'data.sequence_lenght'")
    assert "--data.sequence-length" in wrong.stderr
    assert_refused(called("data", "inspect", masked_recipe, "--row", 1), "there is no option '--row'")


def test_overrides_are_not_for_stores(store: Path):
    done = called("data", "inspect", store, "--data.batch-size", 2)
    assert_refused(done, "--data.batch-size is not an option for a store")


def test_a_warmup_as_long_as_the_run_is_noted(masked_recipe: Path):
    done = called("data", "inspect", masked_recipe, "--rows", 0, "--optimizer.warmup-steps", 8)
    assert (done.returncode, done.stderr) == (
        0,
        "note: optimizer.warmup_steps = 8 is not less than train.steps = 4: the learning rate rises to 0.00015 at the "
        "last step and does not decay\n",
    )


def test_rows_without_loss_are_noted_when_training_starts(masked_recipe: Path, tokenizer: Path):
    recipe = read_recipe(masked_recipe)
    (packing,) = Loader(recipe.data, load_tokenizer(tokenizer), "train").packings
    for most, which in ((4, "3 of the 4"), (2, "2 of the first 2")):
        (note,) = silent_row_notes([report.silent_among_first(packing, most)])
        assert note.startswith(f"{which} rows of source 1 have no loss: the weights of all their tokens are 0. ")
        assert note.endswith('larger data.sequence_length, or data.packing = "best_fit" with data.overlong = "drop"')
    (packing,) = Loader(
        dataclasses.replace(recipe.data, sequence_length=128), load_tokenizer(tokenizer), "train"
    ).packings
    assert not list(silent_row_notes([report.silent_among_first(packing)]))


def test_what_cannot_be_inspected_is_refused(store: Path, tokenizer: Path):
    Path("recipe.toml").write_text("run = 5")
    for words, about in {
        ("none",): "none is neither a file nor the name of a recipe",
        ("tokenizer",): "tokenizer is not a prepared store",
        ("recipe.toml", "--tokenizer", "tokenizer"): "--tokenizer applies to stores only",
        ("recipe.toml",): "run: 5 is not of type str",
        ("store", "--rows", "-1"): "--rows -1",
        ("store", "--histogram", "a.jpg"): "a.jpg is not a PNG file",
        ("store", "--rows", "0", "--histogram", "no/a.png"): "No such file",
    }.items():
        assert_refused(called("data", "inspect", *words), about)


# inspect, a recipe ----------------------------------------------------------------------


@pytest.fixture
def table(assets: Path, stories: Path) -> dict[str, Any]:
    """A recipe of two sources in two stages."""
    data = assets / "data"
    sources = [
        {"files": str(data / "tinystories" / "*.txt"), "split": "marker:<|endoftext|>", "weight": 1},
        {"files": str(data / "chat" / "*.json"), "kind": "chat", "template": "vicuna_v1.1", "weight": 3},
    ]
    return {
        "run": "run",
        "init": str(stories),
        "data": {
            "train": sources,
            "stages": [{"first_step": 256, "weights": [1, 0]}],
            "packing": "best_fit",
            "overlong": "truncate",
            "validation_fraction": 0.1,
            "sequence_length": 300,
            "batch_size": 4,
            "cache": "cache",
        },
        "train": {"steps": 300},
    }


@pytest.fixture
def recipe(table: dict[str, Any]) -> Path:
    return write_recipe_file(table, Path("recipe.toml"))


def test_a_recipe_is_told_in_json(recipe: Path):
    told = inspected(recipe, "--rows", 5)
    stories, chat = told["sources"]
    assert [Path(source["name"]).name for source in told["sources"]] == ["*.txt", "*.json"]
    assert (stories["documents"] + stories["held_out"]["documents"], chat["documents"]) == (5, 450)
    assert [source["documents"] for source in told["validation"]] == [1, 50]
    assert [source["packing"]["method"] for source in told["validation"]] == ["best_fit"] * 2
    lengths = np.diff(Store.open(chat["store"]).offsets)
    assert chat["packing"]["truncated"] == (lengths > 301).sum() > 0
    assert 0.7 < chat["packing"]["filled"] <= 1
    assert [sum(bars) for bars in told["histogram"]["documents"]] == [stories["documents"], 450]
    first, second = told["stages"]
    assert (first["asked"], second["asked"]) == ([0.25, 0.75], [1.0, 0.0])
    assert first["given"] == pytest.approx(first["asked"], abs=2e-3)
    assert (sum(first["rows"]), second["rows"]) == (256 * 4, [44 * 4, 0])
    assert told["repeats"][1] == pytest.approx(first["rows"][1] / chat["packing"]["rows"])
    assert len(told["shown"]) == 5
    shown = [piece for row in told["shown"] for pieces in row["documents"] for piece in pieces if row["source"] == 1]
    learnt = "".join(piece["text"] for piece in shown if piece["weight"])
    assert "USER:" in "".join(piece["text"] for piece in shown)
    assert "USER:" not in learnt
    assert "</s>" in learnt
    assert not Path("run").exists()


def test_a_recipe_is_shown(recipe: Path):
    done = called("data", "inspect", recipe, "--rows", 2)
    assert (done.returncode, done.stderr) == (0, "")
    for line in ("best_fit, rows of 300", "steps 0 to 256", "steps 256 to 300", "all 300 steps", "2 held out "):
        assert line in done.stdout, done.stdout
    (source,) = inspected(recipe)["sources"][1:]
    lost, tokens = source["packing"]["lost"], source["tokens"]
    assert lost > 0
    assert f"\ntokens truncated or dropped of source 2 *.json: {lost:,} of {tokens:,} (" in done.stdout
    assert done.stdout.count("─ row ") == 2
    assert "⟦" in done.stdout


def test_a_recipe_says_what_its_sources_are_and_where_they_were_prepared_to(recipe: Path, assets: Path):
    shown = called("data", "inspect", recipe, "--rows", 0).stdout
    for number, (source, name) in enumerate(zip(inspected(recipe)["sources"], ("*.txt", "*.json"), strict=True), 1):
        assert shown.count(f"\n{number} {name} ") == 5, "counts, packing, two stages, and both together"
        assert Path(source["store"]).parent == Path("cache").absolute()
        assert f"source {number}: {source['name']}\n  prepared in {source['store']}\n" in shown
    assert shown.count("prepared in") == 2


def test_validation_of_its_own_is_named_beside_the_sources(table: dict[str, Any], stories: Path):
    Path("letter.txt").write_text("dear")
    write_rows(Path("rows.jsonl"), [{"text": f"row {n}"} for n in range(9)])
    held = write_rows(Path("held.jsonl"), [{"text": "held"}])
    prepared(held, "--tokenizer", stories, "--out", "store")
    data = {"train": ["rows.jsonl"], "validation": [{"files": "store", "kind": "tokens"}, "letter.txt"]}
    data |= {"sequence_length": 4, "batch_size": 4, "cache": "cache"}
    recipe = write_recipe_file(table | {"data": data}, Path("recipe.toml"))
    shown = called("data", "inspect", recipe, "--rows", 0).stdout
    assert "source 1: rows.jsonl\n  prepared in " in shown
    assert "validation v1: letter.txt\n  prepared in " in shown
    assert "validation v2: store\n\n" in shown
    assert "\nv2 store " in shown


def test_tables_of_long_names_fit_80_columns(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    rows = [{"text": "word " * n} for n in range(3, 60)]
    files = [str(write_rows(Path(f"{name * 30}.jsonl"), rows)) for name in "ab"]
    data = table["data"] | {"train": [{"files": files, "weight": 1}, *table["data"]["train"][1:]], "overlong": "split"}
    plain = write_recipe_file(table | {"data": data | {"sequence_length": 8}}, Path("plain.toml"))
    monkeypatch.setenv("COLUMNS", "80")
    shown = called("data", "inspect", plain, "--rows", 0).stdout
    assert f"source 1: {files[0]}, {files[1]}\n" in shown
    tables = [line for line in shown.splitlines() if line.startswith("1 ")]
    assert len(tables) == 7
    assert all(line.startswith(("1 aaaaaa... and 1 more ", "1 held out ")) and len(line) <= 80 for line in tables)
    assert "rows without loss of source 2 *.json: " in shown


def test_sources_without_weights_are_one(table: dict[str, Any]):
    data = {name: value for name, value in table["data"].items() if name != "stages"}
    sources = [{name: value for name, value in source.items() if name != "weight"} for source in data["train"]]
    recipe = write_recipe_file(table | {"data": data | {"train": sources}}, Path("plain.toml"))
    told = inspected(recipe, "--rows", 0)
    (source,) = told["sources"]
    assert source["name"] == ", ".join(source["files"])
    assert len(source["files"]) == 2
    assert [stage["asked"] for stage in told["stages"]] == [[1.0]]
    assert told["shown"] == []


def test_every_source_that_shares_a_store_is_listed(table: dict[str, Any]):
    Path("one.jsonl").write_text('{"instruction": "a", "output": "b"}')
    Path("two.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    )
    del table["data"]["stages"]
    table["data"]["train"] = [
        {"files": "one.jsonl", "kind": "instruct", "template": "alpaca"},
        {"files": "two.jsonl", "kind": "chat", "template": "chatml"},
    ]
    result = called("data", "inspect", write_recipe_file(table, Path("recipe.toml")), "--rows", "0")
    assert "one.jsonl: instruct, template alpaca\n" in result.stdout, result.stderr
    assert "two.jsonl: chat, template chatml\n" in result.stdout


def test_the_mixture_of_wikipedia_is_a_recipe():
    recipe = read_recipe(path_of("wikipedia_mixture"))
    assert [source.weight for source in recipe.data.train] == [90.91, 9.09]
    assert recipe.data.stages[0].weights == (1.0, 0.0)
    assert recipe.data.stages[0].first_step < recipe.train.steps


def _unpadded(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())
