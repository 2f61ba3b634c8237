"""What Python users see: `camelid.load` and the Model that it returns."""

import collections
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import UnionType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from camelid.checkpoint import layout
from camelid.checkpoint.checkpoint import Checkpoint, Saving
from camelid.checkpoint.files import WORKERS
from camelid.checkpoint.registry import files_of, open_checkpoint, write_checkpoint
from camelid.checkpoint.state import stored
from camelid.checkpoint.tensors import dtype_named, rounded
from camelid.errors import UserError, in_python
from camelid.generate.decode import generate
from camelid.generate.sample import sampling, whole_number
from camelid.interrupts import cleaned_up
from camelid.model.config import Compute, ModelConfig
from camelid.model.decoder import Decoder, declare_decoder, untied
from camelid.model.finite import not_finite
from camelid.model.flops import count_parameters
from camelid.model.params import abstract, build, named
from camelid.model.tokens import ROWS, token_row, token_rows
from camelid.model.weights import Weight, dense
from camelid.parallel.backend import prepare_backend
from camelid.parallel.hosts import is_main, to_host, wait_for_all
from camelid.parallel.mesh import MeshConfig, make_mesh, one_device
from camelid.parallel.rules import check_divides
from camelid.text.stream import TextStream
from camelid.text.tokenizer import (
    Tokenizer,
    companions_with,
    find_tokenizer,
    load_tokenizer,
    portable,
    vocabulary_notes,
)


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    prompt: str
    text: str
    tokens: list[int]
    """the new ids, without EOS"""
    finish_reason: Literal["stop", "length", "error"]
    """"stop": the model ended the text; "length": max_new_tokens did; "error": its logits were NaN or infinite"""


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        config = self.config
        size = f"{count_parameters(config):,} parameters, {config.num_layers} layers, vocabulary of {config.vocab_size}"
        tokenizer = "no tokenizer" if self.tokenizer is None else repr(self.tokenizer)
        devices = f"{self.mesh.size} device{'s' if self.mesh.size > 1 else ''}"
        return f"Model({config.family or 'llama'}: {size}; {self.compute.dtype} on {devices}; {tokenizer})"

    def with_tokenizer(self, tokenizer: Tokenizer | str | Path) -> "Model":
        """The same model with another tokenizer, or with that of a folder or file."""
        found = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
        companions = companions_with(self.companions, found)
        notes = (*self.notes, *found.notes, *vocabulary_notes(found, self.config.vocab_size))
        return replace(self, tokenizer=found, companions=tuple(companions), notes=notes)

    @in_python
    def logits(self, tokens: Sequence[Sequence[int]] | Int[Array | np.ndarray, "B S"]) -> Float[Array, "B S V"]:
        """For each token, the float32 logits of the one after it.

        Raises UserError for ids outside the vocabulary, rows of different lengths, and rows beyond the context.
        """
        rows = token_rows(tokens, self.config)
        with jax.set_mesh(self.mesh):
            return _logits(self.params, jnp.asarray(rows), self.config, self.compute)

    @in_python
    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]] | Int[Array | np.ndarray, "B S"],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[Completion]:
        """One completion a prompt, in order. A prompt is text, or token ids that already hold their BOS.

        Temperature 0 is greedy; otherwise temperature, then top_k, then top_p. Row i draws with seed + i, whatever else
        is in the batch. Ids for which the tokenizer has no token are never drawn. Raises UserError for prompts that do
        not fit the context, numbers out of range, and a model whose logits are NaN or infinite; where that is so for
        some of the prompts, it warns and their completions end there.
        """
        each = [prompts] if isinstance(prompts, str) else _each(prompts)
        ids = [self._encode(prompt, number) for number, prompt in enumerate(each)]
        seed = whole_number("seed", seed)
        seeds = [seed + i for i in range(len(each))]
        how = sampling(temperature, top_k, top_p)
        limit = whole_number("max_new_tokens", max_new_tokens)
        eos_ids = self.config.eos_ids if self.tokenizer is None else self.tokenizer.eos_ids
        rows, finite = generate(
            self.params, ids, seeds, how, limit, eos_ids, self.config, self.compute, self.mesh, self._drawable
        )
        if not any(finite):
            raise not_finite(self.params, self.compute, "the logits are")
        for number, (row, ok) in enumerate(zip(rows, finite, strict=True)):
            if not ok:
                warnings.warn(
                    f"prompt {number}: the logits became NaN or infinite after {len(row)} new tokens", stacklevel=3
                )
        return [self._completion(*row, limit) for row in zip(each, ids, rows, finite, strict=True)]

    def _encode(self, prompt: str | Sequence[int], number: int) -> list[int]:
        if not isinstance(prompt, str):
            ids = token_row(prompt, f"prompt {number}", self.config.vocab_size).tolist()
            return ids if self.tokenizer is None else self.tokenizer.checked(ids)
        if self.tokenizer is None:
            raise UserError("the checkpoint has no tokenizer", "Give token ids, or name a tokenizer with --tokenizer.")
        return self.tokenizer.encode(prompt, specials=True)

    @cached_property
    def _drawable(self) -> np.ndarray | None:
        """Which ids may be drawn: those of the tokenizer's tokens, and any that ends a text. None: every id."""
        if self.tokenizer is None:
            return None
        drawable = np.isin(np.arange(self.config.vocab_size), [*self.tokenizer.token_ids, *self.tokenizer.eos_ids])
        return None if drawable.all() else drawable

    def _completion(
        self, prompt: str | Sequence[int], ids: list[int], new: list[int], finite: bool, limit: int
    ) -> Completion:
        reason = "error" if not finite else "length" if len(new) == limit else "stop"
        if self.tokenizer is None:
            return Completion("", "", new, reason)
        stream = TextStream(self.tokenizer, ids)
        text = "".join(stream.push(token) for token in new) + stream.flush()
        return Completion(prompt if isinstance(prompt, str) else self.tokenizer.decode(ids), text, new, reason)

    @in_python
    def save(
        self,
        path: str | Path,
        format: str = "hf",
        dtype: str | None = None,
        overwrite: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Writes a folder in a format of checkpoint/registry.py; `dtype` None keeps that of the parameters.

        `overwrite` replaces the files of a checkpoint that is there, and leaves all other files of the folder alone.
        Raises UserError if the destination exists and is not to be overwritten, or is not a checkpoint, if files of
        others are in the way, if the disk is full, or if the format cannot hold the model; nothing is changed then.
        """
        params, config = untied(self.params, self.config)
        leaves = named(params)
        dtypes = {path: np.dtype(leaf.dtype) if dtype is None else dtype_named(dtype) for path, leaf in leaves.items()}

        @lru_cache(WORKERS)
        def whole(path: str, layer: int | None) -> np.ndarray:
            return _host_layer(leaves[path], layer, self.mesh)

        def source(path: str, layer: int | None, index: layout.Index, dtype: np.dtype) -> np.ndarray:
            return rounded(path, whole(path, layer)[index], dtype)

        saving = Saving(config, dtypes, source, self.companions)
        # Fetching a layer is a collective: every process takes part in each, one after another in the same order.
        if is_main():
            workers = WORKERS if jax.process_count() == 1 else 1
            with cleaned_up(), tempfile.TemporaryDirectory() as made:
                # Meta's own code reads no other tokenizer than ranks.
                companions = portable(self.companions, Path(made), keep_ranks=format == "meta")
                saving = replace(saving, companions=companions)
                write_checkpoint(Path(path), saving, format, overwrite=overwrite, progress=progress, workers=workers)
        else:
            for file in files_of(saving, format):
                for segment in file.segments:
                    collections.deque(segment.chunks(), maxlen=0)
        wait_for_all(f"saved {path}")


@in_python
def load(
    path: str | Path,
    dtype: str | None = "float32",
    mesh: Mesh | MeshConfig | None = None,
    compute: Compute | None = None,
    *,
    format: str | None = None,
    config: ModelConfig | None = None,
    ignore: Sequence[str] = (),
    tokenizer: str | Path | None = None,
) -> Model:
    """Opens a checkpoint of any format where it lies, or a repository of the Hugging Face Hub by its name.

    `format` None asks the files; `config` describes a model whose files do not; the fields in `ignore`, such as
    "rope_scaling.alpha", are as if config.json did not have them; `tokenizer` is a folder or a file, None the
    checkpoint's own. `dtype` is that of parameters and products (None: that of the files); `mesh` None is the first
    device alone; `compute` sets the rest: kernels, rematerialization, replicated axes. Raises UserError for files that
    are damaged, incomplete or not understood.
    """
    _check_kind("compute", compute, Compute, "camelid.Compute")
    _check_kind("config", config, ModelConfig, "camelid.ModelConfig")
    _check_kind("tokenizer", tokenizer, str | Path, "the path of a folder or file")
    checkpoint = open_checkpoint(path, format, config, ignore)
    if dtype is None:
        found = {dtype.name for dtype in checkpoint.dtypes.values()}
        if len(found) > 1:
            raise UserError(f"the files mix {', '.join(sorted(found))}", "Choose one with --dtype.")
        dtype = found.pop()
    dtype = dtype_named(dtype).name
    compute = replace(compute or Compute(), dtype=dtype, param_dtype=dtype)
    mesh = _mesh(mesh)
    check_divides(checkpoint.config.axis_sizes, mesh, compute.replicate)
    found = find_tokenizer(checkpoint.tokenizer_folder) if tokenizer is None else load_tokenizer(tokenizer)
    params = load_params(checkpoint, compute, mesh)
    companions = checkpoint.companions if tokenizer is None else checkpoint.other_companions
    model = Model(checkpoint.config, params, None, compute, mesh, tuple(companions), checkpoint.notes)
    return model if found is None else model.with_tokenizer(found)


def load_params(checkpoint: Checkpoint, compute: Compute, mesh: Mesh) -> Decoder:
    """The parameters of an opened checkpoint, in Compute.param_dtype, each device's part read for that device."""
    specs = declare_decoder(checkpoint.config)
    targets = named(abstract(specs, jnp.dtype(compute.param_dtype), mesh, compute.replicate))
    arrays = stored.load(checkpoint.table, checkpoint.tensors, targets)
    return build(specs, [arrays[path] for path in named(specs)])


def _mesh(mesh: Mesh | MeshConfig | None) -> Mesh:
    if mesh is None:
        return one_device()
    if isinstance(mesh, MeshConfig):
        return make_mesh(mesh)
    advice = "Give camelid.MeshConfig, for example MeshConfig(fsdp=2); None is one device."
    if not isinstance(mesh, Mesh):
        raise UserError(f"mesh = {mesh!r} is not a mesh", advice)
    axes = [field.name for field in fields(MeshConfig)]
    if missing := [axis for axis in axes if axis not in mesh.shape]:
        raise UserError(f"the mesh has axes {tuple(mesh.shape)}, and lacks {missing[0]!r}", advice)
    prepare_backend()
    return mesh


def _check_kind(name: str, value: object, kind: type | UnionType, wanted: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise UserError(f"{name} = {value!r} is not {wanted}", f"Give {wanted}, or leave {name} out.")


def _each(prompts: object) -> list:
    """The prompts of a batch."""
    try:
        return list(prompts)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise UserError(f"prompts = {prompts!r} are neither texts nor rows of token ids", ROWS) from None


@partial(jax.jit, static_argnames=("config", "compute"))
def _logits(params: Decoder, tokens: Array, config: ModelConfig, compute: Compute) -> Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return params(tokens, positions, None, config, compute)[0]


def _host_layer(leaf: Weight, layer: int | None, mesh: Mesh) -> np.ndarray:
    """One layer of a parameter (None: all of it) as numpy, in every process; adapters are merged, codes dequantized."""
    if layer is None:
        return to_host(leaf if isinstance(leaf, Array) else jax.jit(dense)(leaf))
    return to_host(_take(leaf, jnp.int32(layer), NamedSharding(mesh, PartitionSpec())))


@partial(jax.jit, static_argnums=2)
def _take(stacked: Weight, layer: Array, replicated: NamedSharding) -> Array:
    one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stacked)
    return jax.lax.with_sharding_constraint(dense(one), replicated)
