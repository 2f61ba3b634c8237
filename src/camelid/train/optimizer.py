"""The optimizer of a recipe: optax transformations, and the few that optax lacks.

All are chains of a direction, weight decay, the learning rate and its factors. The update of AdamW keeps the structure
of `optax.adamw`, whose state the checkpoints of runs hold.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from camelid.errors import UserError
from camelid.model.params import Spec
from camelid.model.pytree import path_name
from camelid.train.optimizer_config import OptimizerConfig
from camelid.train.patterns import per_layer, select, specs_by_path
from camelid.train.schedules import learning_rate
from camelid.train.trainable import trained_parameters

MUON_RMS = 0.2
"""root mean square of the updates of AdamW, which those of Muon are scaled to (arXiv:2502.16982, section 2.2)"""


def make_optimizer(
    config: OptimizerConfig, steps: int, specs: Any, freeze: Sequence[str] = ()
) -> optax.GradientTransformation:
    """The optimizer with its learning rates.

    `update` must be called under standard dtype promotion, as TrainStep does.

    Args:
      config: The optimizer.
      steps: train.steps, at which the decay of the learning rate ends by default.
      specs: The declared parameters. What is optimized has this structure, or further arrays in place of a parameter.
      freeze: Patterns of parameters that are not trained. No state is kept for a parameter without a trained layer; the
        updates of single layers are the caller's to mask.

    Raises:
      UserError: For a pattern that matches no parameter.
    """
    rate, mask = learning_rate(config, steps), _decay_mask(config, specs)
    weight_decay, exponent = config.options["weight_decay"], config.options["weight_decay_power"]
    if config.name in ("adafactor", "palm", "uio"):
        parts = [_adafactor(config.options, rate)]
        if weight_decay:
            parts.append(optax.add_decayed_weights(lambda count: -weight_decay * rate(count) ** exponent, mask))
    else:
        direction = _direction(config.options, specs)
        parts = [direction, optax.add_decayed_weights(weight_decay, mask), optax.scale_by_learning_rate(rate)]
    if config.factors:
        parts.append(_scale_by_factors(config, specs))
    optimizer = optax.chain(*parts)
    trained = [bool(mask.any()) for mask in trained_parameters(freeze, specs).values()]
    return (
        optimizer if all(trained) else optax.masked(optimizer, jax.tree.unflatten(jax.tree.structure(specs), trained))
    )


def _direction(options: Mapping[str, Any], specs: Any) -> optax.GradientTransformation:
    """The update before weight decay and learning rate."""
    beta1, beta2, dtype = (options[name] for name in ("beta1", "beta2", "moment_dtype"))
    match options["name"]:
        case "adamw" if options["bias_correction"]:
            return optax.scale_by_adam(beta1, beta2, options["eps"], mu_dtype=dtype)
        case "adamw":
            return _scale_by_uncorrected_adam(beta1, beta2, options["eps"], dtype)
        case "lion":
            return optax.scale_by_lion(beta1, beta2, mu_dtype=dtype)
        case "muon":
            return _muon(options, specs)
        case "sgd" if options["momentum"]:
            return optax.trace(options["momentum"], options["nesterov"], dtype)
    return optax.identity()


def _scale_by_uncorrected_adam(beta1: Any, beta2: Any, eps: Any, dtype: Any) -> optax.GradientTransformation:
    """`optax.scale_by_adam` without the division of the moments by 1 - beta^step.

    With weight decay it is the AdamWeightDecay of MindSpore, and of BERT. The moments start at 0 and are smaller than
    the averages that they stand for, so the first updates differ from Adam's by a factor of (1 - beta1^t) /
    sqrt(1 - beta2^t).
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        mu = optax.tree.update_moment(updates, state.mu, beta1, 1)
        nu = optax.tree.update_moment(updates, state.nu, beta2, 2)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(state.count + 1, optax.tree.cast(mu, dtype), nu)

    return optax.GradientTransformation(optax.scale_by_adam(mu_dtype=dtype).init, update)


def _muon(options: Mapping[str, Any], specs: Any) -> optax.GradientTransformation:
    """Muon for the matrices of layers; Adam for everything else: embeddings, head, norms and biases.

    The axes of a matrix that are outputs, or inputs, count as one: those of all heads together. Each layer has a matrix
    of its own. `optax.contrib.muon` has the same parts, but gives no weight decay to chosen parameters of Adam, and
    uses Nesterov's momentum for both or for none.
    """
    matrices = {path: spec for path, spec in specs_by_path(specs).items() if spec.stacked and spec.is_matrix}

    def label(path: Any, leaf: Any) -> str:
        return "muon" if path_name(path) in matrices else "adam"

    def axes_of(tree: Any) -> Any:
        return jax.tree.map_with_path(lambda path, leaf: _muon_axes(matrices[path_name(path)]), tree)

    def scaled(path: Any, update: jax.Array) -> jax.Array:
        spec = matrices[path_name(path)]
        outputs = math.prod(spec.shape[len(spec.stacked) : -len(spec.inputs)])
        inputs = math.prod(spec.shape[-len(spec.inputs) :])
        if options["muon_scale"] == "width":
            return math.sqrt(max(1, outputs / inputs)) * update
        return MUON_RMS * math.sqrt(max(inputs, outputs)) * update

    orthogonal = scale_by_muon(
        beta=options["momentum"],
        eps=options["eps"],
        mu_dtype=options["moment_dtype"],
        nesterov=options["nesterov"],
        weight_dimension_numbers=axes_of,
    )
    scale = optax.stateless(lambda updates, params: jax.tree.map_with_path(scaled, updates))
    adam = optax.scale_by_adam(options["beta1"], options["beta2"], options["eps"], mu_dtype=options["moment_dtype"])
    parts: dict[Hashable, optax.GradientTransformation] = {"muon": optax.chain(orthogonal, scale), "adam": adam}
    return optax.partition(parts, lambda params: jax.tree.map_with_path(label, params))


def _muon_axes(spec: Spec) -> MuonDimensionNumbers:
    first, last = len(spec.stacked), len(spec.shape) - len(spec.inputs)
    return MuonDimensionNumbers(tuple(range(last, len(spec.shape))), tuple(range(first, last)))


def _adafactor(options: Mapping[str, Any], rate: optax.Schedule) -> optax.GradientTransformation:
    """Adafactor (arXiv:1804.04235) without weight decay, for the parameters of each layer on their own.

    The root mean squares of updates and parameters are those of one layer, as in models whose layers are not stacked.
    """
    adafactor = optax.adafactor(
        rate,
        decay_rate=options["decay_rate"],
        multiply_by_parameter_scale=options["parameter_scale"],
        clipping_threshold=options["update_clip"] if math.isfinite(options["update_clip"]) else None,
        momentum=options["momentum"] or None,
        dtype_momentum=options["moment_dtype"],
        eps=options["eps"],
        factored=options["factored"],
    )

    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: str(path_name(path).startswith("layers.")), params)

    return optax.partition({"True": _for_each_layer(adafactor), "False": adafactor}, labels)


def _for_each_layer(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` for each index of the first axis of the parameters; every array of its state has this axis too."""

    def init(params: Any) -> Any:
        return jax.vmap(inner.init)(params) if jax.tree.leaves(params) else inner.init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if not jax.tree.leaves(updates):
            return updates, state
        return jax.vmap(inner.update)(updates, state, params)

    return optax.GradientTransformation(init, update)


def _scale_by_factors(config: OptimizerConfig, specs: Any) -> optax.GradientTransformation:
    """Multiplies the updates, including weight decay, by the factors of their parameters."""
    factors = {path: np.ones((), np.float32) for path in specs_by_path(specs)}
    for pattern, factor in config.factors.items():
        for path, mask in select([pattern], specs, "optimizer.factors").items():
            factors[path] = factors[path] * np.where(mask, np.float32(factor), np.float32(1))
    tree = jax.tree.unflatten(jax.tree.structure(specs), list(factors.values()))

    def update(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda f, part: jax.tree.map(lambda u: u * per_layer(f, u), part), tree, updates)

    return optax.stateless(update)


def _decay_mask(config: OptimizerConfig, specs: Any) -> Any:
    """A tree of booleans: which parameters have weight decay."""
    assert config.decay is not None
    patterns = [word for word in config.decay if word not in ("matrices", "all")]
    chosen = select(patterns, specs, "optimizer.decay")
    for path, mask in chosen.items():
        if mask.any() and not mask.all():
            raise UserError(
                f"optimizer.decay: {', '.join(map(repr, patterns))} matches {path} in some layers only",
                "Weight decay applies to all layers of a parameter or to none: choose patterns without numbers.",
            )
    matrices, everything = "matrices" in config.decay, "all" in config.decay
    decays = [
        everything or (matrices and spec.is_matrix) or bool(chosen[path].all())
        for path, spec in specs_by_path(specs).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(specs), decays)
