"""The LoRA adapter that best approximates the difference between two checkpoints."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from camelid.checkpoint.adapters.lora import Adapter, ComputedTensor, Pair, ParameterKey, plain_table
from camelid.checkpoint.checkpoint import Checkpoint
from camelid.checkpoint.compare import config_differences
from camelid.checkpoint.formats import hf
from camelid.checkpoint.layout import SliceReader
from camelid.checkpoint.tensors import Tensor
from camelid.errors import UserError
from camelid.model.config import ModelConfig

NOT_IN_ADAPTERS = {"bos_id", "eos_ids", "pad_id", "init_std"}
"""fields that an adapter does not contain, in which the base may differ from the tuned model"""


def approximate(
    base: Checkpoint, tuned: Checkpoint, difference: SliceReader, rank: int, progress: Callable[[int, int], None]
) -> tuple[Adapter, float, tuple[str, ...]]:
    """Returns the best rank-`rank` adapter, its residual, and notes; norms and a tied table are saved entirely.

    `difference` reads tuned - base. The residual is a Frobenius norm, relative to that of the difference of all
    parameters. Raises UserError if an adapter cannot express the difference of the configurations, if a value is
    infinite or NaN, or if no matrix differs.
    """
    if odd := sorted(config_differences(base.config, tuned.config).keys() - NOT_IN_ADAPTERS):
        raise UserError(f"the two differ in {', '.join(odd)}, which an adapter cannot express", "Use the kind exact.")
    pairs: dict[ParameterKey, Pair] = {}
    saved: dict[ParameterKey, Tensor] = {}
    without_matrices, lost = _modules_without_matrices(tuned.config), []
    tensors = plain_table(tuned.config).tensors
    total = residual = 0.0
    for done, (name, [(part, layer)]) in enumerate(tensors.items(), start=1):
        parameter, spec = (part.rule.path, layer), part.spec
        shape = spec.shape[len(spec.stacked) :]
        change = difference(*parameter, tuple(slice(0, n) for n in shape), np.dtype(np.float32))
        size = _sum_of_squares(change)
        if not math.isfinite(size):
            raise UserError(f"{name} has infinite or NaN values", "Use the kind exact.")
        total += size
        if size > 0 and parameter == ("embed", None) and tuned.config.tie_embeddings:
            # When PEFT merges a pair of factors of the tied table, it changes the head too.
            saved[parameter] = saved["lm_head", None] = _tensor_of(tuned, parameter, shape)
        elif size > 0 and spec.is_matrix:
            pairs[parameter] = pair = _nearest(change.reshape(math.prod(shape[: len(spec.outputs)]), -1), rank)
            residual += _sum_of_squares(change - (pair.b @ pair.a).reshape(shape))
        elif size > 0 and parameter in without_matrices:
            saved |= {other: _tensor_of(tuned, other, shape) for other in without_matrices[parameter]}
        elif size > 0:
            residual += size
            lost.append(name)
        progress(done, len(tensors))
    if not pairs:
        raise UserError(f"all matrices of {base.folder} and {tuned.folder} are equal", "There is nothing to adapt.")
    config = replace(base.config, tie_embeddings=base.config.tie_embeddings and ("embed", None) not in saved)
    notes = (f"an adapter cannot express the difference of {', '.join(lost)}",) if lost else ()
    return Adapter(config, pairs, saved), math.sqrt(residual / total), notes


def _modules_without_matrices(config: ModelConfig) -> dict[ParameterKey, list[ParameterKey]]:
    """Maps each parameter of a module without matrices, such as a norm, to all parameters of that module."""
    rows = hf.table_of(config)
    modules: dict[str, list[str]] = {}
    for name in rows.tensors:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    keys = {name: [(part.rule.path, layer) for part, layer in members] for name, members in rows.tensors.items()}
    chosen = [names for names in modules.values() if all(len(rows.shape(name)) == 1 for name in names)]
    return {key: [k for name in names for k in keys[name]] for names in chosen for n in names for key in keys[n]}


def _tensor_of(checkpoint: Checkpoint, parameter: ParameterKey, shape: tuple[int, ...]) -> Tensor:
    """Returns a parameter of a checkpoint as a tensor that is read on demand."""
    path, dtype = parameter[0], checkpoint.dtypes[parameter[0]]
    return ComputedTensor(checkpoint.folder, path, 0, shape, dtype, checkpoint.read_slice, parameter)


def _nearest(change: np.ndarray, rank: int) -> Pair:
    """Returns the best approximation of a matrix by this rank in the Frobenius norm (Eckart-Young), with scale 1."""
    wide = change if change.shape[0] <= change.shape[1] else change.T
    gram = np.zeros((len(wide), len(wide)))
    for start in range(0, wide.shape[1], 1024):
        columns = wide[:, start : start + 1024].astype(np.float64)
        gram += columns @ columns.T
    # The eigenvectors of the Gram matrix are the singular vectors, and are much faster to compute than an SVD; float64
    # compensates for the squared condition number.
    u = np.linalg.eigh(gram).eigenvectors[:, ::-1][:, :rank].astype(np.float32)
    projected = u.T @ wide
    root = np.sqrt(np.linalg.norm(projected, axis=1))
    b, a = u * root, projected / np.where(root > 0, root, 1)[:, None]
    return Pair(a, b, float(len(a))) if wide is change else Pair(b.T, a.T, float(len(a)))


def _sum_of_squares(x: np.ndarray) -> float:
    """Returns the sum of squares, computed in float64."""
    return float(np.einsum("i,i->", x.reshape(-1), x.reshape(-1), dtype=np.float64))
