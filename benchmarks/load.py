"""Opening a checkpoint of 1.1B parameters beside transformers, safetensors and a plain read of its bytes.

    make bench ARGS="load"          prints a table and keeps the numbers in results/
    python benchmarks/load.py       prints one JSON object; --rounds 9 for more of them

Every load is a process of its own, and sides take turns; the files lie in the page cache. The time runs from the call
until one byte of every 4096 of every parameter has been read, because safetensors and transformers answer with a file
that is mapped but not yet there. Imports and the start of JAX come before; the peak of memory counts them as well.
A virtual machine has to ask its host for memory that it never used or gave back, which takes seconds and has nothing to
do with loading: before each load, another process uses as much and lets go of it. What is left of that noise only adds,
so the best of all rounds is compared. Takes 4.5 GB of disk and 9 GB of memory.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from memory import peak_bytes, write_random

PRESET = "tinyllama_1b"
PAGE = 4096
BLOCK = 8 * 2**20  # bytes that a plain read asks for at once
READY = 3.0  # how many times the file's bytes are touched beforehand: transformers' float32 takes 2 and the mapped file
TRIES = 4
QUICK = 4e9  # bytes a second; memory that the machine already has is touched faster than this


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    given = parser.parse_args()
    print(json.dumps(measure(given.rounds, given.folder)))


def measure(rounds: int = 5, place: Path | None = None) -> dict[str, Any]:
    """All sides in turns: a row for each, and what they come to."""
    with tempfile.TemporaryDirectory(dir=place) as folder:
        in_a_process("build", folder)
        takes: dict[tuple[str, str], list[dict]] = {side: [] for side in SIDES}
        for _ in range(rounds):
            for (name, dtype), kept in takes.items():
                in_a_process("warm", folder, name)
                kept.append(in_a_process("take", folder, name, dtype))
    rows = [summary(name, dtype, kept) for (name, dtype), kept in takes.items()]
    return {"rounds": rounds, "rows": rows, "ratios": [ratio(rows, dtype) for dtype in ("bfloat16", "float32")]}


def summary(name: str, dtype: str, takes: list[dict]) -> dict[str, Any]:
    seconds = [take["seconds"] for take in takes]
    best = min(takes, key=lambda take: take["seconds"])
    return {
        "name": name,
        "dtype": dtype,
        "best": round(min(seconds), 3),
        "median": round(statistics.median(seconds), 3),
        "returned": round(best["returned"], 3),
        "bytes": best["bytes"],
        "imports_bytes": best["imports_bytes"],
        "peak_bytes": max(take["peak_bytes"] for take in takes),
    }


def ratio(rows: list[dict], dtype: str) -> dict[str, Any]:
    """Best times of ours over theirs: below 1, camelid is faster."""
    best = {(row["name"], row["dtype"]): row["best"] for row in rows}
    ours = next(row for row in rows if (row["name"], row["dtype"]) == ("camelid", dtype))
    return {
        "dtype": dtype,
        "camelid_over_transformers": round(ours["best"] / best["transformers", dtype], 2),
        "camelid_over_read": round(ours["best"] / best["read into one buffer", ""], 2),
        "camelid_over_read_into_fresh_memory": round(ours["best"] / best["read into fresh memory", ""], 2),
        "peak_minus_size_bytes": ours["peak_bytes"] - ours["bytes"],
        "peak_minus_size_and_imports_bytes": ours["peak_bytes"] - ours["bytes"] - ours["imports_bytes"],
    }


def in_a_process(part: str, *words: object) -> Any:
    """What one of PARTS returns, run by a process of its own."""
    command = [sys.executable, __file__, part, *map(str, words)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


# What a process does ----------------------------------------------------------------------


def build(folder: str) -> None:
    """A random checkpoint in bfloat16, as safetensors and as torch.save writes it."""
    import safetensors.torch
    import torch

    from camelid.model.presets import preset

    ours, theirs = Path(folder) / "safetensors", Path(folder) / "torch"
    write_random(ours, preset(PRESET))
    theirs.mkdir()
    shutil.copyfile(ours / "config.json", theirs / "config.json")
    torch.save(safetensors.torch.load_file(ours / "model.safetensors"), theirs / "pytorch_model.bin")


def warm(folder: str, name: str) -> None:
    """Reads the file, and uses as much memory as a load will."""
    import numpy as np

    size = sum(len(block) for block in blocks(weights(folder, name), bytearray(BLOCK)))
    for _ in range(TRIES):
        began = time.perf_counter()
        np.empty(int(READY * size), np.uint8)[::PAGE] = 1
        if READY * size / (time.perf_counter() - began) > QUICK:
            break


def take(folder: str, name: str, dtype: str) -> dict[str, Any]:
    """One load, and its parameters touched."""
    call, arrays = SIDES[name, dtype](weights(folder, name), dtype)
    imports = peak_bytes()
    began = time.perf_counter()
    held = call()
    returned = time.perf_counter()
    size = 0
    for array in arrays(held):
        size += array.nbytes
        array.reshape(-1)[::PAGE].sum()
    ended = time.perf_counter()
    peak = peak_bytes()
    return {
        "seconds": ended - began,
        "returned": returned - began,
        "bytes": size,
        "imports_bytes": imports,
        "peak_bytes": peak,
    }


def weights(folder: str, name: str) -> Path:
    return Path(folder, *(("torch", "pytorch_model.bin") if ".bin" in name else ("safetensors", "model.safetensors")))


def blocks(file: Path, buffer: bytearray | None) -> Iterator[memoryview]:
    """A file's bytes in order, read into one buffer or, without, into memory for all of them."""
    import numpy as np

    size = file.stat().st_size
    whole = None if buffer is not None else np.empty(size, np.uint8).data
    descriptor, start = os.open(file, os.O_RDONLY), 0
    while start < size:
        view = memoryview(buffer) if whole is None else whole[start : start + BLOCK]
        count = os.preadv(descriptor, [view], start)
        yield view[:count]
        start += count
    os.close(descriptor)


# Sides: each imports what it needs, then gives the call that is timed, and its result as arrays of bytes -------------

Side = tuple[Callable[[], Any], Callable[[Any], Iterable[Any]]]


def read_into_one_buffer(file: Path, dtype: str) -> Side:
    import numpy as np

    buffer = bytearray(BLOCK)
    buffer[::PAGE] = b"\1" * (BLOCK // PAGE)
    return lambda: sum(map(len, blocks(file, buffer))), lambda size: [np.broadcast_to(np.uint8(0), size)][:0]


def read_into_fresh_memory(file: Path, dtype: str) -> Side:
    import numpy as np

    return lambda: list(blocks(file, None)), lambda held: map(np.asarray, held)


def safetensors_alone(file: Path, dtype: str) -> Side:
    import safetensors.torch

    return lambda: safetensors.torch.load_file(file), lambda held: map(torch_bytes, held.values())


def torch_alone(file: Path, dtype: str) -> Side:
    import torch

    return lambda: torch.load(file, weights_only=True), lambda held: map(torch_bytes, held.values())


def transformers_model(file: Path, dtype: str) -> Side:
    import torch
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401  from_pretrained would import it

    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    return lambda: load(file.parent, dtype=getattr(torch, dtype)), lambda model: map(torch_bytes, model.parameters())


def camelid_model(file: Path, dtype: str) -> Side:
    import jax
    import numpy as np

    import camelid.api

    jax.devices()

    def arrays(model: camelid.api.Model) -> Iterator[np.ndarray]:
        for leaf in jax.tree.leaves(model.params):
            yield np.asarray(leaf).reshape(-1).view(np.uint8)

    def load() -> camelid.api.Model:
        model = camelid.load(file.parent, dtype=dtype)
        jax.block_until_ready(model.params)
        return model

    return load, arrays


def torch_bytes(tensor: Any) -> Any:
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8).numpy()


SIDES: dict[tuple[str, str], Callable[[Path, str], Side]] = {
    ("read into one buffer", ""): read_into_one_buffer,
    ("read into fresh memory", ""): read_into_fresh_memory,
    ("safetensors load_file", "bfloat16"): safetensors_alone,
    ("transformers", "bfloat16"): transformers_model,
    ("camelid", "bfloat16"): camelid_model,
    ("transformers", "float32"): transformers_model,
    ("camelid", "float32"): camelid_model,
    ("torch.load .bin", "bfloat16"): torch_alone,
    ("camelid .bin", "bfloat16"): camelid_model,
}

PARTS = {"build": build, "warm": warm, "take": take}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in PARTS:
        print(json.dumps(PARTS[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
