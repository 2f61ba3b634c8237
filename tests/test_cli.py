"""The command line as users meet it: standard output, exit statuses, and mistakes answered in two lines."""

import gzip
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers

import camelid
from camelid import cli
from camelid.cli.arguments import _arguments
from camelid.cli.format_names import ReadableFormat, WritableFormat
from camelid.cli.shared import print_json
from camelid.errors import UserError
from camelid.generate.config import GenerationConfig
from camelid.runs.recipe import completed, read_recipe, write_recipe
from camelid.text.templates import NAMED
from runs import TIMEOUT_S, assert_refused, called, command, tiny_run, words, write_recipe_file

ESCAPE = "\x1b"


@pytest.fixture(scope="module")
def reference(assets: Path) -> list[dict[str, Any]]:
    """Prompts, their ids and 64 greedy ids, by transformers."""
    return json.loads((assets / "models" / "stories260K" / "reference.json").read_text())["prompts"]


@pytest.fixture
def story(assets: Path) -> Path:
    return assets / "data" / "tinystories" / "tinystories_sample.txt"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe_file(tiny_run(tmp_path), tmp_path / "recipe.toml")


# generate -------------------------------------------------------------------------------


def test_generate_json_is_one_object_with_the_reference_tokens_and_nothing_else(
    stories: Path, reference: list[dict[str, Any]], user_env: dict[str, str]
):
    prompts = [prompt["text"] for prompt in reference]
    # JAX warns of a program that another process has not written to its end.
    env = user_env | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    done = command("generate", stories, *prompts, "--max-new-tokens", 64, "--json", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    (name, completions), *rest = json.loads(done.stdout).items()
    assert (name, rest) == ("completions", [])
    tokenizer = transformers.AutoTokenizer.from_pretrained(stories)
    for completion, expected in zip(completions, reference, strict=True):
        assert completion.keys() == {"prompt", "text", "tokens", "finish_reason", "prompt_index"}
        assert completion["prompt"] == expected["text"]
        assert completion["tokens"] == expected["greedy_ids"]
        assert completion["finish_reason"] == "length"
        whole = tokenizer.decode(expected["ids"] + expected["greedy_ids"], skip_special_tokens=True)
        assert expected["text"] + completion["text"] == whole


def test_generate_reads_standard_input_and_prints_the_prompt_with_its_continuation(
    stories: Path, reference: list[dict[str, Any]]
):
    expected = reference[0]
    plain = called("generate", stories, "--max-new-tokens", "64", stdin=expected["text"] + "\n")
    as_json = called("generate", stories, "--max-new-tokens", "64", "--json", stdin=expected["text"])
    (completion,) = json.loads(as_json.stdout)["completions"]
    assert (completion["prompt"], completion["tokens"]) == (expected["text"], expected["greedy_ids"])
    assert plain.stdout == expected["text"] + completion["text"] + "\n"


def test_a_chat_is_what_transformers_makes_of_it(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The template of Zephyr has no BOS, and that of Llama 2 has one, which is not added a second time."""
    prompts = []

    def generated(self: camelid.Model, given: Any, *options: Any) -> list[camelid.Completion]:
        prompts.append(given)
        return [camelid.Completion("prompt", "answer", [], "stop")]

    monkeypatch.setattr(camelid.Model, "generate", generated)
    for name in ("zephyr", "llama2"):
        folder = tmp_path / name
        shutil.copytree(stories, folder)
        (folder / "chat_template.jinja").write_text(NAMED[name].text)
        done = called("generate", folder, "--chat", "Where is the dog?")
        assert (done.returncode, done.stdout, done.stderr) == (0, "answer\n", "")
        chat = [{"role": "user", "content": "Where is the dog?"}]
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert prompts.pop() == [expected]
        assert (expected[0] == theirs.bos_token_id) == (name == "llama2")
        assert "--chat applies its chat template" in called("generate", folder, "Where is the dog?").stderr
    assert_refused(called("generate", stories, "a", "--chat"), "hf has no chat template")


def test_a_terminal_that_lacks_a_character_does_not_lose_the_other_texts(stories: Path, user_env: dict[str, str]):
    prompts = ["Zoé", "One day"]
    done = command("generate", stories, *prompts, "--max-new-tokens", 4, env=user_env | {"PYTHONIOENCODING": "ascii"})
    first, second = done.stdout.splitlines()
    assert (done.returncode, first[:6], second[:7]) == (0, r"Zo\xe9", "One day"), done.stderr


def test_prompts_are_answered_in_order_and_seeds_repeat(stories: Path):
    options = ["--max-new-tokens", "8", "--temperature", "1.5", "--top-k", "50", "--top-p", "0.95", "--json"]
    first, again, other = (
        json.loads(called("generate", stories, "One day", "Lily", "One day", *options, "--seed", seed).stdout)
        for seed in ("1", "1", "2")
    )
    assert [completion["prompt"] for completion in first["completions"]] == ["One day", "Lily", "One day"]
    assert first == again
    assert first != other
    assert first["completions"][0]["tokens"] != first["completions"][2]["tokens"]


def test_a_stream_is_the_text_of_the_completion(stories: Path):
    options = ("--max-new-tokens", 40, "--temperature", 0.8, "--seed", 3)
    streamed = called("generate", stories, "One day", "Lily", *options, "--stream")
    assert streamed.stdout == called("generate", stories, "One day", "Lily", *options).stdout
    assert_refused(called("generate", stories, "a", "--stream", "--json"), "--stream and --json exclude each other")
    assert_refused(called("generate", stories, "a", "--stream", "--n", 2, "--temperature", 1), "--n 2 completions")


def test_options_of_generation_reach_the_model(stories: Path):
    options = ["--n", 2, "--temperature", 1, "--stop", "day", "--stop", ".", "--top-logprobs", 3, "--logprobs"]
    options += ["--suppress-tokens", 5, "--suppress-tokens", 6, "--logit-bias", "7=-3,8=2.5", "--ignore-eos"]
    done = called("generate", stories, "Once upon a time", *options, "--json")
    completions = json.loads(done.stdout)["completions"]
    expected = camelid.load(stories).generate(
        "Once upon a time",
        n=2,
        temperature=1.0,
        stop=["day", "."],
        top_logprobs=3,
        logprobs=True,
        suppress_tokens=[5, 6],
        logit_bias={7: -3.0, 8: 2.5},
        ignore_eos=True,
    )
    assert [completion["text"] for completion in completions] == [completion.text for completion in expected]
    for ours, theirs in zip(completions, expected, strict=True):
        assert ours["logprobs"] == pytest.approx(theirs.logprobs)
        assert [list(map(int, top)) for top in ours["top_logprobs"]] == list(map(list, theirs.top_logprobs or ()))
    assert_refused(called("generate", stories, "a", "--logit-bias", "7"), "'7' is not a list of numbers by token id")
    assert_refused(called("generate", stories, "a", "--min-p", "2"), "min_p = 2.0 is not in (0, 1]")


def test_a_prompt_that_does_not_fit_the_context_is_refused(stories: Path):
    assert_refused(called("generate", stories, "a" * 2000), "prompt 0 has", "context of 512")
    assert_refused(called("generate", stories, "a", "--max-new-tokens", "512"), "prompt 0 has", "max_new_tokens = 512")
    assert_refused(called("generate", stories, "a", "--max-new-tokens", "0"), "max_new_tokens = 0")
    assert_refused(called("generate", stories, "a", "--temperature", "-1"), "temperature = -1.0")
    assert_refused(called("generate", stories, "a", "--top-p", "1.5", "--temperature", "1"), "top_p = 1.5")


WARNS = """
import threading, warnings
from camelid import cli
from camelid.cli.arguments import _arguments

def warn() -> None:
    \"\"\"Warn.\"\"\"
    thread = threading.Thread(target=lambda: warnings.warn("a process ended;\\n another goes on", RuntimeWarning))
    thread.start()
    thread.join()

cli.COMMANDS["inspect"] = warn
cli.main()
"""


def test_a_warning_is_one_line_also_from_a_thread(user_env: dict[str, str]):
    words = [sys.executable, "-c", WARNS, "inspect"]
    done = subprocess.run(words, env=user_env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, done.stderr) == (0, "warning: a process ended; another goes on\n")


def test_the_help_names_the_options_of_generation_that_can_be_given_several_times():
    several = {f"--{each.name.replace('_', '-')}" for each in fields(GenerationConfig) if each.default == ()}
    text = " ".join(re.sub(r"-\n +", "-", called("generate", "--help").stdout).split())
    (note,) = re.findall(r"typical-p\. ([^.]*), and can be given several times\.", text)
    assert set(re.findall(r"--[a-z-]+", note)) == several


@pytest.mark.parametrize("arguments", [["inspect"], ["inspect", "--json"], ["--help"]], ids=" ".join)
def test_a_reader_that_goes_away_is_not_an_error_to_talk_about(
    stories: Path, user_env: dict[str, str], arguments: list[str]
):
    given = words(*arguments, *([stories] if arguments[0] == "inspect" else []))
    process = subprocess.Popen(given, env=user_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()  # as `| true` does; `| head -1` may come before or after the output
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert err == b""


# evaluate, inspect, convert -------------------------------------------------------------


def test_perplexity_json_holds_the_loss_its_exponent_and_bits_of_the_text(stories: Path, story: Path):
    done = called("evaluate", "perplexity", stories, story, "--json", "--sequence-length", "128")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.keys() == {"perplexity", "loss", "bits_per_byte", "tokens"}
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    bits = result["loss"] * result["tokens"] / math.log(2)
    assert result["bits_per_byte"] == pytest.approx(bits / story.stat().st_size)
    assert 1 < result["perplexity"] < 10
    printed = called("evaluate", "perplexity", stories, story, "--sequence-length", "128").stdout
    assert f"perplexity     {result['perplexity']:.4f}" in printed


def test_perplexity_of_nothing_and_of_no_text_is_refused(stories: Path, tmp_path: Path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"ab\xff")
    score = ("evaluate", "perplexity", stories)
    assert_refused(called(*score, tmp_path / "empty.txt"), "empty.txt: no text to score")
    assert_refused(called(*score, tmp_path / "bytes.txt"), "bytes.txt is not utf-8 at byte 2")
    assert_refused(called(*score, tmp_path / "none.txt"), "none.txt cannot be read")


@pytest.fixture
def texts() -> list[str]:
    return ['Lily said, "Hi!"\nShe ran.', "The sun was höt.", "One day, Tim saw a {dog}."]


def write_texts(path: Path, texts: list[str]) -> Path:
    """A file of these texts as its name says; of a .txt all in one."""
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts)
    if path.suffix == ".parquet":
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist([{"text": text} for text in texts]), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": text} for text in texts], indent=1))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress((lines if ".jsonl" in path.name else "".join(texts)).encode()))
    else:
        path.write_text(lines if path.suffix == ".jsonl" else "".join(texts))
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet"])
def test_perplexity_scores_the_texts_of_rows(name: str, texts: list[str], stories: Path, tmp_path: Path):
    score = ("evaluate", "perplexity", stories, "--json")
    plain = [write_texts(tmp_path / f"{n}.md", [text]) for n, text in enumerate(texts)]
    expected = called(*score, *plain)
    assert expected.returncode == 0, expected.stderr
    found = called(*score, write_texts(tmp_path / name, texts))
    assert (found.returncode, found.stderr) == (0, "")
    assert json.loads(found.stdout) == json.loads(expected.stdout)


def test_perplexity_scores_packed_text_as_text(texts: list[str], stories: Path, tmp_path: Path):
    score = ("evaluate", "perplexity", stories, "--json")
    expected = called(*score, write_texts(tmp_path / "a.txt", texts)).stdout
    assert json.loads(called(*score, write_texts(tmp_path / "a.txt.gz", texts)).stdout) == json.loads(expected)


def test_perplexity_names_the_row_that_is_no_text_and_takes_another_key(stories: Path, tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"body": "One day."}\n{"body": "Tim ran."}\n')
    score = ("evaluate", "perplexity", stories, tmp_path / "a.jsonl")
    refused = called(*score)
    assert_refused(refused, "a.jsonl, line 1: no field 'text', only 'body'")
    assert "Set --text-key to the field that holds the text. The loss of answers" in refused.stderr
    assert called(*score, "--text-key", "body").returncode == 0
    (tmp_path / "a.jsonl").write_text('{"text": "One day."}\n{"text": 5}\n')
    assert_refused(called(*score), "a.jsonl, line 2: field 'text' is 5, not a string")


def test_inspect_json_describes_every_parameter(stories: Path):
    report = json.loads(called("inspect", stories, "--json").stdout)
    assert report.keys() >= {"parameters", "bytes", "config", "tree"}
    assert (report["parameters"], report["bytes"]) == (260_032, 1_040_128)
    assert report["config"]["num_kv_heads"] == 4
    assert report["tree"]["layers.attn.q_proj"] == {
        "axes": ["layers", "heads", "head_dim", "embed"],
        "shape": [5, 8, 8, 64],
        "dtype": "float32",
        "parameters": 20_480,
        "bytes": 81_920,
    }
    for total in ("parameters", "bytes"):
        assert sum(entry[total] for entry in report["tree"].values()) == report[total]


def test_inspect_prints_a_line_for_every_parameter(stories: Path):
    printed = called("inspect", stories).stdout
    assert printed.splitlines()[-1] == "260,032 parameters, 1,040,128 bytes (1.0 MB)"
    tree = json.loads(called("inspect", stories, "--json").stdout)["tree"]
    assert all(any(line.split()[:1] == [path] for line in printed.splitlines()) for path in tree)


def test_convert_writes_what_transformers_opens(stories: Path, tmp_path: Path):
    done = called("convert", stories, tmp_path / "out", "--dtype", "bfloat16")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"wrote {tmp_path / 'out'}\n"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() == 260_032
    again = called("convert", stories, tmp_path / "out")
    assert_refused(again, "exists already")
    assert "--overwrite" in again.stderr
    assert called("convert", stories, tmp_path / "out", "--overwrite").returncode == 0
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


# train ----------------------------------------------------------------------------------


def test_the_printed_recipe_is_the_recipe(recipe: Path, tmp_path: Path):
    overrides = ["--train.steps", "9", "--optimizer.clip-norm=inf", "--run", str(tmp_path / "other")]
    printed = called("train", recipe, "--print-recipe", *overrides)
    assert (printed.returncode, printed.stderr) == (0, "")
    (tmp_path / "again.toml").write_text(printed.stdout)
    lines = printed.stdout.splitlines(keepends=True)
    written = "".join(line for line in lines if not line.startswith("#"))
    assert written == write_recipe(completed(read_recipe(recipe, overrides), None))
    assert [line for line in lines if line.startswith("#")][1:] == ["# decay_steps = 9  # train.steps\n"]
    assert read_recipe(tmp_path / "again.toml") == completed(read_recipe(recipe, overrides), None)
    assert read_recipe(tmp_path / "again.toml").train.steps == 9
    assert not (tmp_path / "run").exists()


def test_training_takes_overrides_and_says_where_the_model_is(recipe: Path, tmp_path: Path):
    done = called("train", recipe, "--train.steps", "2", "--run", tmp_path / "other")
    assert (done.returncode, done.stdout) == (0, "")
    *_, end, generate, convert, evaluate = done.stderr.splitlines()
    assert end.startswith(f"model {tmp_path / 'other' / 'model'}")
    assert f"camelid generate {tmp_path / 'other'} " in generate
    assert f"camelid convert {tmp_path / 'other'} " in convert
    assert f"camelid evaluate perplexity {tmp_path / 'other'} " in evaluate
    assert "step 2/2" in done.stderr
    assert ESCAPE not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_a_recipe_is_two_lines(recipe: Path, tmp_path: Path):
    assert_refused(called("train", recipe, "--train.stpes", "3"), "no field 'train.stpes'")
    assert_refused(called("train", recipe, "--train.steps", "3.7"), "train.steps: 3.7 is not of type int")
    assert_refused(called("train", recipe, "--data.shuffle", '"false"'), "data.shuffle: 'false' is not true or false")
    assert_refused(called("train", recipe, "--max-steps", "3"), "no field 'max_steps'")
    assert_refused(called("train", tmp_path / "none.toml"), "none.toml cannot be read")
    assert not (tmp_path / "run").exists()


def test_the_numbers_of_processes_belong_together(recipe: Path, tmp_path: Path):
    refusal = called("train", recipe, "--coordinator", "localhost:1")
    assert_refused(refusal, "--coordinator, --processes and --process-id belong together")
    assert not (tmp_path / "run").exists()


# mistakes, help, and looks --------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "problem", "advice"),
    [
        (["trian", "r.toml"], "there is no command 'trian'", "Did you mean 'camelid train'?"),
        (["evaluate", "perplexty"], "there is no command 'evaluate perplexty'", "Did you mean 'camelid evaluate perpl"),
        (["--verbose"], "there is no command '--verbose'", "The commands are generate, evaluate perplexity, finetune"),
    ],
)
def test_an_unknown_command_is_refused_with_the_nearest(arguments: list[str], problem: str, advice: str):
    done = called(*arguments)
    assert_refused(done, problem)
    assert advice in done.stderr


@pytest.mark.parametrize(
    ("arguments", "problem", "advice"),
    [
        (["generate", "model", "--max-new-tokenz", "3"], "no option '--max-new-tokenz'", "mean '--max-new-tokens'?"),
        (["generate", "model", "--max-new-tokens", "many"], "--max-new-tokens 'many' is not an integer", "tokens 1,"),
        (["generate", "model", "--temperature=hot"], "--temperature 'hot' is not a number", "--temperature 0.5"),
        (["generate", "model", "--seed"], "--seed has no value", "Write --seed 1."),
        (["generate", "model", "--json=yes"], "--json takes no value", "Write --json alone."),
        (["generate", "model", "-x"], "there is no option '-x'", "write -- before a text"),
        (["generate", "model", "--dtype", "int8"], "--dtype has no value 'int8'", "are float32, bfloat16, float16."),
        (["generate", "model", "--dtype", "bf16"], "--dtype has no value 'bf16'", "Did you mean 'bfloat16'? The"),
        (["generate"], "generate needs MODEL", "camelid generate --help"),
        (["evaluate", "perplexity", "model"], "evaluate perplexity needs FILE...", "perplexity --help"),
        (["data", "prepare", "a", "--out", "b"], "data prepare needs --tokenizer MODEL", "prepare --help"),
        (["data", "prepare", "a", "--kind", "chats"], "--kind has no value 'chats'", "Did you mean 'chat'?"),
        (["convert", "a"], "DESTINATION", "--check"),
        (["convert", "a", "b", "--to", "onnx"], "--to has no format 'onnx'", "The formats are hf, meta, easylm,"),
        (["convert", "a", "b", "--to", "huggingface"], "no format 'huggingface'", "Did you mean 'hf'? The formats"),
        (["convert", "a", "b", "--to", "q8_0"], "--to has no format 'q8_0'", "Did you mean 'gguf-q8_0'?"),
        (["convert", "a", "b", "to=hf"], "'to=hf' is not an option", "Write --to hf."),
        (["train", "r.toml", "train.steps=5"], "'train.steps=5' is not an option", "Write --train.steps 5."),
        (["inspect", "a", "b"], "there is one argument too many: 'b'", "camelid inspect --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_arguments_is_two_lines(arguments: list[str], problem: str, advice: str):
    done = called(*arguments)
    assert_refused(done, problem)
    assert done.stderr.count("\n") == 2
    assert advice in done.stderr.splitlines()[1]
    assert "None" not in done.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_checked_options_are_those_of_the_parser(name: str):
    shown = called(*name.split(), "--help").stdout
    parsed = set(re.findall(r"^\W*(--[a-z][a-z-]*)", shown, re.MULTILINE)) - {"--help"}
    checked = [argument for argument in _arguments(cli.COMMANDS[name]) if not argument.positional]
    assert {argument.name for argument in checked} == parsed


def test_values_that_look_like_options_are_values(stories: Path):
    assert_refused(called("generate", stories, "a", "--temperature", "-1"), "temperature = -1.0")
    assert called("generate", stories, "--max_new_tokens=1", "--", "--a b").stdout.startswith("--a b")
    assert called("generate", stories, "- a", "--max-new-tokens", "1").stdout.startswith("- a")


def test_every_command_has_help_with_an_example_and_an_end_without_color():
    overview = called("--help").stdout
    assert overview == called().stdout == called("-h").stdout == called("help").stdout
    for name in ("generate", "evaluate perplexity", "train", "convert", "inspect", "demo"):
        assert f"\n  {name} " in overview
        done = called(*name.split(), "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"camelid {name} " in done.stdout.split("usage:")[1].split("\n", 1)[1], "no example"
        assert ESCAPE not in done.stdout


@pytest.mark.parametrize("name", ["öl.txt", "\udcff.txt"])
def test_json_may_name_any_file(name: str, capsys: pytest.CaptureFixture[str]):
    print_json({"file": name})
    out = capsys.readouterr().out
    assert json.loads(out) == {"file": name}
    assert name.startswith("\udcff") or name in out


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert called("--version").stdout == f"camelid {version('camelid')}\n"


FAST = """
import io, sys
from contextlib import redirect_stdout, redirect_stderr
from camelid.cli import main
for words in {commands!r}:
    sys.argv = ["camelid", *words]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit:
            pass
slow = {{"jax", "numpy", "optax", "orbax", "torch", "transformers", "tokenizers", "safetensors"}}
print(sorted(slow & sys.modules.keys()))
"""


def test_help_mistakes_and_recipes_do_not_wait_for_jax(recipe: Path, user_env: dict[str, str]):
    commands = [
        ["--help"],
        ["--version"],
        ["trian"],
        ["generate", "--help"],
        ["train", "--help"],
        ["train", str(recipe), "--train.stpes", "1"],
        ["train", str(recipe), "--print-recipe"],
        ["finetune", "--help"],
        ["recipes"],
        ["recipes", "show", "finetune"],
        ["train", "fintune"],
    ]
    program = FAST.format(commands=commands)
    done = subprocess.run(
        [sys.executable, "-c", program], env=user_env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)


def test_python_m_camelid_and_camelid_are_the_same(user_env: dict[str, str]):
    script = subprocess.run(["camelid"], env=user_env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert script.returncode == 0
    assert script.stdout == called().stdout


@pytest.mark.parametrize("words", [["data"], ["data", "--help"], ["evaluate", "-h"], ["delta", "help"]])
def test_a_group_of_commands_lists_them(words: list[str], capsys: pytest.CaptureFixture[str]):
    cli._run(words)
    names = [name for name in cli.COMMANDS if name.startswith(f"{words[0]} ")]
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    assert "generate" not in shown


def test_an_empty_path_and_the_root_are_refused(stories: Path):
    for arguments, about in (
        ((stories, ""), "a path is empty"),
        ((stories, "/", "--overwrite"), "the root of the file"),
    ):
        done = called("convert", *arguments)
        assert done.returncode == 2
        assert about in done.stderr
    with pytest.raises(UserError, match="a path is empty"):
        camelid.load("")


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("eval", "evaluate perplexity"),
        ("fine-tune", "finetune"),
        ("sft", "finetune"),
        ("pretrain", "train"),
        ("tokenize", "data prepare"),
    ],
)
def test_the_name_of_a_command_in_other_systems_is_refused_with_ours(name: str, suggestion: str):
    done = called(name, "model")
    assert_refused(done, f"there is no command {name!r}")
    assert f"Did you mean 'camelid {suggestion}'?" in done.stderr


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("--lr", "optimizer.learning_rate"),
        ("--optimizer.lr", "optimizer.learning_rate"),
        ("--max_length", "data.sequence_length"),
        ("--per_device_train_batch_size", "data.batch_size"),
        ("--train.batch-size", "data.batch_size"),
        ("--gradient_accumulation_steps", "train.accumulate"),
        ("--epochs", "train.steps"),
        ("--train.num_train_epochs", "train.steps"),
    ],
)
def test_the_name_of_a_field_in_other_systems_is_refused_with_ours(recipe: Path, option: str, field: str):
    done = called("train", recipe, option, "3")
    assert_refused(done, f"the recipe has no field {option[2:].replace('-', '_')!r}")
    assert (f"--{field.replace('_', '-')}?" if "epochs" not in option else field) in done.stderr.splitlines()[1]


def test_every_suggested_field_and_command_exists():
    from camelid.runs.recipe import _type_of
    from camelid.runs.suggestions import OTHER_NAMES

    assert not [field for field in OTHER_NAMES if _type_of(field) is object]
    assert set(cli.OTHER_NAMES.values()) <= cli.COMMANDS.keys()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_shows_no_none_and_no_empty_default(name: str):
    shown = called(*name.split(), "--help").stdout
    assert "None" not in shown
    assert "(default: )" not in shown
    assert "(default: False)" not in shown


def test_the_formats_are_listed_once_in_the_help_of_convert():
    shown = called("convert", "--help").stdout
    notes = " ".join(shown.split("Notes:")[1].split("╭")[0].split())
    writable, readable = get_args(WritableFormat), get_args(ReadableFormat)
    only_read = [name for name in readable if name not in writable]
    assert f"FORMAT is {', '.join(writable[:-1])} or {writable[-1]};" in notes
    assert f"with --from also {', '.join(only_read[:-1])} or {only_read[-1]}." in notes
    assert shown.count("mindspore-interleaved") == 1
    assert "--to FORMAT" in shown
    assert "--from FORMAT" in shown


# What a newcomer meets ------------------------------------------------------------------


def test_options_of_sampling_without_a_temperature_are_reported(stories: Path):
    done = called("generate", stories, "One day", "--top-k", "3", "--max-new-tokens", "1")
    assert (done.returncode, done.stderr.count("\n")) == (0, 1)
    assert done.stderr.startswith("note: with --temperature 0, --top-k has no effect")
    sampled = called("generate", stories, "One day", "--top-k", "3", "--max-new-tokens", "1", "--temperature", "1")
    assert sampled.stderr == ""


def test_an_empty_prompt_begins_with_bos_and_empty_input_is_refused(stories: Path):
    options = ("--max-new-tokens", 4, "--json")
    (completion,) = json.loads(called("generate", stories, "", *options).stdout)["completions"]
    model = camelid.load(stories)
    assert completion["tokens"] == model.generate([[1]], max_new_tokens=4)[0].tokens
    assert_refused(called("generate", stories, stdin="\n"), "there is no prompt: standard input is empty")


def test_an_empty_folder_or_file_is_called_empty(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.gguf").touch()
    for name in ("folder", "model.gguf"):
        assert_refused(called("inspect", tmp_path / name), f"{tmp_path / name} is empty")


def test_recipes_of_beginners_are_answered_with_what_to_write(tmp_path: Path):
    (tmp_path / "empty.toml").touch()
    (tmp_path / "model.toml").write_text('run = "r"\nmodel = "org/name"\n')
    (tmp_path / "twice.toml").write_text("[data.stages]\na = 1\n[data.stages]\n")
    for name, problem, advice in (
        ("empty.toml", "the recipe lacks the field 'run'", "docs/recipes.md"),
        ("model.toml", "model = 'org/name' is not a table", "use init = 'org/name'"),
        ("twice.toml", "is not TOML: Cannot declare data.stages twice (at line 3", "docs/recipes.md"),
        ("none.toml", "none.toml cannot be read", "Give the path of a recipe (.toml)."),
    ):
        done = called("train", tmp_path / name)
        assert_refused(done, problem)
        assert advice in done.stderr.splitlines()[-1]


def test_an_adapter_needs_a_rank(tmp_path: Path):
    done = called("delta", "make", "a", "b", tmp_path / "c", "--kind", "lora")
    assert_refused(done, "--kind lora needs --rank")
    assert "--rank 16" in done.stderr


def test_help_of_a_command_is_that_of_its_option():
    assert called("help", "evaluate", "perplexity").stdout == called("evaluate", "perplexity", "--help").stdout
    assert called("help", "data").stdout == called("data", "--help").stdout


def test_the_overview_fits_the_terminal(monkeypatch: pytest.MonkeyPatch):
    for columns in (60, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert max(map(len, called("--help").stdout.splitlines())) <= columns


@pytest.mark.parametrize(
    ("command", "usage"),
    [("generate", "MODEL [PROMPT...]"), ("convert", "SOURCE [DESTINATION]"), ("inspect", "[MODEL]")],
)
def test_the_usage_marks_optional_arguments(command: str, usage: str):
    assert f" {usage}" in called(command, "--help").stdout.splitlines()[0]


def test_fewer_steps_than_a_demo_has_made_are_refused_with_its_options(tmp_path: Path):
    (tmp_path / "demo" / "run" / "checkpoints" / "20").mkdir(parents=True)
    done = called("demo", "--folder", tmp_path / "demo", "--steps", "2")
    problem, advice = done.stderr.splitlines()
    assert done.returncode == 2
    assert problem == f"camelid: {tmp_path / 'demo'} has a run of 20 steps, and --steps is 2"
    assert advice.strip() == "Choose another --folder, or --steps 20 or more."
