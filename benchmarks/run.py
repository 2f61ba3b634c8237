"""Training and decoding beside transformers: same weights, shapes, dtype and threads, taken in turns in one process.

    make bench                     both, and loading (load.py says how)
    make bench ARGS="train"        one of them: train, decode, load
    make bench ARGS="convert"      formats, 6.9 GB to and fro (convert.py says how); only where it is asked for

Ratios are peer / ours of median times: above 1, camelid is faster. `limit_fraction` is the share of what the machine
was measured to do in the same run: products for training, a plain read of memory for decoding.
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
import transformers
from rich.console import Console
from rich.table import Table

import camelid
from camelid.checkpoint.formats.hf_config import config_to_hf
from camelid.disk.atomic import write_json
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.decoder import declare_decoder
from camelid.model.flops import count_parameters, training_flops
from camelid.model.params import map_specs
from camelid.parallel.compilation_cache import keep_compiled
from camelid.train.objective import NextTokenLoss
from camelid.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from camelid.train.state import start_state
from camelid.train.step import TrainStep

RESULTS = Path(__file__).parent / "results"
CONFIG = ModelConfig(
    vocab_size=32000,
    embed_dim=768,
    mlp_dim=2048,
    num_layers=12,
    num_heads=12,
    num_kv_heads=4,
    head_dim=64,
    context_length=1024,
    norm_eps=1e-5,
    rope_theta=10_000.0,
)
ROWS, LENGTH = 2, 512
PROMPT, NEW = 16, 64
REST = 0.3  # seconds between sides: the threads of the one before still spin for a while
OPTIMIZER = OptimizerConfig(learning_rate=1e-4)


def main(words: list[str]) -> None:
    torch.set_num_threads(THREADS)
    keep_compiled()
    parts = {"train": bench_training, "decode": bench_decoding}
    if unknown := set(words) - {*parts, "load", "convert"}:
        sys.exit(f"benchmarks/run.py: no part {sorted(unknown)}; parts: {', '.join([*parts, 'load', 'convert'])}")
    words = words or [*parts, "load"]
    if names := [name for name in words if name in parts]:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = write_twin(Path(folder) / "llama-125m")
            rows = [
                row for name in names for dtype in ("float32", "bfloat16") for row in parts[name](checkpoint, dtype)
            ]
        show(rows)
        keep("cpu", {"rows": rows})
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


def write_twin(folder: Path) -> Path:
    """A random checkpoint that both sides open."""
    folder.mkdir()
    write_json(folder / "config.json", config_to_hf(CONFIG, "float32"))
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def bench_training(checkpoint: Path, dtype: str) -> list[dict]:
    """One AdamW step on 2 x 512 tokens with clipping; float32 weights, products in `dtype`."""
    tokens = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (ROWS, LENGTH + 1))
    sides = {"ours": our_step(checkpoint, dtype, tokens)}
    sides |= {"eager": their_step(checkpoint, dtype, tokens, compiled=False)}
    sides |= {"compile": their_step(checkpoint, dtype, tokens, compiled=True)}
    seconds = in_turns(sides, rounds=5)
    peer = min(("eager", "compile"), key=seconds.get)
    flops = training_flops(CONFIG, LENGTH) * ROWS * LENGTH
    limit = product_limit(dtype)
    return [
        row(f"train step, transformers {peer}", dtype, seconds["ours"], seconds[peer], flops / seconds["ours"] / limit)
    ]


def our_step(checkpoint: Path, dtype: str, tokens: np.ndarray) -> Callable[[], None]:
    model = camelid.load(checkpoint)
    decay = map_specs(lambda spec: spec.is_matrix, declare_decoder(CONFIG))
    optimizer = make_optimizer(OPTIMIZER, 1000, decay)
    objective = NextTokenLoss(config=CONFIG, compute=ComputeConfig(dtype=dtype))
    train_step = TrainStep(objective, optimizer, learning_rate(OPTIMIZER, 1000), OPTIMIZER.clip_norm)
    step = jax.jit(train_step, donate_argnums=0)
    state = [jax.jit(lambda params: start_state(params, optimizer))(model.params)]
    shape = (ROWS, LENGTH)
    batch = {
        "tokens": jnp.asarray(tokens[:, :-1], jnp.int32),
        "targets": jnp.asarray(tokens[:, 1:], jnp.int32),
        "weights": jnp.ones(shape),
        "positions": jnp.broadcast_to(jnp.arange(LENGTH), shape),
        "segments": jnp.ones(shape, jnp.int32),
    }

    def run() -> None:
        state[0], metrics = step(state[0], batch)
        jax.block_until_ready((state[0], metrics))

    return run


def their_step(checkpoint: Path, dtype: str, tokens: np.ndarray, compiled: bool) -> Callable[[], None]:
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=OPTIMIZER.learning_rate,
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        weight_decay=OPTIMIZER.weight_decay,
        fused=True,
    )
    ids = torch.tensor(tokens[:, :-1])

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


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
    Console(stderr=True, width=120).print(table)


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
