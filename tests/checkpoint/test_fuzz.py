"""Files damaged at random, in every format: a clear error or values that were read, quickly and in little memory.

CAMELID_FUZZ=N damages each format's files N times instead of CASES.
"""

import functools
import json
import os
import random
import resource
import signal
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from camelid.checkpoint.checkpoint import Checkpoint
from camelid.checkpoint.containers.mindspore_file import TRAILER
from camelid.checkpoint.convert import convert
from camelid.checkpoint.registry import open_checkpoint
from camelid.errors import UserError
from tiny import save_hf, tiny_config, tiny_params, transformers_twin

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux to bound its memory")
CASES = int(os.environ.get("CAMELID_FUZZ", "40"))
SECONDS = 2.0  # of this process; some milliseconds are usual
BYTES = 32 * 2**20  # at once; the files have a tenth of a megabyte
CONFIG = tiny_config(
    vocab_size=32, embed_dim=32, mlp_dim=32, num_layers=2, num_heads=4, head_dim=8, bos_id=1, eos_ids=(2,)
)

# What is damaged --------------------------------------------------------------------------

Make = Callable[[Path, Path], object]
"""from a Hugging Face folder and a new one"""


def by_convert(to: str, **shards: Any) -> Make:
    return lambda source, folder: convert(source, folder, to=to, **shards)


def torch_bin(*, zipped: bool) -> Make:
    """Hugging Face's older form."""

    def make(source: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_bytes((source / "config.json").read_bytes())
        twin = transformers_twin(CONFIG, tiny_params(CONFIG))
        torch.save(twin.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)

    return make


def with_checksum(source: Path, folder: Path) -> None:
    """MindSpore's, with its trailer."""
    convert(source, folder, to="mindspore")
    content = (folder / "model.ckpt").read_bytes()
    (folder / "model.ckpt").write_bytes(content + TRAILER + zlib.crc32(content).to_bytes(10, "big"))


TARGETS: dict[str, tuple[str, Make]] = {
    "hf": ("hf", by_convert("hf")),
    "hf, two files": ("hf", by_convert("hf", shards=2)),
    "hf, .bin": ("hf", torch_bin(zipped=True)),
    "hf, .bin before 2020": ("hf", torch_bin(zipped=False)),
    "meta": ("meta", by_convert("meta")),
    "meta, two shards": ("meta", by_convert("meta", tensor_parallel=2)),
    "easylm": ("easylm", by_convert("easylm")),
    "easylm-flax": ("easylm-flax", by_convert("easylm-flax")),
    "mindspore": ("mindspore", by_convert("mindspore")),
    "mindspore, 2 x 2": ("mindspore", by_convert("mindspore", tensor_parallel=2, pipeline_parallel=2)),
    "mindspore, with a checksum": ("mindspore", with_checksum),
    "megatron": ("megatron", by_convert("megatron")),
    "megatron, 2 x 2": ("megatron", by_convert("megatron", tensor_parallel=2, pipeline_parallel=2)),
    "megatron-legacy": ("megatron-legacy", by_convert("megatron-legacy")),
    "llama2-jax": ("llama2-jax", by_convert("llama2-jax")),
    **{name: (name, by_convert(name)) for name in ("llama2c", "llama2c-v1", "llama2c-v2")},
    **{name: (name, by_convert(name)) for name in ("gguf", "gguf-q8_0", "gguf-q4_0")},
}
# Where a checksum covers every tensor, the files that have one: damage in them is never read as numbers.
CHECKED = {
    "hf, .bin": ".bin",
    "meta": ".pth",
    "meta, two shards": ".pth",
    "mindspore, with a checksum": ".ckpt",
    "megatron": ".pt",
    "megatron, 2 x 2": ".pt",
    "megatron-legacy": ".pt",
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """From the name of a target to its folder."""
    folder = tmp_path_factory.mktemp("fuzz")
    source = save_hf(transformers_twin(CONFIG, tiny_params(CONFIG)), folder / "source")

    @functools.cache
    def make(name: str) -> Path:
        TARGETS[name][1](source, folder / name)
        return folder / name

    return make


# How --------------------------------------------------------------------------------------


def place(draw: random.Random, content: bytes) -> int:
    """Anywhere, but mostly where heads and directories lie, at the beginning and the end."""
    size = len(content)
    first, last = draw.choice(((0, 64), (0, 4096), (size - 4096, size), (0, size)))
    return draw.randrange(max(first, 0), max(min(last, size), 1))


def flipped(draw: random.Random, content: bytes) -> bytes:
    held = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = place(draw, content)
        held[at] = draw.choice((held[at] ^ 1 << draw.randrange(8), draw.randrange(256), 0x30 + draw.randrange(10)))
    return bytes(held)


def overwritten(draw: random.Random, content: bytes) -> bytes:
    at, length = place(draw, content), draw.choice((1, 4, 8, 100, 5000))
    return (content[:at] + draw.choice((b"\0", b"\xff", b"9", b"[")) * length + content[at + length :])[: len(content)]


def swapped(draw: random.Random, content: bytes) -> bytes:
    a, b = sorted((place(draw, content), place(draw, content)))
    length = min(draw.choice((1, 8, 64, 2000)), b - a, len(content) - b)
    held = bytearray(content)
    held[a : a + length], held[b : b + length] = content[b : b + length], content[a : a + length]
    return bytes(held)


def cut(draw: random.Random, content: bytes) -> bytes:
    return content[: place(draw, content)]


def without(draw: random.Random, content: bytes) -> bytes:
    at = place(draw, content)
    return content[:at] + content[at + draw.choice((1, 4, 64, 3000)) :]


def filled(draw: random.Random, content: bytes) -> bytes:
    at = place(draw, content)
    return content[:at] + draw.randbytes(draw.choice((1, 4, 64, 3000))) + content[at:]


DAMAGES = (flipped, flipped, flipped, overwritten, swapped, cut, without, filled)

# What comes of it -------------------------------------------------------------------------


class TooSlow(BaseException):
    """Not an Exception, which a reader may take for a fault of the file."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raises TooSlow in code that runs for more than SECONDS, and MemoryError where it asks for more than BYTES."""

    def stop(signum: int, frame: object) -> None:
        raise TooSlow

    before, limits = signal.signal(signal.SIGVTALRM, stop), resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, limits[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.signal(signal.SIGVTALRM, before)


def values(checkpoint: Checkpoint) -> dict[tuple[str, int | None], bytes]:
    """All numbers, a layer at a time."""
    found = {}
    for path, part in checkpoint.table.entries.items():
        shape = part.spec.shape[len(part.spec.stacked) :]
        for layer in range(part.spec.shape[0]) if part.spec.stacked else [None]:
            index = tuple(slice(0, n) for n in shape)
            found[path, layer] = checkpoint.read_slice(path, layer, index, np.dtype(np.float32)).tobytes()
    return found


def read(folder: Path, format: str) -> dict | None:
    """All numbers; None for a UserError."""
    try:
        with np.errstate(all="ignore"):  # numbers of a damaged file may be anything
            return values(open_checkpoint(folder, format))
    except UserError as error:
        refusal = error
    assert refusal.problem
    assert refusal.advice
    assert not isinstance(refusal.__context__, MemoryError), refusal.problem
    return None


@pytest.mark.parametrize("name", TARGETS)
def test_damage_is_an_error_or_numbers_and_never_anything_else(sound: Callable[[str], Path], name: str):
    folder, format = sound(name), TARGETS[name][0]
    files = sorted(file for file in folder.rglob("*") if file.is_file() and "manifest" not in file.name)
    original = read(folder, format)
    assert original is not None
    refused = 0
    for case in range(CASES):
        draw = random.Random(f"{name} {case}")
        file, damage = draw.choice(files), draw.choice(DAMAGES)
        content = file.read_bytes()
        damaged = damage(draw, content)
        file.write_bytes(damaged)
        try:
            with bounded():
                found = read(folder, format)
        except BaseException as error:
            error.add_note(f"case {case} of {name}: {damage.__name__} in {file.name}")
            raise
        finally:
            file.write_bytes(content)
        refused += found is None
        if found is not None and name in CHECKED and file.suffix == CHECKED[name]:
            assert found == original, f"case {case} of {name}: {damage.__name__} in {file.name}"
    assert refused > CASES // 10


@pytest.mark.parametrize("name", TARGETS)
def test_each_missing_file_is_an_error_or_not_needed(sound: Callable[[str], Path], name: str):
    folder, format = sound(name), TARGETS[name][0]
    original = read(folder, format)
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        content = file.read_bytes()
        file.unlink()
        with bounded():
            assert read(folder, format) in (None, original), file
        file.write_bytes(content)


# What chance does not find ----------------------------------------------------------------


@pytest.mark.parametrize("layers", [9_999, 10**12])
@pytest.mark.parametrize("name", TARGETS)
def test_an_absurd_number_of_layers_costs_nothing(sound: Callable[[str], Path], name: str, layers: int):
    folder, format = sound(name), TARGETS[name][0]
    file = folder / "config.json"
    content = file.read_bytes()
    file.write_text(json.dumps(json.loads(content) | {"num_hidden_layers": layers}))
    with bounded():
        found = read(folder, format)
    file.write_bytes(content)
    assert found is None or format.startswith("gguf")  # which leaves a config.json out that is not of its model


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "1" * 10**5])
def test_json_without_end_is_refused(sound: Callable[[str], Path], text: str):
    folder = sound("hf")
    for file, content in (
        (folder / "config.json", text.encode()),
        (folder / "model.safetensors", len(text).to_bytes(8, "little") + text.encode()),
    ):
        before = file.read_bytes()
        file.write_bytes(content)
        with bounded():
            assert read(folder, "hf") is None
        file.write_bytes(before)
