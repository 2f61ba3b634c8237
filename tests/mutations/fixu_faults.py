"""Faults in what commands tell: how two recipes differ, what is trained, and how prompts become chats."""

from mutations.fault import Fault

FAULTS = (
    Fault(
        "the difference that changes the defaults of other fields is not the first",
        "runs/recipe_differences.py",
        "    return 2 + (CAUSES.index(name) if name in CAUSES else len(CAUSES))\n",
        "    return 2\n",
        "test_recipe.py::test_another_recipe_is_described_with_causes_first_and_in_toml",
    ),
    Fault(
        "parameters of which some layers are frozen are counted entirely",
        "train/trainable.py",
        "        spec.size // trained[path].size * int(trained[path].sum())",
        "        spec.size * int(trained[path].any())",
        "train/test_lora.py::test_an_adapter_without_a_table_is_merged_and_what_is_frozen_is_not_counted",
    ),
)
