"""What `camelid finetune` chooses, as functions of the size of the model, the data and the devices."""

import pytest

from camelid.model.flops import count_parameters
from camelid.model.presets import preset
from camelid.runs import finetune_defaults as defaults
from camelid.runs.finetune_defaults import Devices

GIB = 2**30
GPU = Devices("gpu", 1, 80 * GIB, 1)


def planned(name: str, length: int, devices: Devices, base: str | None, remat: defaults.Remat = "layer"):
    config = preset(name)
    return defaults.memory(config, count_parameters(config), length, devices, "bfloat16", base, remat)


@pytest.mark.parametrize(("base", "gib"), [(None, 20.0), ("bfloat16", 6.6)], ids=["all parameters", "LoRA"])
def test_the_plan_of_the_memory_is_near_what_the_compiler_says(base: str | None, gib: float):
    """The table of docs/lora.md: a row of 2048 tokens of TinyLlama on a CPU."""
    needed = planned("tinyllama_1b", 2048, Devices("cpu", 1, None, 1), base).needed / GIB
    assert gib / 1.3 < needed < 1.3 * gib


def test_a_7b_model_fits_an_80_gib_gpu_with_adapters_and_eight_of_them_without():
    assert planned("llama2_7b", 2048, GPU, "bfloat16").rows >= 8
    assert planned("llama2_7b", 2048, GPU, "nf4").rows > planned("llama2_7b", 2048, GPU, "bfloat16").rows
    assert planned("llama2_7b", 2048, GPU, None).rows == 0
    assert planned("llama2_7b", 2048, Devices("gpu", 8, 80 * GIB, 8), None).rows >= 4
    longer, kept = (
        planned("llama2_7b", 4096, GPU, "bfloat16"),
        planned("llama2_7b", 2048, GPU, "bfloat16", "elementwise"),
    )
    assert longer.rows < planned("llama2_7b", 2048, GPU, "bfloat16").rows
    assert kept.rows < planned("llama2_7b", 2048, GPU, "bfloat16").rows


def test_larger_models_have_lower_learning_rates_adapters_higher_and_preferences_lower_ones():
    sizes = (260_000, 125e6, 1.1e9, 7e9, 70e9)
    full = [defaults.learning_rate(int(size), lora=False, dpo=False) for size in sizes]
    assert full == sorted(full, reverse=True)
    assert full[3] == 2e-5
    assert all(
        defaults.learning_rate(int(size), lora=True, dpo=False) >= 5 * rate
        for size, rate in zip(sizes, full, strict=True)
    )
    assert defaults.learning_rate(int(7e9), lora=False, dpo=True) == 1e-6
    assert defaults.learning_rate(int(7e9), lora=True, dpo=True) == 1e-5


@pytest.mark.parametrize(
    ("longest", "tokens", "context", "texts", "length"),
    [
        (60, 10_000, 2048, False, 256),
        (300, 10_000, 2048, False, 512),
        (512, 10_000, 2048, False, 512),
        (513, 10_000, 600, False, 600),
        (100_000, 10**7, 131_072, False, 4096),
        (100_000, 10**7, 131_072, True, 2048),
        (100_000, 10**7, 512, True, 512),
        (100_000, 20_000, 2048, True, 512),
        (40, 40, 2048, True, 64),
    ],
)
def test_rows_hold_the_longest_example_and_divide_texts(
    longest: int, tokens: int, context: int, texts: bool, length: int
):
    assert defaults.sequence_length(longest, tokens, context, texts) == length


@pytest.mark.parametrize("data_parallel", [1, 6, 8])
@pytest.mark.parametrize("rows", [1, 40, 1000, 10**6])
@pytest.mark.parametrize("fitting", [0, 1, 3, 100])
def test_a_batch_divides_over_devices_and_microbatches(rows: int, data_parallel: int, fitting: int):
    batch = defaults.batch_size(rows, 512, data_parallel)
    assert batch % data_parallel == 0
    assert batch >= data_parallel
    assert batch == data_parallel or batch * 512 < 2 * defaults.TOKENS_PER_STEP
    own = batch // data_parallel
    parts = defaults.microbatches(own, fitting)
    assert own % parts == 0
    assert own // parts <= max(1, fitting)


def test_little_data_is_read_three_times_and_texts_and_preferences_once():
    assert [defaults.epochs(count, False, False) for count in (10, 500_000, 10**7)] == [3, 2, 1]
    assert defaults.epochs(10, True, False) == defaults.epochs(10, False, True) == 1
    assert defaults.steps(100, 8, 3) == 38
    assert defaults.steps(1, 8, 1) == 1
    assert [defaults.validation_fraction(count) for count in (1, 199, 200, 2000)] == [0.0, 0.0, 0.05, 0.02]
