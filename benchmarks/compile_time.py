"""How long the training step takes to compile, by the number of layers: prints one JSON object.

    python benchmarks/compile_time.py                        12 and 80 layers of the width of the 125M model
    python benchmarks/compile_time.py --layers 2 4 --turns 1

Layers are one scan, so that the time should hardly depend on their number. Nothing is allocated: the step is compiled
for the shapes of its arrays, as `camelid train --dry-run` does it, on 2 rows of 512 tokens. Each program is compiled by
a process of its own, without a cache, and the processes take turns; the shortest times are printed.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Literal

ROWS, LENGTH = 2, 512
DTYPES = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 80])
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    programs = [(layers, dtype) for dtype in DTYPES for layers in given.layers]
    turns = [[in_a_process(*program) for program in programs] for _ in range(given.turns)]
    rows = [
        {**each[0], **{name: round(min(turn[name] for turn in each), 2) for name in ("trace_s", "compile_s")}}
        for each in zip(*turns, strict=True)
    ]
    print(json.dumps({"rows": rows}))


def in_a_process(layers: int, dtype: str) -> dict:
    """What `measure` returns, called in a process of its own."""
    command = [sys.executable, "-c", f"import compile_time; compile_time.measure({layers}, {dtype!r})"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=sys.path[0])
    return json.loads(done.stdout)


def measure(layers: int, dtype: Literal["float32", "bfloat16"]) -> None:
    """Prints seconds of tracing and of compiling the step of AdamW, and the bytes that it takes."""
    import jax

    from camelid.model.config import ComputeConfig, ModelConfig
    from camelid.model.decoder import declare_decoder
    from camelid.parallel.mesh import MeshConfig, make_mesh
    from camelid.runs.program import abstract_batch, trace_step
    from camelid.runs.recipe import recipe_of
    from camelid.runs.start import abstract_start
    from camelid.train.objective import NextTokenLoss
    from camelid.train.optimizer import make_optimizer
    from camelid.train.schedules import learning_rate
    from camelid.train.step import TrainStep

    config = ModelConfig(
        vocab_size=32000,
        embed_dim=768,
        mlp_dim=2048,
        num_layers=layers,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        context_length=1024,
        norm_eps=1e-5,
        rope_theta=10_000.0,
    )
    data = {"train": ["-"], "sequence_length": LENGTH, "batch_size": ROWS}
    recipe = recipe_of({"run": "-", "init": "-", "data": data, "train": {"steps": 1000}})
    compute, mesh = ComputeConfig(dtype=dtype), make_mesh(MeshConfig())
    optimizer = make_optimizer(recipe.optimizer, recipe.train.steps, declare_decoder(config))
    schedule = learning_rate(recipe.optimizer, recipe.train.steps)
    step = TrainStep(NextTokenLoss(config=config, compute=compute), optimizer, schedule, recipe.optimizer.clip_norm)
    state = abstract_start(config, optimizer, compute, mesh)
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        traced = trace_step(step, state, None, abstract_batch(recipe, mesh))
        middle = time.perf_counter()
        memory = traced.lower().compile().memory_analysis()
        end = time.perf_counter()
    assert memory is not None, "the CPU's compiler has an analysis"
    print(
        json.dumps(
            {
                "layers": layers,
                "dtype": dtype,
                "trace_s": middle - start,
                "compile_s": end - middle,
                "arguments_bytes": memory.argument_size_in_bytes,
                "temporaries_bytes": memory.temp_size_in_bytes,
            }
        )
    )


if __name__ == "__main__":
    main()
