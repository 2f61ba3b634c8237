"""How much memory loading and converting a checkpoint take: prints one JSON object.

    python benchmarks/memory.py                     a random checkpoint of 2 GB
    python benchmarks/memory.py --bytes 300e6       of 300 MB

Each is done by a process of its own, whose peak is the kernel's; its start and its imports count.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imports count
    from camelid.model.config import ModelConfig

SHAPES = {"vocab_size": 32_000, "embed_dim": 1024, "mlp_dim": 4096, "num_heads": 16, "num_kv_heads": 8, "head_dim": 64}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=float, default=2e9, help="of the checkpoint's tensors, about")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        source, converted = Path(folder) / "source", Path(folder) / "converted"
        report = {
            "checkpoint": in_a_process("build", source, given.bytes),
            "load": in_a_process("load", source),
            "convert": in_a_process("convert", source, converted),
        }
    print(json.dumps(report))


def in_a_process(part: str, *words: object) -> dict:
    """What one of PARTS returns, run by a process of its own."""
    command = [sys.executable, __file__, part, *map(str, words)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def build(folder: str, size: str) -> dict:
    """A random checkpoint in bfloat16 of about `size` bytes."""
    from camelid.model.config import ModelConfig
    from camelid.model.flops import count_parameters

    def config(layers: int) -> ModelConfig:
        return ModelConfig(num_layers=layers, context_length=2048, norm_eps=1e-5, rope_theta=10_000.0, **SHAPES)

    one, two = (2 * count_parameters(config(layers)) for layers in (1, 2))
    sized = config(max(1, round(1 + (float(size) - one) / (two - one))))
    write_random(Path(folder), sized)
    return {"dtype": "bfloat16", "bytes": 2 * count_parameters(sized)}


def write_random(folder: Path, config: "ModelConfig") -> None:
    """A random checkpoint in bfloat16."""
    import numpy as np

    from camelid.checkpoint.checkpoint import ExportSpec
    from camelid.checkpoint.registry import write_checkpoint
    from camelid.checkpoint.tensors import dtype_named
    from camelid.model.decoder import declare_decoder
    from camelid.model.params import named

    draw = np.random.default_rng(0)

    def source(path, layer, index, dtype) -> np.ndarray:
        return draw.standard_normal([s.stop - s.start for s in index], np.float32).astype(dtype)

    dtypes = dict.fromkeys(named(declare_decoder(config)), dtype_named("bfloat16"))
    write_checkpoint(folder, ExportSpec(config, dtypes, source), workers=1)  # the draws are of one thread


def load(folder: str) -> dict:
    """The checkpoint in its own dtype."""
    import jax

    import camelid.api

    start = peak_bytes()
    model = camelid.load(folder, dtype=None)
    jax.block_until_ready(model.params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    return {"dtype": model.compute.dtype, "bytes": size, "imports_bytes": start, "peak_bytes": peak_bytes()}


def convert(source: str, destination: str) -> dict:
    """The checkpoint written anew in float32."""
    from camelid.checkpoint.convert import convert

    start = peak_bytes()
    convert(source, destination, dtype="float32")
    size = sum(file.stat().st_size for file in Path(destination).glob("*.safetensors"))
    return {"dtype": "float32", "bytes": size, "imports_bytes": start, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """The most memory that this process has held."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: there a new process begins with the peak of the one that started it.
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


PARTS = {"build": build, "load": load, "convert": convert}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in PARTS:
        print(json.dumps(PARTS[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
