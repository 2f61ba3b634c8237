"""Converting a checkpoint of 3B parameters between formats, beside a copy of the same files.

    make bench ARGS="convert"          prints a table and keeps the numbers in results/
    python benchmarks/convert.py       prints one JSON object; --preset tinyllama_1b for a smaller one

Each conversion and each copy is a process of its own; before it, its source is read into the page cache and everything
else is on the disk. Both end when what they wrote is on the disk (fsync); they take turns, and the best time of each
counts, because other work on the machine only adds. `ratio` is the time of the copy of the source over that of the
conversion: 0.5 is half as fast as copying. The peak of memory counts imports. Takes 30 GB of disk for
the 6.9 GB of openllama_3b in bfloat16; llama2.c holds float32 alone, so twice as much is written there.
"""

import argparse
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# From, to, options, and whether every matrix of a layer is transposed on the way.
WAYS: tuple[tuple[str, str, dict[str, Any], bool], ...] = (
    ("hf", "hf", {"shards": 4}, False),
    ("hf", "meta", {}, False),
    ("meta", "hf", {}, False),
    ("hf", "megatron", {"tensor_parallel": 2}, False),
    ("megatron", "hf", {}, False),
    ("hf", "llama2c", {}, False),
    ("llama2c", "hf", {"dtype": "bfloat16"}, False),
    ("hf", "easylm", {}, True),
    ("easylm", "hf", {}, True),
    ("hf", "llama2-jax", {}, True),
    ("llama2-jax", "hf", {}, True),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="openllama_3b")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    print(json.dumps(measure(given.preset, given.folder, given.rounds)))


def measure(preset: str = "openllama_3b", place: Path | None = None, rounds: int = 2) -> dict[str, Any]:
    """A row for every way."""
    rows = []
    with tempfile.TemporaryDirectory(dir=place) as folder:
        base = Path(folder)
        in_a_process("build", preset, str(base / "hf"))
        for source, to, options, transposed in WAYS:
            out = base / ("again" if to == "hf" else to)
            copies, conversions = [], []
            for _ in range(rounds):
                copies.append(in_a_process("copy", str(base / source), str(base / "copy")))
                shutil.rmtree(base / "copy")
                shutil.rmtree(out, ignore_errors=True)
                conversions.append(in_a_process("convert", str(base / source), str(out), to, json.dumps(options)))
            copied, made = (min(takes, key=lambda take: take["seconds"]) for takes in (copies, conversions))
            rows.append(
                {
                    "from": source,
                    "to": to,
                    "transposed": transposed,
                    "bytes": copied["bytes"],
                    "written_bytes": bytes_of(out),
                    "seconds": round(made["seconds"], 2),
                    "copy_seconds": round(copied["seconds"], 2),
                    "ratio": round(copied["seconds"] / made["seconds"], 2),
                    "peak_bytes": max(take["peak_bytes"] for take in conversions),
                }
            )
            print(rows[-1], file=sys.stderr)
            if to == "hf":
                shutil.rmtree(out)
                if source != "hf":
                    shutil.rmtree(base / source)
    return {"preset": preset, "rows": rows}


def in_a_process(task: str, *words: str) -> dict[str, Any]:
    if task != "build":
        for file in files(Path(words[0])):
            with file.open("rb", buffering=0) as opened:
                while opened.read(2**24):
                    pass
        os.sync()
    done = subprocess.run([sys.executable, __file__, "--task", task, *words], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def files(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in files(folder))


def build(preset: str, folder: str) -> dict[str, Any]:
    """A random checkpoint in bfloat16: one block of numbers over and over, which no part of a conversion can notice."""
    import numpy as np

    from camelid.checkpoint.checkpoint import ExportSpec
    from camelid.checkpoint.registry import write_checkpoint
    from camelid.checkpoint.tensors import dtype_named
    from camelid.model.decoder import declare_decoder
    from camelid.model.params import named
    from camelid.model.presets import preset as config_of

    # llama2.c computes with no other epsilon.
    config, bfloat16 = dataclasses.replace(config_of(preset), norm_eps=1e-5), dtype_named("bfloat16")
    block = np.random.default_rng(0).standard_normal(2**22 + 1, np.float32).astype(bfloat16)
    write_checkpoint(
        Path(folder),
        ExportSpec(
            config,
            dict.fromkeys(named(declare_decoder(config)), bfloat16),
            lambda path, layer, index, dtype: np.resize(block, [s.stop - s.start for s in index]),
        ),
    )
    return {}


def copy(source: str, destination: str) -> dict[str, Any]:
    start = time.perf_counter()
    shutil.copytree(source, destination)
    for file in files(Path(destination)):
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    return {"seconds": time.perf_counter() - start, "bytes": bytes_of(Path(source))}


def convert(source: str, destination: str, to: str, options: str) -> dict[str, Any]:
    from camelid.checkpoint.convert import convert as camelid_convert

    start = time.perf_counter()
    camelid_convert(source, destination, to=to, **json.loads(options))
    seconds = time.perf_counter() - start
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": seconds, "peak_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--task"]:
        print(json.dumps({"build": build, "copy": copy, "convert": convert}[sys.argv[2]](*sys.argv[3:])))
    else:
        main()
