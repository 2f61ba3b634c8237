"""Commands for checkpoints of any format: from one to another, and how two differ."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from camelid.cli.shared import model_config, note, print_json, progress_bar
from camelid.errors import UserError

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

    described = None if config is None else model_config(config)
    with progress_bar("convert") as progress:
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
    for text in notes:
        note(f"note: {text}")
    note(f"wrote {destination}")
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
    with progress_bar("compare") as progress:
        found = list(compare(*opened, progress))
    differ = [difference for difference in found if not difference.equal]
    if json:
        print_json({"config": config, "parameters": [dataclasses.asdict(difference) for difference in found]})
    else:
        for name, (ours, theirs) in config.items():
            print(f"{name}: {ours} and {theirs}")
        for difference in differ:
            print(f"{difference.path}: {' and '.join(difference.dtypes)}, at most {difference.largest:.3g} apart")
        print(f"{len(found) - len(differ)} of {len(found)} parameters are equal")
    if config or differ:
        sys.exit(1)


def _verify(source: str, written: Path, format: str | None, config, to: str) -> None:
    """Says how far what was written is from its source."""
    import numpy as np

    from camelid.api import load
    from camelid.checkpoint.compare import compare
    from camelid.checkpoint.formats import FORMATS, open_checkpoint

    with progress_bar("verify") as progress:
        found = list(compare(open_checkpoint(source, format, config), open_checkpoint(written, to), progress))
    if all(difference.equal for difference in found):
        note("every tensor is equal")
    else:
        note(f"tensors were rounded: they are at most {max(difference.largest for difference in found):.3g} apart")
    if not FORMATS[to].lossy and not all(difference.rounded for difference in found):
        raise UserError(f"{written} does not hold what {source} does", "This is a fault of camelid; please report it.")
    models = (load(source, format=format, config=config), load(written, format=to))
    tokens = np.arange(32)[None] % models[0].config.vocab_size
    before, after = (np.asarray(model.logits(tokens)) for model in models)
    agree = np.mean(before.argmax(-1) == after.argmax(-1))
    note(f"logits of 32 tokens are at most {np.abs(before - after).max():.3g} apart; {agree:.0%} agree on the next one")
