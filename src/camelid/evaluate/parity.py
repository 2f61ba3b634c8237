"""Whether two checkpoints are one model: logits and loss of a text, with one layer in memory at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from camelid.checkpoint.checkpoint import Checkpoint
from camelid.errors import UserError
from camelid.model.config import Compute
from camelid.model.decoder import Decoder, Layer, declare_decoder
from camelid.model.params import Spec, build, named
from camelid.parallel.mesh import one_device
from camelid.text.tokenizer import Tokenizer

SAMPLE = (
    "The camel has a single hump; the dromedary, two; or else the other way around. I'm never sure. Are you?\n"
    "def area(radius): return 3.14159 * radius ** 2  # 1 + 2 = 3"
)
MOST = 64  # tokens of a sample


@dataclass(frozen=True)
class Parity:
    """How far the logits of two models are apart."""

    tokens: int
    largest: float
    scale: float
    """the largest logit of the first"""
    agreement: float
    """the share of places where both find the same next token likeliest"""


def compare_logits(a: Checkpoint, b: Checkpoint, tokens: Int[np.ndarray, " S"]) -> Parity:
    """The logits of the same tokens in two checkpoints, in float32."""
    ours, theirs = logits(a, tokens), logits(b, tokens)
    agree = float(np.mean(ours.argmax(-1) == theirs.argmax(-1)))
    return Parity(len(tokens), float(np.abs(ours - theirs).max()), float(np.abs(ours).max()), agree)


def sample_tokens(tokenizer: Tokenizer | None, vocab_size: int) -> Int[np.ndarray, " S"]:
    """A short text's ids; without a tokenizer, ids spread over the vocabulary."""
    if tokenizer is None:
        return np.arange(MOST) * 7919 % vocab_size
    return np.array(tokenizer.encode(SAMPLE)[:MOST]) % vocab_size


def loss(checkpoint: Checkpoint, tokens: Int[np.ndarray, " S"]) -> float:
    """Nats a token, of every token but the first; raises UserError where the logits are NaN or infinite."""
    found = logits(checkpoint, tokens)[:-1]
    if not np.isfinite(found).all():
        raise UserError(
            f"the logits of {checkpoint.folder} are NaN or infinite",
            "The checkpoint is damaged, or its training diverged: use an earlier one.",
        )
    log_sums = np.log(np.exp(found - found.max(-1, keepdims=True)).sum(-1)) + found.max(-1)
    return float(np.mean(log_sums - found[np.arange(len(found)), tokens[1:]]))


def logits(checkpoint: Checkpoint, tokens: Int[np.ndarray, " S"]) -> Float[np.ndarray, "S V"]:
    """What follows each token, in float32; a layer is read when it is computed."""
    config, specs = checkpoint.config, declare_decoder(checkpoint.config)

    def read(path: str, spec: Spec, layer: int | None) -> jax.Array:
        index = tuple(slice(0, n) for n in spec.shape[len(spec.stacked) :])
        return jnp.asarray(np.ascontiguousarray(checkpoint.read_slice(path, layer, index, np.dtype(np.float32))))

    def read_layer(index: int) -> Layer:
        inner = named(specs.layers)
        return build(specs.layers, [read(f"layers.{path}", spec, index) for path, spec in inner.items()])

    with jax.set_mesh(one_device()):
        # Without layers, every parameter that is left is read at once.
        outer = {path: None if spec.stacked else read(path, spec, None) for path, spec in named(specs).items()}
        whole: Decoder = replace(build(specs, outer.values()), layers=_Layers(read_layer, config.num_layers))
        positions = jnp.arange(len(tokens))[None]
        found, _ = whole(jnp.asarray(tokens)[None], positions, None, config, Compute())
    return np.asarray(found[0])


class _Layers(tuple):
    """A decoder's layers, each read when it is its turn."""

    def __new__(cls, read: Callable[[int], Layer], count: int) -> "_Layers":
        return super().__new__(cls)

    def __init__(self, read: Callable[[int], Layer], count: int):
        self._read, self._count = read, count

    def __iter__(self) -> Iterator[Layer]:
        return map(self._read, range(self._count))
