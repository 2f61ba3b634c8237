"""Faults in quantized weights, and the test that must notice each."""

from mutations.fault import Fault

NF4 = "model/test_nf4.py::"
EQUAL = f"{NF4}test_codes_and_magnitudes_equal_bitsandbytes[two axes]"
DECODER = f"{NF4}test_a_decoder_with_quantized_layers_on_one_device_and_on_eight[nf4-NF4]"

FAULTS = (
    Fault(
        "the second element of a pair is in the upper four bits",
        "model/nf4.py",
        "codes[..., ::2] << 4 | codes[..., 1::2]",
        "codes[..., 1::2] << 4 | codes[..., ::2]",
        EQUAL,
    ),
    Fault(
        "the mean of the magnitudes is not added again",
        "model/nf4.py",
        "* scale + self.absmax_offset",
        "* scale",
        EQUAL,
    ),
    Fault(
        "magnitudes of other rows scale a lookup",
        "model/nf4.py",
        "places = tokens[..., None] * blocks + jnp.arange(blocks)",
        "places = jnp.zeros_like(tokens[..., None]) * blocks + jnp.arange(blocks)",
        f"{NF4}test_a_lookup_dequantizes_the_rows_of_its_tokens",
    ),
    Fault(
        "all layers share the magnitudes of their blocks",
        "model/quantize.py",
        "return lax.map(one_layer, matrix) if spec.stacked else one_layer(matrix)",
        "return lax.map(lambda _: one_layer(matrix[0]), matrix) if spec.stacked else one_layer(matrix)",
        DECODER,
    ),
    Fault(
        "the original arrays of quantized matrices stay in memory",
        "model/quantize.py",
        "    matrix.delete()\n",
        "",
        DECODER,
    ),
    Fault(
        "int8 has one scale for all outputs",
        "model/quantize.py",
        "jnp.abs(rows).max(-1, keepdims=True) / 127",
        "jnp.broadcast_to(jnp.abs(rows).max(), (*rows.shape[:-1], 1)) / 127",
        f"{NF4}test_int8_is_rounded_to_the_nearest_of_255_steps_for_each_output",
    ),
    Fault(
        "lora.base = nf4 is not applied",
        "runs/lora.py",
        'if (bits := recipe.lora.base) == "int8" or bits == "nf4":',
        'if (bits := recipe.lora.base) == "int8":',
        "train/test_qlora.py::test_a_base_in_nf4_on_a_mesh_learns_what_a_base_in_float32_learns",
    ),
)
