"""Low-rank adapters of a model: which parameters have one, their declaration and their initialization.

The adapters of a parameter's layers are stacked, as the layers are. Shorter factors are padded with zeros to the
largest rank. Zeros stay zeros in training: where `a` and `b` are both 0, so are the gradients of both.
"""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from camelid.model.config import ModelConfig
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.params import Spec, build, named
from camelid.model.pytree import from_fields
from camelid.model.weights import Adapted, Weight, dense, row_lengths


@dataclasses.dataclass(frozen=True)
class MatrixPlan:
    """The adapters of one declared parameter: a value for each layer, or a single one if it is not stacked."""

    ranks: tuple[int, ...]
    """0 where a layer has no adapter"""
    alphas: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class LoRAPlan:
    """The adapters of a model."""

    matrices: Mapping[str, MatrixPlan]
    """by the path of the parameter; `lm_head` of a model with tied embeddings adapts the table's use as head"""
    dora: bool = False
    rank_stabilized: bool = False

    def scales(self, path: str) -> tuple[float, ...]:
        """The factor of b a in each layer: alpha / rank, or alpha / sqrt(rank); 0 without an adapter."""
        plan = self.matrices[path]
        return tuple(
            0.0 if rank == 0 else alpha / (math.sqrt(rank) if self.rank_stabilized else rank)
            for rank, alpha in zip(plan.ranks, plan.alphas, strict=True)
        )


def declare_adapters(plan: LoRAPlan, config: ModelConfig) -> Decoder:
    """The arrays that are trained, as Specs, in the tree of the model; None in place of everything that is frozen."""

    def leaf(path: str, spec: Spec) -> Adapted | None:
        if path not in plan.matrices:
            return None
        rank = max(plan.matrices[path].ranks)
        layers, outputs = len(spec.stacked), len(spec.outputs)
        stack, rows, columns = (
            spec.shape[:layers],
            spec.shape[layers : layers + outputs],
            spec.shape[layers + outputs :],
        )
        factors = {
            "a": Spec(spec.stacked, ("rank",), spec.inputs, (*stack, rank, *columns), "normal"),
            "b": Spec(spec.stacked, spec.outputs, ("rank",), (*stack, *rows, rank), "zeros"),
        }
        magnitude = Spec(spec.stacked, spec.outputs, (), (*stack, *rows), "norm") if plan.dora else None
        return _adapted(**factors, magnitude=magnitude)

    return _tree(plan, config, leaf)


def freeze(params: Decoder, plan: LoRAPlan, config: ModelConfig) -> Decoder:
    """What is not trained: the parameters of the base, and the scales of the adapters, as NumPy arrays.

    `train.trainable.combine` joins it with what `declare_adapters` describes.
    """
    held = named(params)

    def leaf(path: str, spec: Spec) -> Any:
        base = held.get(path)  # None: the head of a model with tied embeddings
        if path not in plan.matrices:
            return base
        scales = plan.scales(path)
        return _adapted(base=base, scale=np.asarray(scales if spec.stacked else scales[0], np.float32))

    return _tree(plan, config, leaf)


def initialize_adapters(plan: LoRAPlan, config: ModelConfig, key: jax.Array, params: Decoder) -> Decoder:
    """New adapters of the base `params`, float32, which leave it unchanged. They do not depend on the mesh.

    As in PEFT, `b` is 0 and `a` is uniform in +-1/sqrt(inputs) (Kaiming, with a = sqrt(5)); in an adapter of the
    embedding table it is standard normal. DoRA's magnitudes are the lengths of the base's rows.
    """
    held = named(params)

    def leaf(path: str, spec: Spec) -> Adapted | None:
        if path not in plan.matrices:
            return None
        own = jax.random.fold_in(key, zlib.crc32(f"{path}.a".encode()))
        adapter = specs[path]
        stack, inputs = adapter.a.shape[: len(spec.stacked)], adapter.a.shape[len(spec.stacked) + 1 :]
        if path == "embed":
            a = jax.random.normal(own, adapter.a.shape, jnp.float32)
        else:
            bound = 1 / math.sqrt(math.prod(inputs))
            a = jax.random.uniform(own, adapter.a.shape, jnp.float32, -bound, bound)
        ranks = np.array(plan.matrices[path].ranks).reshape(*stack, 1)
        used = np.arange(adapter.a.shape[len(stack)]) < ranks
        a = jnp.where(used.reshape(*used.shape, *[1] * len(inputs)), a, 0.0)
        magnitude = None
        if adapter.magnitude is not None:
            base = held["embed" if path == "lm_head" and path not in held else path]
            outputs = adapter.magnitude.shape[len(stack) :]

            def lengths(matrix: Weight) -> jax.Array:
                return row_lengths(dense(matrix).astype(jnp.float32).reshape(*outputs, -1))

            # One layer after another: only one is held in float32.
            found = lax.map(lengths, base) if spec.stacked else lengths(base)
            magnitude = jnp.where(ranks.reshape(*stack, *[1] * len(outputs)) > 0, found, 0.0)
        return _adapted(a=a, b=jnp.zeros(adapter.b.shape, jnp.float32), magnitude=magnitude)

    specs = named(declare_adapters(plan, config))
    return _tree(plan, config, leaf)


def _adapted(**fields: Any) -> Adapted:
    names = [field.name for field in dataclasses.fields(Adapted)]
    return from_fields(Adapted, dict.fromkeys(names) | fields)


def _tree(plan: LoRAPlan, config: ModelConfig, leaf: Any) -> Decoder:
    """The tree of the adapted model, whose tied head is an entry of its own if it has an adapter."""
    tied = config.tie_embeddings and "lm_head" not in plan.matrices
    specs = declare_decoder(dataclasses.replace(config, tie_embeddings=tied))
    return build(specs, [leaf(path, spec) for path, spec in named(specs).items()])
