"""Commands for a model: what it is, what it says, how well it predicts."""

import dataclasses
import math
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from camelid.cli.shared import (
    Checkpoint,
    Config,
    Dtype,
    Ignore,
    TokenizerPath,
    load,
    model_config,
    note,
    print_json,
    print_text,
    progress_bar,
    tell,
)
from camelid.errors import UserError
from camelid.inputs import expand_home, read_text

Prompts = Annotated[
    Positional[tuple[str, ...]],
    arg(metavar="PROMPT...", help="texts to go on from; without one, standard input is the prompt"),
]
Texts = Annotated[
    Positional[tuple[str, ...]],
    arg(metavar="FILE...", help="rows with texts (.jsonl, .json, .parquet; .gz or .zst), or plain UTF-8 text"),
]


def generate(
    model: Checkpoint,
    prompts: Prompts = (),
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    config: Config = None,
    ignore_config_field: Ignore = (),
    tokenizer: TokenizerPath = None,
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
    loaded = load(model, dtype, config, ignore_config_field, tokenizer)
    if loaded.tokenizer is not None and loaded.tokenizer.has_chat_template:
        note("this model was tuned to chat; prompts here are plain text, without its chat template")
    completions = loaded.generate(
        texts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    if json:
        print_json({"completions": [dataclasses.asdict(completion) for completion in completions]})
    else:
        for completion in completions:
            print_text(completion.prompt + completion.text)
    if any(completion.finish_reason == "error" for completion in completions):
        sys.exit(1)


def perplexity(
    model: Checkpoint,
    files: Texts,
    sequence_length: int | None = None,
    max_tokens: int | None = None,
    text_key: str = "text",
    config: Config = None,
    ignore_config_field: Ignore = (),
    tokenizer: TokenizerPath = None,
    dtype: Dtype = "float32",
    json: bool = False,
) -> None:
    """How well a model predicts text: perplexity, loss (nats a token), bits per byte.

    camelid evaluate perplexity ./TinyLlama test.txt
    camelid evaluate perplexity ./TinyLlama test.txt --sequence-length 256 --max-tokens 100000 --json
    camelid evaluate perplexity ./TinyLlama held_out.jsonl --text-key body

    A text is a row of .jsonl, .json or .parquet, as training reads it, or the whole of any other file.
    The texts are joined, without BOS, and scored in windows; every token but the first is scored once.

    Args:
        sequence_length: tokens in a window; the model's context, at most 2048, if left out
        max_tokens: score only so many tokens from the beginning
        text_key: the key of the text in a row
        json: print one JSON object
    """
    import numpy as np

    from camelid.evaluate.perplexity import perplexity

    texts = [text for file in files for text in _texts(file, text_key)]
    loaded = load(model, dtype, config, ignore_config_field, tokenizer)
    if loaded.tokenizer is None:
        raise UserError(f"{model} has no tokenizer", "Name one with --tokenizer.")
    ids = [token for row in loaded.tokenizer.encode_batch(texts, bos=False) for token in row]
    size = sum(len(text.encode()) for text in texts)
    if max_tokens is not None and max_tokens < len(ids):
        ids = ids[:max_tokens]
        size = len(loaded.tokenizer.decode(ids).encode())
    length = sequence_length or min(2048, loaded.config.context_length)
    with progress_bar("score") as progress:
        result = perplexity(
            loaded.params, np.array(ids), size, length, loaded.config, loaded.compute, loaded.mesh, progress
        )
    if json:
        # JSON has no infinity, which the exponential of a loss above 709 is.
        shown = result if math.isfinite(result.perplexity) else dataclasses.replace(result, perplexity=None)
        return print_json(dataclasses.asdict(shown))
    print(f"perplexity     {result.perplexity:.4f}")
    print(f"loss           {result.loss:.4f} nats a token")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
    print(f"tokens         {result.tokens:,}")


def _texts(file: str, text_key: str) -> list[str]:
    """The texts of rows, as training reads them; of a file of any other kind the whole."""
    from camelid.data.config import Source
    from camelid.data.readers.sources import holds_records, read_records

    if not holds_records(path := Path(expand_home(file))):
        return [read_text(path)]
    return [record.value for record in read_records(Source(files=(file,), text_key=text_key))]


def inspect(
    model: Annotated[
        Positional[str | None], arg(metavar="MODEL", help="a checkpoint's folder, its name on the Hub, or a preset")
    ] = None,
    config: Config = None,
    ignore_config_field: Ignore = (),
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

    report = (
        describe.presets()
        if model is None
        else describe.report(model, model_config(config, ignore_config_field), ignore_config_field)
    )
    if json:
        return print_json(report)
    tell(report.get("notes", ()))
    return describe.show_presets(report) if model is None else describe.show(report)
