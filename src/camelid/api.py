"""The Python API: `camelid.load`, and the Model that it returns."""

import collections
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import UnionType
from typing import Any

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
from camelid.completion import Completion, TextGeneration
from camelid.errors import UserError, in_python
from camelid.generate.config import GenerationConfig, generation_config
from camelid.generate.decode import Generation
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
from camelid.text.tokenizer import (
    Tokenizer,
    companions_with,
    find_tokenizer,
    load_tokenizer,
    portable,
    vocabulary_notes,
)

STREAM_STEPS = 16
"""tokens that are generated between two pieces of a stream"""


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
        options: GenerationConfig | None = None,
        **changes: Any,
    ) -> list[Completion]:
        """Generates continuations of each prompt.

        Args:
          prompts: One text, or a sequence of texts or of rows of token ids. Texts are encoded with the tokenizer's
            special tokens; rows of ids are used as they are, so they must already start with BOS.
          options: How to generate. None: the defaults of GenerationConfig.
          **changes: Fields of GenerationConfig, for example max_new_tokens=100, temperature=0.8, top_p=0.95, seed=1.

        Returns:
          `n` Completions for each prompt, in order. They do not depend on the other prompts. Ids that the tokenizer
          does not define are never generated.

        Raises:
          UserError: If a prompt does not fit the context, an option is unknown or out of range, or the logits of every
            prompt are NaN or infinite.

        Warns:
          UserWarning: If the logits of some prompts become NaN or infinite; the completions of those end there, with
            finish_reason "error".
        """
        each = [prompts] if isinstance(prompts, str) else _each(prompts)
        generation = self._begin(each, generation_config(options, changes))
        collections.deque(generation.pieces(), maxlen=0)
        completions = generation.completions
        failed = [completion for completion in completions if completion.finish_reason == "error"]
        if len(failed) == len(completions):
            raise not_finite(self.params, self.compute, "the logits are")
        for completion in failed:
            warnings.warn(
                f"prompt {completion.prompt_index}: the logits became NaN or infinite after {len(completion.tokens)} "
                "new tokens",
                stacklevel=3,
            )
        return completions

    @in_python
    def stream(
        self, prompt: str | Sequence[int], options: GenerationConfig | None = None, **changes: Any
    ) -> Iterator[str]:
        """Generates a continuation of one prompt, and yields its text as it grows, in complete characters.

        Joined, the pieces are the text of the completion that `generate` returns. Arguments are those of `generate`.

        Raises:
          UserError: As `generate`, before the first piece; or if more than one completion is requested, or the model
            has no tokenizer.
        """
        options = generation_config(options, changes)
        if not isinstance(prompt, str) and any(isinstance(part, str) for part in prompt):
            raise UserError("several prompts cannot be streamed together", "Stream one, or call generate.")
        if options.logprobs or options.top_logprobs:
            raise UserError("a stream is text alone, without log-probabilities", "Call generate for them.")
        if options.n > 1:
            raise UserError(f"n = {options.n} completions cannot be streamed", "Stream one, or call generate.")
        if self.tokenizer is None:
            raise UserError("the checkpoint has no tokenizer, so there is no text to stream", "Call generate.")
        return self._pieces(self._begin([prompt], options))

    def _pieces(self, generation: TextGeneration) -> Iterator[str]:
        for (piece,) in generation.pieces(STREAM_STEPS):
            if piece:
                yield piece
        if generation.completions[0].finish_reason == "error":
            raise not_finite(self.params, self.compute, "the logits are")

    def _begin(self, prompts: Sequence[str | Sequence[int]], options: GenerationConfig) -> TextGeneration:
        if options.stop and self.tokenizer is None:
            raise UserError("the checkpoint has no tokenizer, so no stop string can be found", "Use stop_token_ids.")
        ids = [self._encode(prompt, number) for number, prompt in enumerate(prompts)]
        eos_ids = self.config.eos_ids if self.tokenizer is None else self.tokenizer.eos_ids
        seeds = [options.seed + i for i in range(len(ids))]
        generation = Generation(
            self.params, ids, seeds, options, eos_ids, self.config, self.compute, self.mesh, self._drawable
        )
        return TextGeneration(generation, prompts, ids, options, self.tokenizer)

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
