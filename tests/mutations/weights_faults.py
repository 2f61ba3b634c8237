"""Faults of weights that are not arrays, of run_layers and of dropout."""

from mutations.fault import Fault

WEIGHTS = "model/test_weights.py"
DECODER = "model/test_adapted_decoder.py"
CONTEXT = "model/test_context.py"

FAULTS = (
    Fault(
        "adapters: the scale is left out",
        "model/weights.py",
        "h = kept(_rowwise_product(given, a, x.dtype)).astype(jnp.float32) * scale",
        "h = kept(_rowwise_product(given, a, x.dtype)).astype(jnp.float32)",
        f"{WEIGHTS}::test_products_of_adapted_weights_and_their_gradients_are_those_of_peft[BSE,ME->BSM-lora]",
    ),
    Fault(
        "adapters: the scale is trained",
        "model/weights.py",
        "return a, b, lax.stop_gradient(self.scale.astype(jnp.float32))",
        "return a, b, self.scale.astype(jnp.float32)",
        f"{WEIGHTS}::test_products_of_adapted_weights_and_their_gradients_are_those_of_peft[BSE,ME->BSM-lora]",
    ),
    Fault(
        "dora: the length is that of the base alone",
        "model/weights.py",
        "lengths = row_lengths(self._merged())",
        "lengths = row_lengths(self._merged() * 0.0 + dense(self._base).reshape(self._merged().shape[-2:]))",
        f"{WEIGHTS}::test_products_of_adapted_weights_and_their_gradients_are_those_of_peft[BSE,ME->BSM-dora]",
    ),
    Fault(
        "dora: the length is differentiated",
        "model/weights.py",
        "norm = lax.stop_gradient(jnp.linalg.norm(rows, axis=-1))",
        "norm = jnp.linalg.norm(rows, axis=-1)",
        f"{WEIGHTS}::test_products_of_adapted_weights_and_their_gradients_are_those_of_peft[BSE,ME->BSM-dora]",
    ),
    Fault(
        "several adapters: -1 selects the last one",
        "model/weights.py",
        "        if off is not None:\n            scale = jnp.where(off, 0.0, scale)[:, None, None]\n        h =",
        "        if off is not None:\n            scale = scale[:, None, None]\n        h =",
        f"{WEIGHTS}::test_each_row_is_multiplied_by_the_adapter_that_the_context_selects[lora]",
    ),
    Fault(
        "several adapters: a lookup takes every row from the first",
        "model/weights.py",
        "a, scale, at = a[index], scale[index], (index[:, None], tokens)",
        "a, scale, at = a[index], scale[index], (0 * index[:, None], tokens)",
        f"{WEIGHTS}::test_each_row_is_multiplied_by_the_adapter_that_the_context_selects[lora]",
    ),
    Fault(
        "quantized: groups are counted along the outputs",
        "model/weights.py",
        "return (grouped * self.scale[..., None].astype(jnp.float32)).reshape(self.codes.shape)",
        "return (grouped * jnp.flip(self.scale, -1)[..., None].astype(jnp.float32)).reshape(self.codes.shape)",
        f"{WEIGHTS}::test_each_group_of_inputs_has_its_scale",
    ),
    Fault(
        "quantized: the table is dequantized before the lookup",
        "model/weights.py",
        "return Quantized(self.codes[tokens], self.scale[tokens]).dense()",
        "return self.dense()[tokens]",
        f"{WEIGHTS}::test_lookups_in_a_quantized_table_are_its_dense_rows_and_only_they_are_dequantized",
    ),
    Fault(
        "quantized: dense matrices are saved for the backward pass",
        "model/products.py",
        "@partial(jax.checkpoint, static_argnums=(2,))\n",
        "",
        f"{DECODER}::test_the_backward_pass_keeps_no_dense_copy_of_a_quantized_weight[none]",
    ),
    Fault(
        "a tied head uses the adapter of the lookup",
        "model/decoder.py",
        "table = self.embed.base if isinstance(self.embed, Adapted) else self.embed",
        "table = self.embed",
        f"{DECODER}::test_an_adapter_of_a_tied_table_belongs_to_one_of_its_uses_as_in_peft[embed_tokens]",
    ),
    Fault(
        "a rank is sharded like the inputs",
        "model/params.py",
        'place(*lead, "rank", *spec.inputs)',
        'place(*lead, *spec.inputs, "rank")',
        "model/test_params.py::test_the_arrays_of_every_type_of_weight_are_sharded_like_its_inputs_and_outputs",
    ),
    Fault(
        "run_layers: a slice has the windows of the first layers",
        "model/decoder.py",
        "kinds = config.windowed[first : first + count]",
        "kinds = config.windowed[:count]",
        "model/test_decoder.py::test_slices_of_the_layers_run_in_turn_give_what_all_layers_give[gemma3]",
    ),
    Fault(
        "dropout: a row's key is that of its place in the microbatch",
        "model/context.py",
        "return jax.vmap(jax.random.fold_in, (None, 0))(key, self.rows)",
        "return jax.vmap(jax.random.fold_in, (None, 0))(key, jax.numpy.arange(len(self.rows)))",
        f"{CONTEXT}::test_rows_in_microbatches_are_dropped_as_in_one_batch",
    ),
    Fault(
        "dropout: all layers drop the same elements",
        "model/context.py",
        "return replace(self, dropout_key=jax.random.fold_in(self.dropout_key, index))",
        "return self",
        f"{CONTEXT}::test_layers_and_purposes_drop_different_elements",
    ),
    Fault(
        "dropout: what is left is not scaled up",
        "model/context.py",
        "jnp.where(kept, x / jnp.asarray(1 - rate, x.dtype), ",
        "jnp.where(kept, x, ",
        f"{CONTEXT}::test_the_share_of_dropped_elements_is_the_rate_and_the_mean_is_kept",
    ),
    Fault(
        "a lookup has the adapter where it is turned off",
        "model/weights.py",
        "            scale = jnp.where(off, 0.0, scale)[:, None, None]\n        delta",
        "            scale = jnp.where(off, scale, scale)[:, None, None]\n        delta",
        f"{WEIGHTS}::test_rows_may_use_the_base_of_a_single_adapter[False]",
    ),
)
