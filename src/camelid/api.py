"""What Python users see: `camelid.load` and the Model that it returns."""

import collections
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from camelid.checkpoint import layout
from camelid.checkpoint.files import WORKERS
from camelid.checkpoint.formats import files_of, open_checkpoint, write_checkpoint
from camelid.checkpoint.opened import Checkpoint, Saving
from camelid.checkpoint.tensors import dtype_named, rounded
from camelid.errors import UserError
from camelid.generate.decode import generate
from camelid.generate.sample import sampling
from camelid.model.config import Compute, ModelConfig
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.params import abstract, build, named
from camelid.parallel.hosts import is_main, to_host, wait_for_all
from camelid.parallel.mesh import MeshConfig, make_mesh, one_device
from camelid.parallel.rules import check_divides
from camelid.text.stream import TextStream
from camelid.text.tokenizer import Tokenizer, check_vocabulary, find_tokenizer, load_tokenizer


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    prompt: str
    text: str
    tokens: list[int]
    """the new ids, without EOS"""
    finish_reason: Literal["stop", "length"]
    """"stop": the model ended the text; "length": max_new_tokens did"""


@dataclass(frozen=True)
class Model:
    """A decoder with its parameters, its tokenizer, and the way it is computed."""

    config: ModelConfig
    params: Decoder
    tokenizer: Tokenizer | None
    compute: Compute
    mesh: Mesh
    companions: tuple[Path, ...] = ()
    """files that `save` carries along"""
    notes: tuple[str, ...] = ()
    """what had to be guessed when the checkpoint was opened, and what was left out"""

    def logits(self, tokens: Int[Array | np.ndarray, "B S"]) -> Float[Array, "B S V"]:
        """For each token, the float32 logits of the one after it."""
        with jax.set_mesh(self.mesh):
            return _logits(self.params, jnp.asarray(tokens, jnp.int32), self.config, self.compute)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[Completion]:
        """One completion a prompt, in order. A prompt is text, or token ids that already hold their BOS.

        Temperature 0 is greedy; otherwise temperature, then top_k, then top_p. Row i draws with seed + i, whatever else
        is in the batch. Raises UserError for prompts that do not fit the context, and numbers out of range.
        """
        each = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self._encode(prompt) for prompt in each]
        seeds = [seed + i for i in range(len(each))]
        how = sampling(temperature, top_k, top_p)
        eos_ids = self.config.eos_ids if self.tokenizer is None else self.tokenizer.eos_ids
        rows = generate(self.params, ids, seeds, how, max_new_tokens, eos_ids, self.config, self.compute, self.mesh)
        return [self._completion(*pair, max_new_tokens) for pair in zip(each, ids, rows, strict=True)]

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise UserError("the checkpoint has no tokenizer", "Give token ids, or name a tokenizer.")
        return self.tokenizer.encode(prompt, specials=True)

    def _completion(self, prompt: str | Sequence[int], ids: list[int], new: list[int], limit: int) -> Completion:
        reason = "length" if len(new) == limit else "stop"
        if self.tokenizer is None:
            return Completion("", "", new, reason)
        stream = TextStream(self.tokenizer, ids)
        text = "".join(stream.push(token) for token in new) + stream.flush()
        return Completion(prompt if isinstance(prompt, str) else self.tokenizer.decode(ids), text, new, reason)

    def save(
        self,
        path: str | Path,
        format: str = "hf",
        dtype: str | None = None,
        overwrite: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Writes a folder in a format of checkpoint/formats.py; `dtype` None keeps that of the parameters.

        Raises UserError where the destination exists, the disk is full, or the format cannot hold the model; nothing
        half-written stays there.
        """
        leaves = named(self.params)
        dtypes = {path: np.dtype(leaf.dtype) if dtype is None else dtype_named(dtype) for path, leaf in leaves.items()}

        @lru_cache(WORKERS)
        def whole(path: str, layer: int | None) -> np.ndarray:
            return _host_layer(leaves[path], layer, self.mesh)

        def source(path: str, layer: int | None, index: layout.Index, dtype: np.dtype) -> np.ndarray:
            return rounded(path, whole(path, layer)[index], dtype)

        saving = Saving(self.config, dtypes, source, self.companions)
        # Fetching a layer is a collective: every process takes part in each, one after another in the same order.
        if is_main():
            workers = WORKERS if jax.process_count() == 1 else 1
            write_checkpoint(Path(path), saving, format, overwrite=overwrite, progress=progress, workers=workers)
        else:
            for file in files_of(saving, format):
                for segment in file.segments:
                    collections.deque(segment.chunks(), maxlen=0)
        wait_for_all(f"saved {path}")


def load(
    path: str | Path,
    dtype: str | None = "float32",
    mesh: Mesh | MeshConfig | None = None,
    compute: Compute | None = None,
    *,
    format: str | None = None,
    config: ModelConfig | None = None,
    tokenizer: str | Path | None = None,
) -> Model:
    """Opens a checkpoint of any format where it lies, or a repository of the Hugging Face Hub by its name.

    `format` None asks the files; `config` describes a model whose files do not; `tokenizer` is a folder or a file, None
    the checkpoint's own. `dtype` is that of parameters and
    products (None: that of the files); `mesh` None is the first device alone; `compute` sets the rest: kernels,
    rematerialization, replicated axes. Raises UserError for files that are damaged, incomplete or not understood.
    """
    checkpoint = open_checkpoint(path, format, config)
    if dtype is None:
        found = {dtype.name for dtype in checkpoint.dtypes.values()}
        if len(found) > 1:
            raise UserError(f"the files mix {', '.join(sorted(found))}", "Choose one with dtype.")
        dtype = found.pop()
    dtype_named(dtype)
    compute = replace(compute or Compute(), dtype=dtype, param_dtype=dtype)
    mesh = _mesh(mesh)
    check_divides(checkpoint.config.axis_sizes, mesh, compute.replicate)
    found = find_tokenizer(checkpoint.folder) if tokenizer is None else load_tokenizer(tokenizer)
    if found is not None:
        check_vocabulary(found, checkpoint.config.vocab_size)
    params = load_params(checkpoint, compute, mesh)
    companions = {file.name: file for file in (*checkpoint.companions, *(found.files if found is not None else ()))}
    return Model(checkpoint.config, params, found, compute, mesh, tuple(companions.values()), checkpoint.notes)


def load_params(checkpoint: Checkpoint, compute: Compute, mesh: Mesh) -> Decoder:
    """The parameters of an opened checkpoint, in Compute.param_dtype, each device's part read for that device."""
    specs = declare_decoder(checkpoint.config)
    targets = named(abstract(specs, jnp.dtype(compute.param_dtype), mesh, compute.replicate))
    arrays = layout.load(checkpoint.table, checkpoint.tensors, targets)
    return build(specs, [arrays[path] for path in named(specs)])


def _mesh(mesh: Mesh | MeshConfig | None) -> Mesh:
    if isinstance(mesh, MeshConfig):
        return make_mesh(mesh)
    return one_device() if mesh is None else mesh


@partial(jax.jit, static_argnames=("config", "compute"))
def _logits(params: Decoder, tokens: Array, config: ModelConfig, compute: Compute) -> Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return params(tokens, positions, None, config, compute)[0]


def _host_layer(leaf: Array, layer: int | None, mesh: Mesh) -> np.ndarray:
    """One layer of a parameter (None: all of it) as numpy, in every process."""
    if layer is not None:
        leaf = _take(leaf, jnp.int32(layer), NamedSharding(mesh, PartitionSpec()))
    return to_host(leaf)


@partial(jax.jit, static_argnums=2)
def _take(stacked: Array, layer: Array, whole: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False), whole)
