"""The names of checkpoint formats, as choices of command line options."""

from typing import Literal

# Copies of the names in checkpoint/registry.py, which is not imported before a command runs.
WritableFormat = Literal[
    "hf",
    "meta",
    "easylm",
    "easylm-flax",
    "easylm-trainstate",
    "mindspore",
    "mindspore-safetensors",
    "mindspore-interleaved",
    "megatron",
    "megatron-legacy",
    "llama2-jax",
    "llama2c",
    "llama2c-v1",
    "llama2c-v2",
    "gguf",
    "gguf-q8_0",
    "gguf-q4_0",
]
ConvertedFormat = Literal[WritableFormat, "peft"]
ReadableFormat = Literal[WritableFormat, "dcp", "run", "peft"]
