"""The Python API: `camelid.load`, and the Model that it returns."""

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
from camelid.checkpoint.checkpoint import Checkpoint, ExportSpec
from camelid.checkpoint.files import WORKERS
from camelid.checkpoint.registry import open_checkpoint, plan_files, write_checkpoint
from camelid.checkpoint.state import saved_state
from camelid.checkpoint.tensors import dtype_named, rounded
from camelid.errors import UserError, in_python
from camelid.generate.decode import generate
from camelid.generate.sampling import sampling, whole_number
from camelid.interrupts import cleaned_up
from camelid.model.config import ComputeConfig, ModelConfig
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
    """The continuation of one prompt."""

    prompt: str
    """the prompt as text; empty for a model without a tokenizer"""
    text: str
    """the generated text, without the prompt; empty for a model without a tokenizer"""
    tokens: list[int]
    """ids of the generated tokens, without EOS"""
    finish_reason: Literal["stop", "length", "error"]
    """"stop": EOS was generated; "length": max_new_tokens was reached; "error": the logits became NaN or infinite"""


@dataclass(frozen=True, repr=False)
class Model:
    """A decoder with its parameters and tokenizer, on the devices of a mesh. `camelid.load` returns one.

    Models are immutable; `with_tokenizer` returns a new one that shares the parameters.
    """

    config: ModelConfig
    """the architecture"""
    params: Decoder
    """the parameters, a JAX pytree"""
    tokenizer: Tokenizer | None
    """None: the checkpoint has none, and prompts must be token ids"""
    compute: ComputeConfig
    """precision, kernels and memory"""
    mesh: Mesh
    """the devices that hold the parameters"""
    companions: tuple[Path, ...] = ()
    """files that `save` copies, such as those of the tokenizer and the license"""
    notes: tuple[str, ...] = ()
    """assumptions made when the checkpoint was opened, and contents that were ignored"""

    def __repr__(self) -> str:
        config = self.config
        size = f"{count_parameters(config):,} parameters, {config.num_layers} layers, vocabulary of {config.vocab_size}"
        tokenizer = "no tokenizer" if self.tokenizer is None else repr(self.tokenizer)
        devices = f"{self.mesh.size} device{'s' if self.mesh.size > 1 else ''}"
        return f"Model({config.family or 'llama'}: {size}; {self.compute.dtype} on {devices}; {tokenizer})"

    def with_tokenizer(self, tokenizer: Tokenizer | str | Path) -> "Model":
        """Returns the same model with another tokenizer.

        Args:
          tokenizer: A Tokenizer, or the path of a tokenizer file or of a folder that has one.

        Raises:
          UserError: If the path has no tokenizer that camelid can read.
        """
        found = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
        companions = companions_with(self.companions, found)
        notes = (*self.notes, *found.notes, *vocabulary_notes(found, self.config.vocab_size))
        return replace(self, tokenizer=found, companions=tuple(companions), notes=notes)

    @in_python
    def logits(self, tokens: Sequence[Sequence[int]] | Int[Array | np.ndarray, "B S"]) -> Float[Array, "B S V"]:
        """Returns the logits of the next token at every position, in float32.

        Args:
          tokens: Token ids: B rows of S ids each. BOS is not added.

        Returns:
          An array of shape (B, S, vocab_size). `logits[b, s]` are the logits of the token after `tokens[b, : s + 1]`.

        Raises:
          UserError: If an id is not in the vocabulary, the rows have different lengths, or they are longer than the
            model's context.
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
        """Generates a continuation of each prompt.

        Args:
          prompts: One text, or a sequence of texts or of rows of token ids. Texts are encoded with the tokenizer's
            special tokens; rows of ids are used as they are, so they must already start with BOS.
          max_new_tokens: Number of tokens after which generation stops if the model has not generated EOS.
          temperature: The logits are divided by it before sampling; 0 selects the most probable token (greedy).
          top_k: Sample from the K most probable tokens only. None: from all.
          top_p: Sample from the smallest set of tokens whose probabilities add up to at least this (nucleus sampling,
            arXiv:1904.09751); applied after temperature and top_k. None: from all.
          seed: Seed of the random numbers. Prompt i uses `seed + i`, so its completion does not depend on the others.

        Returns:
          One Completion for each prompt, in order. Ids that the tokenizer does not define are never generated.

        Raises:
          UserError: If a prompt does not fit the context, an argument is out of range, or the logits of every prompt
            are NaN or infinite.

        Warns:
          UserWarning: If the logits of some prompts become NaN or infinite; the completions of those end there, with
            finish_reason "error".
        """
        each = [prompts] if isinstance(prompts, str) else _each(prompts)
        ids = [self._encode(prompt, number) for number, prompt in enumerate(each)]
        seed = whole_number("seed", seed)
        seeds = [seed + i for i in range(len(each))]
        settings = sampling(temperature, top_k, top_p)
        limit = whole_number("max_new_tokens", max_new_tokens)
        eos_ids = self.config.eos_ids if self.tokenizer is None else self.tokenizer.eos_ids
        rows, finite = generate(
            self.params, ids, seeds, settings, limit, eos_ids, self.config, self.compute, self.mesh, self._drawable
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
            raise UserError("the checkpoint has no tokenizer", "Give token ids, or a tokenizer with --tokenizer.")
        return self.tokenizer.encode(prompt, specials=True)

    @cached_property
    def _drawable(self) -> np.ndarray | None:
        """A mask over the vocabulary of the ids that may be generated. None: all of them.

        They are the ids that the tokenizer defines, and EOS.
        """
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
        """Saves the model as a checkpoint folder. In a multi-process run, every process must call this.

        Args:
          path: The folder to create.
          format: A checkpoint format, for example "hf", "meta" or "gguf"; `camelid convert --help` lists them.
          dtype: Dtype of the saved parameters, for example "bfloat16". None: the dtype that they have.
          overwrite: Replace the files of an existing checkpoint. Other files in the folder are not touched.
          progress: Called with the number of bytes written so far and the total.

        Raises:
          UserError: If the folder exists and `overwrite` is False, it is not a checkpoint, other files have names that
            would be written, the format or `dtype` is unknown or cannot represent the model, or the disk is full. The
            destination is unchanged in each case.
        """
        params, config = untied(self.params, self.config)
        leaves = named(params)
        dtypes = {path: np.dtype(leaf.dtype) if dtype is None else dtype_named(dtype) for path, leaf in leaves.items()}

        @lru_cache(WORKERS)
        def fetched(path: str, layer: int | None) -> np.ndarray:
            return _host_layer(leaves[path], layer, self.mesh)

        def source(path: str, layer: int | None, index: layout.Index, dtype: np.dtype) -> np.ndarray:
            return rounded(path, fetched(path, layer)[index], dtype)

        saving = ExportSpec(config, dtypes, source, self.companions)
        # Fetching a layer is a collective operation: every process takes part in each, in the same order.
        if is_main():
            workers = WORKERS if jax.process_count() == 1 else 1
            with cleaned_up(), tempfile.TemporaryDirectory() as converted:
                # Meta's own code reads only tiktoken rank files.
                companions = portable(self.companions, Path(converted), keep_ranks=format == "meta")
                saving = replace(saving, companions=companions)
                write_checkpoint(Path(path), saving, format, overwrite=overwrite, progress=progress, workers=workers)
        else:
            for file in plan_files(saving, format):
                for segment in file.payloads:
                    collections.deque(segment.chunks(), maxlen=0)
        wait_for_all(f"saved {path}")


@in_python
def load(
    path: str | Path,
    dtype: str | None = "float32",
    mesh: Mesh | MeshConfig | None = None,
    compute: ComputeConfig | None = None,
    *,
    format: str | None = None,
    config: ModelConfig | None = None,
    ignore: Sequence[str] = (),
    tokenizer: str | Path | None = None,
) -> Model:
    """Loads a checkpoint of any supported format, without converting it first.

    Args:
      path: A checkpoint folder or file, or the name of a Hugging Face Hub repository such as
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0".
      dtype: Dtype of the parameters and of matrix products. None: the dtype of the files.
      mesh: The devices that hold the parameters, for example `MeshConfig(fsdp=2)`. None: the first device.
      compute: Kernels, rematerialization and replicated axes; its dtypes are replaced by `dtype`.
      format: The checkpoint format, for example "easylm". None: detected from the files.
      config: The architecture, for checkpoints that do not contain it.
      ignore: Fields of config.json to treat as absent, for example "rope_scaling.alpha".
      tokenizer: A folder or file to read the tokenizer from. None: the checkpoint's own.

    Returns:
      The model. Each device has read only its own shards of the parameters.

    Raises:
      UserError: If the checkpoint is damaged, incomplete, or has fields or tensors that camelid does not know; if the
        axes of the model do not divide over the mesh; or if an argument is not valid.
    """
    _check_type("compute", compute, ComputeConfig, "camelid.ComputeConfig")
    _check_type("config", config, ModelConfig, "camelid.ModelConfig")
    _check_type("tokenizer", tokenizer, str | Path, "the path of a folder or file")
    checkpoint = open_checkpoint(path, format, config, ignore)
    if dtype is None:
        found = {dtype.name for dtype in checkpoint.dtypes.values()}
        if len(found) > 1:
            raise UserError(f"the files contain several dtypes: {', '.join(sorted(found))}", "Choose one with --dtype.")
        dtype = found.pop()
    dtype = dtype_named(dtype).name
    compute = replace(compute or ComputeConfig(), dtype=dtype, param_dtype=dtype)
    mesh = _mesh(mesh)
    check_divides(checkpoint.config.axis_sizes, mesh, compute.replicate)
    found = find_tokenizer(checkpoint.tokenizer_folder) if tokenizer is None else load_tokenizer(tokenizer)
    params = load_params(checkpoint, compute, mesh)
    companions = checkpoint.companions if tokenizer is None else checkpoint.other_companions
    model = Model(checkpoint.config, params, None, compute, mesh, tuple(companions), checkpoint.notes)
    return model if found is None else model.with_tokenizer(found)


def load_params(checkpoint: Checkpoint, compute: ComputeConfig, mesh: Mesh) -> Decoder:
    """The parameters of a checkpoint in `compute.param_dtype`; each device reads only its own shards."""
    specs = declare_decoder(checkpoint.config)
    targets = named(abstract(specs, jnp.dtype(compute.param_dtype), mesh, compute.replicate))
    arrays = saved_state.load(checkpoint.table, checkpoint.tensors, targets)
    return build(specs, [arrays[path] for path in named(specs)])


def _mesh(mesh: Mesh | MeshConfig | None) -> Mesh:
    if mesh is None:
        return one_device()
    if isinstance(mesh, MeshConfig):
        return make_mesh(mesh)
    advice = "Give a camelid.MeshConfig, for example MeshConfig(fsdp=2), or None for one device."
    if not isinstance(mesh, Mesh):
        raise UserError(f"mesh = {mesh!r} is not a mesh", advice)
    axes = [field.name for field in fields(MeshConfig)]
    if missing := [axis for axis in axes if axis not in mesh.shape]:
        raise UserError(f"the mesh has axes {tuple(mesh.shape)} but not {missing[0]!r}", advice)
    prepare_backend()
    return mesh


def _check_type(name: str, value: object, expected: type | UnionType, wanted: str) -> None:
    if value is not None and not isinstance(value, expected):
        raise UserError(f"{name} = {value!r} is not {wanted}", f"Give {wanted}, or leave {name} out.")


def _each(prompts: object) -> list:
    """The prompts as a list."""
    try:
        return list(prompts)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise UserError(
            f"prompts = {prompts!r} is neither a text nor a sequence of texts or rows of token ids", ROWS
        ) from None


@partial(jax.jit, static_argnames=("config", "compute"))
def _logits(params: Decoder, tokens: Array, config: ModelConfig, compute: ComputeConfig) -> Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return params(tokens, positions, None, config, compute)[0]


def _host_layer(leaf: Weight, layer: int | None, mesh: Mesh) -> np.ndarray:
    """One layer of a parameter (None: the entire parameter) as a NumPy array in every process.

    Adapters are merged, and quantized weights are dequantized.
    """
    if layer is None:
        return to_host(leaf if isinstance(leaf, Array) else jax.jit(dense)(leaf))
    return to_host(_take(leaf, jnp.int32(layer), NamedSharding(mesh, PartitionSpec())))


@partial(jax.jit, static_argnums=2)
def _take(stacked: Weight, layer: Array, replicated: NamedSharding) -> Array:
    one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), stacked)
    return jax.lax.with_sharding_constraint(dense(one), replicated)
