"""Training steps of camelid and of transformers with PEFT, each side in a process of its own.

    make bench ARGS="train"        prints a table and keeps the numbers in results/
    python benchmarks/training.py     prints one JSON object; --rounds 9 for more of them

Both sides open the same random Llama of 125M parameters and take an AdamW step on 2 rows of 512 tokens with clipping:
of all parameters, which are float32, or of LoRA adapters of rank 16 on every matrix of the layers. In bfloat16,
products are computed in it: transformers with autocast, and the frozen base of LoRA is held in it.

The processes of a cell take turns, one step each, so that other load on the machine affects all; while one works, the
others wait. The peer is the faster of eager transformers and torch.compile. `ratio` is the median of the peer's time
divided by camelid's in the same round. Peaks of memory are of the whole process, from its start. Compile times are
those of the first step, without a cache from earlier processes, less the median of the later ones.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

THREADS = 2
ROWS, LENGTH = 2, 512
RANK, ALPHA = 16, 32
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATE, BETAS, DECAY, CLIP = 1e-4, (0.9, 0.95), 0.1, 1.0
SHAPES = {
    "vocab_size": 32000,
    "embed_dim": 768,
    "mlp_dim": 2048,
    "num_layers": 12,
    "num_heads": 12,
    "num_kv_heads": 4,
    "head_dim": 64,
    "context_length": 1024,
    "norm_eps": 1e-5,
    "rope_theta": 10_000.0,
}
DEEP = 80  # layers of the model that is compiled and not run
REST_S = 0.3  # between steps of different processes: threads spin for a while after their work
KINDS, DTYPES, SIDES = ("full", "lora"), ("float32", "bfloat16"), ("camelid", "eager", "compile")
Run = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(write_twin(Path(folder) / "llama-125m"), given.rounds)))


def write_twin(folder: Path) -> Path:
    """A random checkpoint that both sides open; written by a process of its own."""
    in_a_process("write", str(folder))
    return folder


def measure(checkpoint: Path, rounds: int = 5) -> dict[str, Any]:
    """A row for each kind of training and dtype, and the seconds that compiling takes."""
    rows = [cell(checkpoint, kind, dtype, rounds) for kind in KINDS for dtype in DTYPES]
    compiled = {f"{n} layers": in_a_process("compile_only", str(n)) for n in (SHAPES["num_layers"], DEEP)}
    return {"rounds": rounds, "rows": rows, "camelid_compile_s": compiled}


def cell(checkpoint: Path, kind: str, dtype: str, rounds: int) -> dict[str, Any]:
    workers = {side: Worker(side, str(checkpoint), kind, dtype) for side in SIDES}
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, worker in workers.items():
            time.sleep(REST_S)
            times[side].append(worker.step())
    peaks = {side: worker.finish() for side, worker in workers.items()}
    middle = {side: statistics.median(values) for side, values in times.items()}
    peer = min(("eager", "compile"), key=lambda side: middle[side])
    ratio = statistics.median(a / b for a, b in zip(times[peer], times["camelid"], strict=True))
    row = {
        "name": f"train step, {kind}",
        "dtype": dtype,
        "ours": round(middle["camelid"], 4),
        "eager": round(middle["eager"], 4),
        "compile": round(middle["compile"], 4),
        "ratio": round(ratio, 3),
        "peak_bytes": peaks["camelid"],
        "peer_peak_bytes": peaks[peer],
        "memory_ratio": round(peaks["camelid"] / peaks[peer], 3),
        "compile_s": round(workers["camelid"].first - middle["camelid"], 1),
        "torch_compile_s": round(workers["compile"].first - middle["compile"], 1),
    }
    print(row, file=sys.stderr)
    return row


def environment() -> dict[str, str]:
    """Threads of torch and XLA, and no programs that earlier processes compiled."""
    threads = {"OMP_NUM_THREADS": str(THREADS), "NPROC": str(THREADS)}
    return os.environ | threads | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}


def in_a_process(task: str, *words: str) -> Any:
    command = [sys.executable, __file__, "--task", task, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment())
    return json.loads(done.stdout)


class Worker:
    """A process that takes a step whenever it is told to."""

    def __init__(self, *words: str) -> None:
        command = [sys.executable, __file__, "--task", "work", *words]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment())
        self.first = self._answer()
        self.step()  # what is compiled or allocated only at the second step

    def step(self) -> float:
        """Seconds of one step."""
        assert self._process.stdin is not None
        self._process.stdin.write("step\n")
        self._process.stdin.flush()
        return self._answer()

    def finish(self) -> int:
        """Ends the process; the most memory that it held, in bytes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        peak = self._answer()
        self._process.wait()
        return peak

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            sys.exit(f"benchmarks/training.py: a process ended with status {self._process.wait()}")
        return json.loads(line)


# Tasks that run in processes of their own. A side imports only what it needs, because its memory is measured.


def work(side: str, checkpoint: str, kind: str, dtype: str) -> None:
    """Takes a step at the start and for each line of the input; prints the seconds, and the peak at the end."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print
    sides: dict[str, Callable[..., Run]] = {
        "camelid": our_step,
        "eager": partial(their_step, compiled=False),
        "compile": partial(their_step, compiled=True),
    }
    run = sides[side](checkpoint, kind, dtype)

    def answer(value: object) -> None:
        print(json.dumps(value), file=answers, flush=True)

    def seconds() -> float:
        began = time.perf_counter()
        run()
        return time.perf_counter() - began

    answer(seconds())
    for _ in sys.stdin:
        answer(seconds())
    from memory import peak_bytes

    answer(peak_bytes())


def write(folder: str) -> None:
    import torch
    import transformers

    from camelid.checkpoint.formats.hf_config import config_to_hf
    from camelid.disk.atomic import write_json
    from camelid.model.config import ModelConfig

    Path(folder).mkdir()
    write_json(Path(folder) / "config.json", config_to_hf(ModelConfig(**SHAPES), "float32"))
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    print("null")


def compile_only(layers: str) -> None:
    """Prints the seconds in which the step of all parameters of a model with this many layers compiles."""
    import jax

    from camelid.model.config import ModelConfig
    from camelid.model.decoder import declare_decoder
    from camelid.model.params import map_specs
    from camelid.parallel.backend import prepare_backend
    from camelid.train.state import start_state

    prepare_backend()
    config = ModelConfig(**SHAPES | {"num_layers": int(layers)})
    specs = declare_decoder(config)
    step = step_of(config, specs, "bfloat16")
    params = map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, "float32"), specs)
    state = jax.eval_shape(lambda params: start_state(params, step.optimizer), params)
    began = time.perf_counter()
    jax.jit(step, donate_argnums=0).lower(state, jax.eval_shape(batch)).compile()
    print(round(time.perf_counter() - began, 1))


def step_of(config: Any, specs: Any, dtype: str) -> Any:
    """The TrainStep of a recipe with these settings; `specs` declare what is trained."""
    from camelid.model.config import ComputeConfig
    from camelid.train.objective import NextTokenLoss
    from camelid.train.optimizer import make_optimizer
    from camelid.train.optimizer_config import OptimizerConfig
    from camelid.train.schedules import learning_rate
    from camelid.train.step import TrainStep

    optimizer = OptimizerConfig(learning_rate=RATE, beta1=BETAS[0], beta2=BETAS[1], weight_decay=DECAY, clip_norm=CLIP)
    return TrainStep(
        NextTokenLoss(config=config, compute=ComputeConfig(dtype=dtype)),
        make_optimizer(optimizer, 1000, specs),
        learning_rate(optimizer, 1000),
        optimizer.clip_norm,
    )


def batch() -> dict[str, Any]:
    import jax.numpy as jnp

    tokens, shape = jnp.asarray(ids()), (ROWS, LENGTH)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": jnp.ones(shape),
        "positions": jnp.broadcast_to(jnp.arange(LENGTH), shape),
        "segments": jnp.ones(shape, jnp.int32),
    }


def ids() -> Any:
    import numpy as np

    return np.random.default_rng(0).integers(0, SHAPES["vocab_size"], (ROWS, LENGTH + 1), np.int32)


def our_step(checkpoint: str, kind: str, dtype: str) -> Run:
    import jax
    import jax.numpy as jnp

    import camelid
    from camelid.model.adapters import declare_adapters, freeze, initialize_adapters
    from camelid.model.decoder import declare_decoder
    from camelid.runs.lora_targets import plan_adapters
    from camelid.train.lora_config import LoRAConfig
    from camelid.train.state import start_state

    model = camelid.load(checkpoint, dtype=dtype if kind == "lora" else "float32")
    config, specs, trainable, frozen = model.config, declare_decoder(model.config), model.params, None
    if kind == "lora":
        plan = plan_adapters(LoRAConfig(rank=RANK, alpha=ALPHA, targets=TARGETS), config)
        specs, frozen = declare_adapters(plan, config), jax.tree.map(jnp.asarray, freeze(model.params, plan, config))
        trainable = initialize_adapters(plan, config, jax.random.key(0), model.params)
    train_step = step_of(config, specs, dtype)
    state, rows = jax.jit(lambda trainable: start_state(trainable, train_step.optimizer))(trainable), batch()
    del model, trainable
    step = jax.jit(train_step, donate_argnums=0)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, rows, frozen)
        jax.block_until_ready((state, metrics))

    return run


def their_step(checkpoint: str, kind: str, dtype: str, compiled: bool) -> Run:
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    base = getattr(torch, dtype) if kind == "lora" else torch.float32
    model: Any = transformers.LlamaForCausalLM.from_pretrained(checkpoint, dtype=base)
    if kind == "lora":
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
    model.train()
    forward = torch.compile(model) if compiled else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, betas=BETAS, weight_decay=DECAY, fused=True)
    tokens = torch.tensor(ids(), dtype=torch.int64)[:, :-1]

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


TASKS: dict[str, Callable[..., None]] = {"work": work, "write": write, "compile_only": compile_only}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--task"]:
        TASKS[sys.argv[2]](*sys.argv[3:])
    else:
        main()
