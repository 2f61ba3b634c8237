"""The fields of a recipe that `camelid finetune` chooses: for the size of the model, the text and the devices.

Nothing here reads a file or imports JAX: each choice is a function of the facts.
"""

import math
from dataclasses import dataclass
from typing import Literal

from camelid.model.config import ModelConfig

Remat = Literal["elementwise", "layer"]

LEARNING_RATES = (
    (10e6, 1e-3, 5e-3),
    (500e6, 1e-4, 1e-3),
    (3e9, 5e-5, 5e-4),
    (30e9, 2e-5, 2e-4),
    (math.inf, 1e-5, 1e-4),
)
"""Number of parameters up to which it applies; learning rate of all parameters; that of adapters."""
DPO_FACTOR = 1 / 20  # of these learning rates
EPOCHS = ((100_000, 3), (1_000_000, 2), (math.inf, 1))
"""Number of examples up to which it applies, and epochs; texts and preferences are read once."""
HELD_OUT = ((2000, 0.02), (200, 0.05))
"""Number of records from which it applies, and the fraction that is held out for validation."""
TOKENS_PER_STEP = 2**15
STEPS_PER_EPOCH = 32  # at least, if there is more than one row a step
TEXT_LENGTH = 2048
MAX_LENGTH = 4096  # of rows that longer examples do not exceed

# A plan of the memory. Its margin covers what is not counted; for a 1.1B model, it agrees with docs/lora.md.
USABLE = 0.8  # of the memory of a device
MARGIN = 1.5
BYTES_PER_PARAMETER = 18  # float32, gradient, two moments, and a copy for the products
BASE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.1, "nf4": 0.6}
ADAPTERS = 0.02  # fraction of the parameters that are adapters


@dataclass(frozen=True)
class Devices:
    """The devices that train."""

    platform: str
    """cpu, gpu or tpu"""
    count: int
    memory: int | None
    """bytes of each device; None if it is not known"""
    data_parallel: int
    """number of groups of devices that each compute with their own rows"""

    @property
    def dtype(self) -> str:
        """The dtype in which they multiply fast."""
        return "float32" if self.platform == "cpu" else "bfloat16"


@dataclass(frozen=True)
class Memory:
    """What training is planned to take of a device."""

    rows: int
    """rows of a microbatch that fit; 0 if even one does not"""
    needed: int
    """bytes for a microbatch of one row"""


def learning_rate(parameters: int, lora: bool, dpo: bool) -> float:
    """The peak learning rate of AdamW."""
    full, adapters = next((full, adapters) for most, full, adapters in LEARNING_RATES if parameters <= most)
    rate = adapters if lora else full
    return float(f"{rate * DPO_FACTOR:.2g}") if dpo else rate


def epochs(examples: int, texts: bool, dpo: bool) -> int:
    """How often the training data is read."""
    return 1 if texts or dpo else next(number for most, number in EPOCHS if examples <= most)


def validation_fraction(records: int) -> float:
    """The fraction of the records that is held out; 0 if there are few."""
    return next((fraction for least, fraction in HELD_OUT if records >= least), 0.0)


def sequence_length(longest: int, tokens: int, context: int, texts: bool) -> int:
    """The tokens of a row.

    For texts, which are cut into rows, TEXT_LENGTH if there are tokens for many such rows. For examples, the power of
    two that holds the longest, and at least 256, because short examples share a row.
    """
    if texts:
        length = min(context, TEXT_LENGTH)
        while length > 64 and tokens < STEPS_PER_EPOCH * length:
            length //= 2
        return length
    return min(context, MAX_LENGTH, max(256, 2 ** math.ceil(math.log2(max(2, longest)))))


def batch_size(rows: int, length: int, data_parallel: int) -> int:
    """The rows of a step: about TOKENS_PER_STEP tokens, fewer for little data, and a multiple of `data_parallel`."""
    wanted = max(1, min(TOKENS_PER_STEP // length, rows // STEPS_PER_EPOCH))
    return data_parallel * math.ceil(2 ** int(math.log2(wanted)) / data_parallel)


def steps(rows: int, batch: int, times: int) -> int:
    """The steps in which all rows are read so many times."""
    return max(1, math.ceil(rows * times / batch))


def memory(
    config: ModelConfig, parameters: int, length: int, devices: Devices, dtype: str, base: str | None, remat: Remat
) -> Memory:
    """A rough plan of the memory of a device, with `base` the dtype of frozen parameters; None if all are trained."""
    size = 4 if dtype == "float32" else 2
    per_parameter = BYTES_PER_PARAMETER if base is None else BASE_BYTES[base] + ADAPTERS * BYTES_PER_PARAMETER
    state = parameters * per_parameter / devices.count
    kept = config.embed_dim if remat == "layer" else 6 * config.embed_dim + 2 * config.mlp_dim
    inside = 10 * config.embed_dim + 6 * config.mlp_dim + 2 * config.vocab_size
    if devices.platform == "cpu":  # which has no kernel that computes attention in blocks
        inside += 3 * config.num_heads * length
    row = MARGIN * length * (config.num_layers * kept * size + 4 * inside)
    if devices.memory is None:
        return Memory(8, int(state + row))
    return Memory(max(0, int((USABLE * devices.memory - state) / row)), int(state + row))


def microbatches(rows: int, fitting: int) -> int:
    """The smallest number of equal parts of `rows` rows of a device, each of at most `fitting`."""
    return next(parts for parts in range(1, rows + 1) if rows % parts == 0 and rows // parts <= max(1, fitting))
