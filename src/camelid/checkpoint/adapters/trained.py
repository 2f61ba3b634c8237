"""Adapters as training holds them, and the file in the folder of a run that describes them.

Training holds one array for all layers of a parameter, named by its path: `layers.attn.q_proj.a`, (layers, rank,
inputs...), and `.b`, (layers, outputs..., rank), padded with zeros to the largest rank; with DoRA `.magnitude`,
(layers, outputs...). `Adapter` has a pair of factors for each layer, with flattened axes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from camelid.checkpoint.adapters.lora import Adapter, Pair, ParameterKey
from camelid.disk.json_files import read_json
from camelid.errors import UserError
from camelid.model.adapters import LoRAPlan, MatrixPlan, declare_adapters
from camelid.model.config import ModelConfig
from camelid.model.params import named
from camelid.model.weights import Adapted

NAME = "lora.json"
"""name of the file in the folder of a run"""


@dataclass(frozen=True)
class RunAdapter:
    """What the folder of a run says about its adapter."""

    base: str
    """the base: a path, possibly with the name of its format in front, or a name on the Hub"""
    ignore: tuple[str, ...]
    """fields of its config.json that are treated as absent"""
    checksums: Mapping[str, int]
    """of the base's parameters as they are held in training, by path (see `integrity.checksum_arrays`)"""
    plan: LoRAPlan
    dropout: float

    def to_json(self) -> dict[str, Any]:
        """The content of the file."""
        matrices = {
            path: {"ranks": list(matrix.ranks), "alphas": list(matrix.alphas)}
            for path, matrix in self.plan.matrices.items()
        }
        return {
            "base": self.base,
            "ignore": list(self.ignore),
            "dora": self.plan.dora,
            "rank_stabilized": self.plan.rank_stabilized,
            "dropout": self.dropout,
            "matrices": matrices,
            "base_checksums": dict(self.checksums),
        }


def read_run_adapter(run: Path) -> RunAdapter | None:
    """What the folder of a run says about its adapter; None if it trains all parameters."""
    if not (run / NAME).is_file():
        return None
    about = read_json(run / NAME)
    try:
        matrices = {
            path: MatrixPlan(tuple(matrix["ranks"]), tuple(matrix["alphas"]))
            for path, matrix in about["matrices"].items()
        }
        plan = LoRAPlan(matrices, about["dora"], about["rank_stabilized"])
        checksums = about["base_checksums"]
        return RunAdapter(about["base"], tuple(about["ignore"]), checksums, plan, about["dropout"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{run / NAME} does not describe an adapter: {error!r}", "Copy the folder again.") from error


def to_adapter(
    plan: LoRAPlan, arrays: Mapping[str, np.ndarray], config: ModelConfig, base: str | None, dropout: float = 0.0
) -> Adapter:
    """The adapter of a base with this config, from the arrays of training by name; the padding is left out."""
    pairs: dict[ParameterKey, Pair] = {}
    for path, matrix in plan.matrices.items():
        stacked = len(matrix.ranks) > 1 or path.startswith("layers.")
        for layer, (rank, alpha) in enumerate(zip(matrix.ranks, matrix.alphas, strict=True)):
            if rank:
                a, b, magnitude = (
                    None if array is None else array[layer] if stacked else array
                    for array in (arrays.get(f"{path}.{name}") for name in ("a", "b", "magnitude"))
                )
                assert a is not None
                assert b is not None
                pairs[path, layer if stacked else None] = Pair(
                    a[:rank].reshape(rank, -1),
                    b[..., :rank].reshape(-1, rank),
                    alpha,
                    None if magnitude is None else magnitude.reshape(-1),
                )
    if not plan.matrices.keys().isdisjoint(("embed", "lm_head")):
        config = replace(config, tie_embeddings=False)
    return Adapter(config, pairs, rslora=plan.rank_stabilized, dropout=dropout, base=base)


def to_arrays(adapter: Adapter, plan: LoRAPlan, config: ModelConfig) -> dict[str, np.ndarray]:
    """The arrays of training, float32, of an adapter whose pairs are those of `plan`."""
    arrays = {}
    for path, entry in named(declare_adapters(plan, config)).items():
        assert isinstance(entry, Adapted)
        for name, spec in (("a", entry.a), ("b", entry.b), ("magnitude", entry.magnitude)):
            if spec is not None:
                arrays[f"{path}.{name}"] = np.zeros(spec.shape, np.float32)
    for (path, layer), pair in adapter.pairs.items():
        at = () if layer is None else (layer,)
        a, b = arrays[f"{path}.a"][at], arrays[f"{path}.b"][at]
        a[: pair.rank] = pair.a.reshape(pair.rank, *a.shape[1:])
        b[..., : pair.rank] = pair.b.reshape(*b.shape[:-1], pair.rank)
        if pair.magnitude is not None:
            magnitude = arrays[f"{path}.magnitude"]
            magnitude[at] = pair.magnitude.reshape(magnitude[at].shape)
    return arrays


def plan_of(adapter: Adapter) -> LoRAPlan:
    """The parameters, ranks and alphas of an adapter."""
    matrices = {}
    for path in dict.fromkeys(path for path, _ in adapter.pairs):
        layers = range(adapter.config.num_layers) if path.startswith("layers.") else [None]
        pairs = [adapter.pairs.get((path, layer)) for layer in layers]
        ranks = tuple(0 if pair is None else pair.rank for pair in pairs)
        matrices[path] = MatrixPlan(ranks, tuple(0.0 if pair is None else float(pair.alpha) for pair in pairs))
    return LoRAPlan(matrices, adapter.dora, adapter.rslora)
