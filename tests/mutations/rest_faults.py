"""Faults in what reads MindFormers' LoRA factors."""

from mutations.fault import Fault

MODULE = "checkpoint/adapters/mindformers.py"
TEST = "checkpoint/test_mindformers_lora.py::"

FAULTS = (
    Fault(
        "the rows of MindFormers' factors B are taken as they are in the file",
        MODULE,
        '(f"{module}.weight" for module in modules), rope_layout)',
        '(f"{module}.weight" for module in modules), "half")',
        f"{TEST}test_the_rows_of_older_models_are_interleaved",
    ),
    Fault(
        "the alpha of the YAML comes before the one that is given",
        MODULE,
        "    if given is not None:\n        return given\n",
        "",
        f"{TEST}test_the_alpha_is_that_of_the_yaml_and_a_weight_multiplies_the_update",
    ),
    Fault(
        "the moments of factors are read as factors",
        MODULE,
        "if name not in aside}",
        "if True}",
        f"{TEST}test_a_checkpoint_that_holds_base_and_factors_is_merged_when_it_is_read",
    ),
    Fault(
        "factors of two generations are mixed",
        MODULE,
        "        if len(ways) > 1:",
        "        if len(ways) > 4:",
        f"{TEST}test_what_does_not_fit_is_an_error_that_names_it[two generations]",
    ),
    Fault(
        "a YAML of another rank is believed",
        MODULE,
        "and {int(rank) for rank in configured} != {*ranks}:",
        "and not ranks:",
        f"{TEST}test_what_does_not_fit_is_an_error_that_names_it[the YAML of another run]",
    ),
    Fault(
        "an adapter is written without the weight that multiplies it",
        "checkpoint/adapters/added.py",
        "alpha=weight * pair.alpha",
        "alpha=pair.alpha",
        f"{TEST}test_an_adapter_with_another_weight_is_written_with_its_alpha_multiplied",
    ),
)
