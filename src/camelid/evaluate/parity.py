"""Comparison of the logits of two checkpoints, computed with the weights of one layer in memory at a time."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from camelid.checkpoint.checkpoint import Checkpoint
from camelid.errors import UserError
from camelid.model.config import ComputeConfig
from camelid.model.context import Context
from camelid.model.decoder import Decoder, Layer, declare_decoder, run_layers
from camelid.model.params import Spec, build, named
from camelid.parallel.mesh import one_device
from camelid.text.tokenizer import Tokenizer

SAMPLE = (
    "The camel has a single hump; the dromedary, two; or else the other way around. I'm never sure. Are you?\n"
    "def area(radius): return 3.14159 * radius ** 2  # 1 + 2 = 3"
)
SAMPLE_TOKENS = 64  # most tokens of a sample


@dataclass(frozen=True)
class LogitsDifference:
    """How much the logits of two checkpoints differ."""

    tokens: int
    """number of positions that were compared"""
    max_difference: float
    """largest absolute difference of two logits; NaN if a logit is NaN"""
    max_logit: float
    """largest absolute logit of the first checkpoint"""
    agreement: float
    """fraction of positions at which both predict the same next token"""


def compare_logits(a: Checkpoint, b: Checkpoint, tokens: Int[np.ndarray, " S"]) -> LogitsDifference:
    """Compares the float32 logits of two checkpoints for the same tokens."""
    ours, theirs = streamed_logits(a, tokens), streamed_logits(b, tokens)
    agreement = float(np.mean(ours.argmax(-1) == theirs.argmax(-1)))
    return LogitsDifference(len(tokens), float(np.abs(ours - theirs).max()), float(np.abs(ours).max()), agreement)


def sample_tokens(tokenizer: Tokenizer | None, vocab_size: int) -> Int[np.ndarray, " S"]:
    """Token ids of a short text, at most SAMPLE_TOKENS; without a tokenizer, ids from all parts of the vocabulary."""
    if tokenizer is None:
        return np.arange(SAMPLE_TOKENS) * 7919 % vocab_size
    return np.array(tokenizer.encode(SAMPLE)[:SAMPLE_TOKENS]) % vocab_size


def mean_loss(checkpoint: Checkpoint, tokens: Int[np.ndarray, " S"]) -> float:
    """Mean cross-entropy of all tokens except the first, in nats per token.

    Raises:
      UserError: If a logit is NaN or infinite.
    """
    logits = streamed_logits(checkpoint, tokens)[:-1]
    if not np.isfinite(logits).all():
        raise UserError(
            f"the logits of {checkpoint.folder} are NaN or infinite",
            "The checkpoint is damaged, or its training diverged: use an earlier one.",
        )
    logsumexp = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return float(np.mean(logsumexp - logits[np.arange(len(logits)), tokens[1:]]))


def streamed_logits(checkpoint: Checkpoint, tokens: Int[np.ndarray, " S"]) -> Float[np.ndarray, "S V"]:
    """The logits of the next token at every position, in float32. Each layer is read when it is computed."""
    config, specs = checkpoint.config, declare_decoder(checkpoint.config)

    def read(path: str, spec: Spec, layer: int | None) -> jax.Array:
        index = tuple(slice(0, n) for n in spec.shape[len(spec.stacked) :])
        return jnp.asarray(np.ascontiguousarray(checkpoint.read_slice(path, layer, index, np.dtype(np.float32))))

    def read_layer(index: int) -> Layer:
        inner = named(specs.layers)
        return build(specs.layers, [read(f"layers.{path}", spec, index) for path, spec in inner.items()])

    with jax.set_mesh(one_device()):
        outer = {path: None if spec.stacked else read(path, spec, None) for path, spec in named(specs).items()}
        decoder: Decoder = build(specs, outer.values())
        compute, context = ComputeConfig(), Context()
        positions = jnp.arange(len(tokens))[None]
        x = decoder.embed_tokens(jnp.asarray(tokens)[None], config, compute, context)
        layers = map(read_layer, range(config.num_layers))
        x, _ = run_layers(layers, x, positions, None, None, config=config, compute=compute, context=context)
        logits = decoder.logits(decoder.final_norm(x, config), config, compute, context=context)
    return np.asarray(logits[0])
