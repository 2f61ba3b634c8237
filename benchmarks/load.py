"""Opening a checkpoint of 1.1B parameters beside transformers, safetensors and a plain read of its bytes.

    make bench ARGS="load"          prints a table and keeps the numbers in results/
    python benchmarks/load.py       prints one JSON object; --rounds 9 for more of them

Every load is a process of its own, and sides take turns; the files lie in the page cache. The time runs from the call
until one byte of every 4096 of every parameter has been read: safetensors and transformers answer with a mapped file,
of which nothing has been touched yet. Where they keep the files' dtype they stay there and copy nothing, which no one
who reads into memory can match; `pread` and `disable_mmap` make them read as well. Imports and the start of JAX come
before the time; the peak of memory counts them, and pages of a mapped file.

A virtual machine has to ask its host for memory that it never used or gave back. That takes seconds and has nothing to
do with loading, so before each load another process uses as much and lets go of it. What noise is left only adds: the
best of all rounds is compared. Takes 4.5 GB of disk and 8 GB of memory, and the page cache wants 5 more.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from memory import peak_bytes, write_random

PRESET = "tinyllama_1b"
PAGE = 4096
BLOCK = 2**21  # bytes that a plain read asks for at once
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
    found = {(row["name"], row["dtype"]): row for row in rows}
    ours = found[OURS, dtype]

    def over(name: str, dtype: str) -> float:
        return round(ours["best"] / found[name, dtype]["best"], 2)

    return {
        "dtype": dtype,
        "over_transformers": over(THEIRS, dtype),
        "over_disable_mmap": over(IN_MEMORY, dtype),
        "over_read": over(READ, ""),
        "over_fresh_read": over(FRESH, ""),
        "above_size_bytes": ours["peak_bytes"] - ours["bytes"],
        "without_imports_bytes": ours["peak_bytes"] - ours["bytes"] - ours["imports_bytes"],
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

    file = weights(folder, name)
    read, _ = read_into_one_buffer(file, "")
    read()
    count = int(READY * file.stat().st_size)
    for _ in range(TRIES):
        began = time.perf_counter()
        np.empty(count, np.uint8)[::PAGE] = 1
        if count / (time.perf_counter() - began) > QUICK:
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


# Sides: each imports what it needs, then gives the call that is timed, and its result as arrays of bytes -------------

Side = tuple[Callable[[], Any], Callable[[Any], Iterable[Any]]]


def read_into_one_buffer(file: Path, dtype: str) -> Side:
    import numpy as np

    buffer = np.ones(BLOCK, np.uint8)

    def read() -> None:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass

    return read, lambda nothing: []


def read_into_fresh_memory(file: Path, dtype: str) -> Side:
    import numpy as np

    def read() -> np.ndarray:
        whole = np.empty(file.stat().st_size, np.uint8)
        rest = whole.data
        with file.open("rb", buffering=0) as opened:
            while rest:
                rest = rest[opened.readinto(rest) :]
        return whole

    return read, lambda whole: [whole]


def safetensors_file(file: Path, dtype: str, **how: Any) -> Side:
    import safetensors.torch

    return lambda: safetensors.torch.load_file(file, **how), lambda held: map(torch_bytes, held.values())


def torch_file(file: Path, dtype: str) -> Side:
    import torch

    return lambda: torch.load(file, weights_only=True), lambda held: map(torch_bytes, held.values())


def transformers_model(file: Path, dtype: str, **how: Any) -> Side:
    import torch
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401  from_pretrained would import it

    transformers.utils.logging.disable_progress_bar()
    how |= {"dtype": getattr(torch, dtype)}
    load = transformers.AutoModelForCausalLM.from_pretrained
    return lambda: load(file.parent, **how), lambda model: map(torch_bytes, model.parameters())


def camelid_model(file: Path, dtype: str) -> Side:
    import jax
    import numpy as np

    import camelid.api
    from camelid.parallel.mesh import one_device

    one_device()  # starts JAX

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


READ, FRESH = "read into one buffer", "read into fresh memory"
OURS, THEIRS, IN_MEMORY = "camelid", "transformers", "transformers, disable_mmap"
SIDES: dict[tuple[str, str], Callable[[Path, str], Side]] = {
    (READ, ""): read_into_one_buffer,
    (FRESH, ""): read_into_fresh_memory,
    ("safetensors", "bfloat16"): safetensors_file,
    ("safetensors, pread", "bfloat16"): partial(safetensors_file, backend="pread"),
    (THEIRS, "bfloat16"): transformers_model,
    (IN_MEMORY, "bfloat16"): partial(transformers_model, disable_mmap=True),
    (OURS, "bfloat16"): camelid_model,
    (THEIRS, "float32"): transformers_model,
    (IN_MEMORY, "float32"): partial(transformers_model, disable_mmap=True),
    (OURS, "float32"): camelid_model,
    ("torch.load, .bin", "bfloat16"): torch_file,
    ("camelid, .bin", "bfloat16"): camelid_model,
}

PARTS = {"build": build, "warm": warm, "take": take}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in PARTS:
        print(json.dumps(PARTS[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
