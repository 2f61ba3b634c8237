"""Training and decoding beside transformers: same weights, shapes, dtype and threads, taken in turns.

    make bench                     both, and loading
    make bench ARGS="train"        one of them: train (training.py says how), decode, load (load.py)
    make bench ARGS="convert"      formats, 6.9 GB to and fro (convert.py says how); only where it is asked for

Ratios are peer / ours of median times: above 1, camelid is faster. `limit_fraction` is the share of what the machine
was measured to do in the same run: products for training, a plain read of memory for decoding. Decoding runs in one
process.
"""

import os

THREADS = 2
os.environ["OMP_NUM_THREADS"] = os.environ["NPROC"] = str(THREADS)  # read by torch and by XLA when they start

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import convert
import jax
import jax.numpy as jnp
import load
import numpy as np
import torch
import training
import transformers
from rich.console import Console
from rich.table import Table

import camelid
from camelid.model.config import ModelConfig
from camelid.model.flops import count_parameters, training_flops
from camelid.parallel.compilation_cache import keep_compiled

RESULTS = Path(__file__).parent / "results"
CONFIG = ModelConfig(**training.SHAPES)
ROWS, LENGTH = training.ROWS, training.LENGTH
PROMPT, NEW = 16, 64
REST = 0.3  # seconds between sides: the threads of the one before still spin for a while


def main(words: list[str]) -> None:
    torch.set_num_threads(THREADS)
    keep_compiled()
    parts = ("train", "decode", "load", "convert")
    if unknown := set(words) - {*parts}:
        sys.exit(f"benchmarks/run.py: no part {sorted(unknown)}; parts: {', '.join(parts)}")
    words = words or ["train", "decode", "load"]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "llama-125m"
        if "train" in words or "decode" in words:
            training.write_twin(checkpoint)
        if "train" in words:
            report = bench_training(checkpoint)
            show(report["rows"])
            keep("cpu-train", report)
        if "decode" in words:
            rows = [row for dtype in training.DTYPES for row in bench_decoding(checkpoint, dtype)]
            show(rows)
            keep("cpu-decode", {"rows": rows})
    if "load" in words:
        report = load.measure()
        show(report["rows"])
        show(report["ratios"])
        keep("cpu-load", report)
    if "convert" in words:
        report = convert.measure()
        show(report["rows"])
        keep("cpu-convert", report)


def keep(name: str, measured: dict) -> None:
    """Written to results/ with what it was measured on, and printed."""
    RESULTS.mkdir(exist_ok=True)
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    kept = {"machine": machine(), "commit": commit(), "GLIBC_TUNABLES": tunables, **measured}
    (RESULTS / f"{time.strftime('%Y-%m-%d')}-{name}.json").write_text(json.dumps(kept, indent=2) + "\n")
    print(json.dumps(measured))


def bench_training(checkpoint: Path) -> dict:
    """The rows of training.py, with the fraction of the machine's limit that camelid reaches, and compile times."""
    measured = training.measure(checkpoint)
    limits = {dtype: product_limit(dtype) for dtype in training.DTYPES}
    for entry in measured["rows"]:
        flops = ROWS * LENGTH * training_flops(CONFIG, LENGTH, frozen="lora" in entry["name"])
        entry["limit_fraction"] = round(flops / entry["ours"] / limits[entry["dtype"]], 3)
    return measured


def bench_decoding(checkpoint: Path, dtype: str) -> list[dict]:
    """Greedy decoding of one row: 16 tokens of prompt, 64 new ones."""
    prompt = np.random.default_rng(1).integers(0, CONFIG.vocab_size, PROMPT).tolist()
    ours = camelid.load(checkpoint, dtype=dtype)
    theirs = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
    ids = torch.tensor([prompt])

    def their_generate() -> None:
        with torch.inference_mode():
            theirs.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)

    big = torch.ones(2**28 // 4)
    sides = {
        "ours": lambda: ours.generate([prompt], max_new_tokens=NEW),
        "peer": their_generate,
        "read": lambda: big.sum(),
    }
    seconds = in_turns(sides, rounds=5)
    read = (count_parameters(CONFIG) - CONFIG.vocab_size * CONFIG.embed_dim) * jnp.dtype(dtype).itemsize * NEW
    limit = big.nbytes / seconds["read"]
    return [row("decode, batch 1", dtype, seconds["ours"] / NEW, seconds["peer"] / NEW, read / seconds["ours"] / limit)]


def product_limit(dtype: str) -> float:
    """The most floating-point operations a second of a product of the model's shape, by either library."""
    x = jnp.ones((ROWS * LENGTH, CONFIG.embed_dim), dtype)
    w = jnp.ones((CONFIG.mlp_dim * 2, CONFIG.embed_dim), dtype)
    ours = jax.jit(lambda x, w: jnp.einsum("be,me->bm", x, w, preferred_element_type=jnp.float32))
    a, b = (torch.ones(*y.shape, dtype=getattr(torch, dtype)) for y in (x, w))
    seconds = in_turns({"ours": lambda: ours(x, w).block_until_ready(), "theirs": lambda: a @ b.T}, rounds=30)
    return 2 * x.size * w.shape[0] / min(seconds.values())


def in_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each side; they run one after another in every round, so that noise falls on all."""
    for run in sides.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            time.sleep(REST)
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in times.items()}


def row(name: str, dtype: str, ours: float, peer: float, limit_fraction: float) -> dict:
    rounded = {"ours": round(ours, 5), "peer": round(peer, 5), "ratio": round(peer / ours, 3)}
    return {"name": name, "dtype": dtype, **rounded, "limit_fraction": round(limit_fraction, 3), "unit": "s"}


def show(rows: list[dict]) -> None:
    table = Table(title=machine())
    for column in rows[0]:
        words = column in ("name", "dtype", "unit")
        table.add_column(column.replace("bytes", "MB"), justify="left" if words else "right")
    for entry in rows:
        table.add_row(*(f"{v / 1e6:,.0f}" if k.endswith("bytes") else str(v) for k, v in entry.items()))
    Console(stderr=True, width=160).print(table)


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    versions = f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{names[0] if names else platform.processor()}, {THREADS} threads; {versions}"


def commit() -> str:
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return git.stdout.strip() or "unknown"


if __name__ == "__main__":
    main(sys.argv[1:])
