"""The command line. Each command is a function; JAX is imported where a command needs it."""

import contextlib
import dataclasses
import difflib
import errno
import functools
import inspect as inspect_module
import json as json_module
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import tyro
from tyro.conf import Positional, Suppress, arg

from camelid.errors import UserError
from camelid.parallel.compiled import keep_compiled

Dtype = Annotated[Literal["float32", "bfloat16", "float16"], arg(help="of parameters and products")]
Checkpoint = Annotated[
    Positional[str], arg(metavar="MODEL", help="a checkpoint's folder, or its name on the Hugging Face Hub")
]
Prompts = Annotated[
    Positional[tuple[str, ...]],
    arg(metavar="PROMPT...", help="texts to go on from; without one, standard input is the prompt"),
]
Format = Literal[
    "hf",
    "meta",
    "easylm",
    "easylm-flax",
    "mindspore",
    "mindspore-interleaved",
    "megatron",
    "megatron-legacy",
    "llama2-jax",
    "llama2c",
    "llama2c-v1",
    "llama2c-v2",
    "gguf",
    "gguf-q8_0",
    "gguf-q4_0",
]
Texts = Annotated[Positional[tuple[str, ...]], arg(metavar="TEXTFILE...", help="UTF-8 text")]


def generate(
    model: Checkpoint,
    prompts: Prompts = (),
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    dtype: Dtype = "float32",
    json: bool = False,
) -> None:
    """Write on after each prompt.

    camelid generate ./TinyLlama "Once upon a time" --max-new-tokens 100
    camelid generate ./TinyLlama "Hello" "Bonjour" --temperature 0.8 --top-p 0.95 --seed 1 --json
    cat prompt.txt | camelid generate ./TinyLlama

    Args:
        max_new_tokens: end after so many tokens
        temperature: 0 is greedy; higher is more random
        top_k: draw from the K best tokens only
        top_p: draw from the fewest tokens whose probabilities reach P
        seed: of the draws; prompt i uses seed + i
        json: print one JSON object
    """
    texts = list(prompts) or [sys.stdin.read().removesuffix("\n")]
    loaded = _load(model, dtype)
    if loaded.tokenizer is not None and loaded.tokenizer.has_chat_template:
        _note("this model was tuned to chat; prompts here are plain text, without its chat template")
    completions = loaded.generate(
        texts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    if json:
        return _print_json({"completions": [dataclasses.asdict(completion) for completion in completions]})
    for completion in completions:
        print(completion.prompt + completion.text)


def perplexity(
    model: Checkpoint,
    files: Texts,
    sequence_length: int | None = None,
    max_tokens: int | None = None,
    dtype: Dtype = "float32",
    json: bool = False,
) -> None:
    """How well a model predicts text: perplexity, loss (nats a token), bits per byte.

    camelid evaluate perplexity ./TinyLlama test.txt
    camelid evaluate perplexity ./TinyLlama test.txt --sequence-length 256 --max-tokens 100000 --json

    The texts are joined, without BOS, and scored in windows; every token but the first is scored once.

    Args:
        sequence_length: tokens in a window; the model's context, at most 2048, if left out
        max_tokens: score only so many tokens from the beginning
        json: print one JSON object
    """
    import numpy as np

    from camelid.evaluate.perplexity import perplexity

    texts = [_read(Path(file)) for file in files]
    loaded = _load(model, dtype)
    if loaded.tokenizer is None:
        raise UserError(f"{model} has no tokenizer", "Put tokenizer.json or tokenizer.model beside the weights.")
    ids = [token for row in loaded.tokenizer.encode_batch(texts, bos=False) for token in row]
    size = sum(len(text.encode()) for text in texts)
    if max_tokens is not None and max_tokens < len(ids):
        ids = ids[:max_tokens]
        size = len(loaded.tokenizer.decode(ids).encode())
    length = sequence_length or min(2048, loaded.config.context_length)
    with _progress("score") as progress:
        result = perplexity(
            loaded.params, np.array(ids), size, length, loaded.config, loaded.compute, loaded.mesh, progress
        )
    if json:
        return _print_json(dataclasses.asdict(result))
    print(f"perplexity     {result.perplexity:.4f}")
    print(f"loss           {result.loss:.4f} nats a token")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
    print(f"tokens         {result.tokens:,}")


def train(
    recipe: Annotated[Positional[Path], arg(metavar="RECIPE.toml", help="docs/recipes.md lists its fields")],
    print_recipe: bool = False,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    detect: bool = False,
    overrides: Suppress[tuple[str, ...]] = (),
) -> None:
    """Train as a recipe says; the same command goes on where a stopped run was.

    camelid train recipes/finetune.toml
    camelid train recipes/finetune.toml --train.steps 500 --optimizer.learning-rate 1e-4 --run runs/second
    camelid train recipes/finetune.toml --print-recipe

    Any field of the recipe may follow as --table.field VALUE.

    Args:
        print_recipe: print the recipe with every field resolved, and end
        coordinator: host:port of process 0, where several processes train together
        processes: how many they are
        process_id: which of them this is, from 0
        detect: join the processes that SLURM, MPI or a TPU pod tells of
    """
    from camelid.recipe import read_recipe, write_recipe

    resolved = read_recipe(recipe, overrides)
    if print_recipe:
        return print(write_recipe(resolved), end="")
    keep_compiled()
    from camelid.parallel import hosts

    hosts.start(hosts.Processes(coordinator=coordinator, count=processes, id=process_id, detect=detect))
    from camelid.run import run

    outcome = run(resolved)
    if not hosts.is_main():
        return None
    if not outcome.finished:
        _note(f"stopped after step {outcome.steps} of {resolved.train.steps}; the same command goes on from there")
        return None
    _note(f"model {outcome.folder / 'model'}   losses {outcome.folder / 'loss.png'}")
    return None


def convert(
    source: Annotated[Positional[str], arg(metavar="SOURCE", help="a checkpoint's folder, or its name on the Hub")],
    destination: Annotated[Positional[Path], arg(metavar="DESTINATION", help="a folder that does not exist yet")],
    to: Format = "hf",
    from_format: Annotated[Format | None, arg(name="from")] = None,
    config: str | None = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, arg(help="of the tensors; each keeps its own if left out")
    ] = None,
    tensor_parallel: int = 1,
    pipeline_parallel: int = 1,
    verify: bool = False,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint anew, a slice at a time, with its tokenizer.

    camelid convert meta-llama/Llama-3.2-1B ./llama-bf16 --dtype bfloat16
    camelid convert ./TinyLlama ./tinyllama-meta --to meta --tensor-parallel 2 --verify

    Args:
        to: format that is written
        from_format: format of SOURCE, where its files leave a doubt
        config: what SOURCE is, where its files do not say: a preset, or a config.json
        tensor_parallel: shards of every matrix, in formats that have them
        pipeline_parallel: stages of layers, in formats that have them
        verify: open the result again, and compare every tensor and the logits of a few tokens
        overwrite: replace the destination
    """
    from camelid.checkpoint.convert import convert

    described = None if config is None else _model_config(config)
    with _progress("convert") as progress:
        notes = convert(
            source,
            destination,
            to=to,
            format=from_format,
            config=described,
            dtype=dtype,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            overwrite=overwrite,
            progress=progress,
        )
    for note in notes:
        _note(f"note: {note}")
    _note(f"wrote {destination}")
    if verify:
        _verify(source, destination, from_format, described, to)


def diff(
    a: Annotated[Positional[str], arg(metavar="A", help="a checkpoint of any format")],
    b: Annotated[Positional[str], arg(metavar="B", help="another")],
    json: bool = False,
) -> None:
    """Compare two checkpoints of any formats, tensor by tensor; exit status 1 where they differ.

    camelid diff ./TinyLlama ./tinyllama-meta
    camelid diff easylm::streaming_params ./hf --json

    Args:
        json: print one JSON object
    """
    from camelid.checkpoint.compare import compare, config_differences
    from camelid.checkpoint.formats import open_checkpoint

    opened = open_checkpoint(a), open_checkpoint(b)
    config = config_differences(opened[0].config, opened[1].config)
    with _progress("compare") as progress:
        found = list(compare(*opened, progress))
    differ = [difference for difference in found if not difference.equal]
    if json:
        _print_json({"config": config, "parameters": [dataclasses.asdict(difference) for difference in found]})
    else:
        for name, (ours, theirs) in config.items():
            print(f"{name}: {ours} and {theirs}")
        for difference in differ:
            print(f"{difference.path}: {' and '.join(difference.dtypes)}, at most {difference.largest:.3g} apart")
        print(f"{len(found) - len(differ)} of {len(found)} parameters are equal")
    if config or differ:
        sys.exit(1)


def inspect(
    model: Annotated[
        Positional[str | None], arg(metavar="MODEL", help="a checkpoint's folder, its name on the Hub, or a preset")
    ] = None,
    presets: bool = False,
    json: bool = False,
) -> None:
    """What a model is: configuration, parameters with their axes, count, bytes, FLOPs.

    camelid inspect ./TinyLlama
    camelid inspect llama2_70b
    camelid inspect --presets

    Args:
        presets: list the presets: names of released models, for training from scratch
        json: print one JSON object
    """
    if presets == (model is not None):
        raise UserError("inspect takes a MODEL, or --presets", "camelid inspect --help shows examples.")
    from camelid import describe

    report = describe.presets() if model is None else describe.report(model)
    if json:
        return _print_json(report)
    return describe.show_presets(report) if model is None else describe.show(report)


def demo(model: str | None = None, folder: Path = Path("runs/demo"), steps: int = 200) -> None:
    """Train a tokenizer and a small Llama from scratch, measure it, write with it, save it: offline, in minutes.

    camelid demo
    camelid demo --model ./TinyLlama

    Args:
        model: finetune this checkpoint instead of training from scratch
        folder: where everything goes
        steps: of training
    """
    keep_compiled()
    from camelid.demo import main

    main(folder, model, steps)


COMMANDS: dict[str, Callable] = {
    "generate": generate,
    "evaluate perplexity": perplexity,
    "train": train,
    "convert": convert,
    "diff": diff,
    "inspect": inspect,
    "demo": demo,
}


QUIET = (tyro.conf.FlagCreatePairsOff,)  # --json, and no --no-json


def main() -> None:
    """Runs a command; user errors are one line and one line of advice, with exit status 2."""
    try:
        _run(sys.argv[1:])
    except UserError as error:
        _fail(error.problem, error.advice)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        # Whoever read our output has gone; there is nobody to tell, and nothing to flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        about = f"{error.filename}: " if error.filename else ""
        _fail(f"{about}{error.strerror}", "Check the path, its permissions, and the disk.")


def _fail(problem: str, advice: str) -> NoReturn:
    print(f"camelid: {problem}\n         {advice}", file=sys.stderr)
    sys.exit(2)


def _run(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        return print(_overview())
    if words[0] == "--version":
        from camelid import __version__

        return print(f"camelid {__version__}")
    name = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
    if name is None:
        return _unknown(words)
    command, rest = COMMANDS[name], words[len(name.split()) :]
    if name == "train":
        rest, overrides = _split_overrides(rest)
        command = functools.partial(train, overrides=tuple(overrides))
    return tyro.cli(command, prog=f"camelid {name}", description=_paragraphs(COMMANDS[name]), args=rest, config=QUIET)


def _overview() -> str:
    lines = [f"  {name:20} {command_help(function).splitlines()[0]}" for name, function in COMMANDS.items()]
    return "\n".join(
        [
            "camelid: the Llama family end to end in JAX",
            "",
            "usage: camelid COMMAND [ARGUMENTS]",
            "",
            *lines,
            "",
            "  camelid COMMAND --help shows its options with examples; camelid --version prints the version.",
        ]
    )


def _paragraphs(function: Callable) -> str:
    """A command's help with a line of its own for each example."""
    return re.sub(r"\n+", "\n\n", command_help(function))


def command_help(function: Callable) -> str:
    """What a command's docstring says before its arguments."""
    return inspect_module.cleandoc(function.__doc__ or "").split("\nArgs:")[0].strip()


def _unknown(words: list[str]) -> None:
    asked = " ".join(words[:2] if words[0] == "evaluate" else words[:1])
    near = difflib.get_close_matches(asked, COMMANDS, 1)
    advice = f"Did you mean 'camelid {near[0]}'?" if near else f"Commands: {', '.join(COMMANDS)}."
    raise UserError(f"there is no command {asked!r}", advice)


def _split_overrides(words: list[str]) -> tuple[list[str], list[str]]:
    """The words that are train's own, and the recipe fields among them with their values."""
    own = {f"--{name.replace('_', '-')}" for name in inspect_module.signature(train).parameters} | {"--help", "-h"}
    mine, overrides, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word.partition("=")[0].replace("_", "-") in own:
            mine.append(word)
        else:
            overrides.append(word)
            if "=" not in word and rest:
                overrides.append(rest.pop(0))
    return mine, overrides


def _load(model: str, dtype: str):
    keep_compiled()
    from camelid.api import load

    loaded = load(model, dtype=dtype)
    for note in loaded.notes:
        _note(f"note: {note}")
    return loaded


def _model_config(text: str):
    """A preset by name, or what a config.json describes."""
    if Path(text).is_file():
        from camelid.checkpoint.folder import read_json
        from camelid.checkpoint.hf_config import config_from_hf

        return config_from_hf(read_json(Path(text)))
    from camelid.model.presets import preset

    return preset(text)


def _verify(source: str, written: Path, format: str | None, config, to: str) -> None:
    """Says how far what was written is from its source."""
    import numpy as np

    from camelid.api import load
    from camelid.checkpoint.compare import compare
    from camelid.checkpoint.formats import FORMATS, open_checkpoint

    with _progress("verify") as progress:
        found = list(compare(open_checkpoint(source, format, config), open_checkpoint(written, to), progress))
    if all(difference.equal for difference in found):
        _note("every tensor is equal")
    else:
        _note(f"tensors were rounded: they are at most {max(difference.largest for difference in found):.3g} apart")
    if not FORMATS[to].lossy and not all(difference.rounded for difference in found):
        raise UserError(f"{written} does not hold what {source} does", "This is a fault of camelid; please report it.")
    models = (load(source, format=format, config=config), load(written, format=to))
    tokens = np.arange(32)[None] % models[0].config.vocab_size
    before, after = (np.asarray(model.logits(tokens)) for model in models)
    agree = np.mean(before.argmax(-1) == after.argmax(-1))
    _note(
        f"logits of 32 tokens are at most {np.abs(before - after).max():.3g} apart; {agree:.0%} agree on the next one"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "Give the path of a text file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}", "Convert the file to UTF-8.") from error


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error where that is a terminal; `progress(done, total)` moves it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print_json(value: object) -> None:
    print(json_module.dumps(value, ensure_ascii=False))


def _note(text: str) -> None:
    print(text, file=sys.stderr)
