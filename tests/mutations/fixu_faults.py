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
    Fault(
        "a chat gets a second BOS",
        "text/chat.py",
        "    return [tokens.tolist() for tokens, _ in rendered]\n",
        "    return [[tokenizer.bos_id, *tokens.tolist()] for tokens, _ in rendered]\n",
        "test_cli.py::test_a_chat_is_what_transformers_makes_of_it",
    ),
    Fault(
        "a chat ends before the turn of the assistant",
        "text/chat.py",
        "self.render_batch(chats, tokenizer, add_generation_prompt=True)",
        "self.render_batch(chats, tokenizer)",
        "test_cli.py::test_a_chat_is_what_transformers_makes_of_it",
    ),
    Fault(
        "magnitudes are not counted among the parameters of an adapter",
        "describe.py",
        "for array in (pair.a, pair.b, pair.magnitude)]",
        "for array in (pair.a, pair.b)]",
        "train/test_lora.py::test_inspect_tells_what_the_adapter_is",
    ),
    Fault(
        "names separated by commas are one name",
        "runs/recipe.py",
        """and "," in text and""",
        """and ", and" in text and""",
        "test_recipe.py::test_an_override_that_fits_nowhere_is_refused",
    ),
)
