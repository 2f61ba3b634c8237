"""Faults in `camelid finetune` and the packaged recipes, and the test that must notice each."""

from mutations.fault import Fault

DETECT = "data/test_detection.py::"
DEFAULTS = "train/test_finetune_defaults.py::"
RUN = "end_to_end/test_finetune.py::"
RECIPES = "test_packaged_recipes.py::"

FAULTS = (
    Fault(
        "pairs of answers are trained on without --dpo",
        "data/detection.py",
        'kind = next((kind for kind in kinds if kind != "preference"), None)',
        "kind = next(iter(kinds), None)",
        f"{DETECT}test_records_are_of_the_kind_that_their_keys_have",
    ),
    Fault(
        "only the first record of a file counts",
        "data/detection.py",
        "for kind, keys in known.items() if number == 0 or kind in before}",
        "for kind, keys in (known if number == 0 else before).items()}",
        f"{DETECT}test_what_cannot_be_detected_is_an_error_that_names_the_file_and_the_option",
    ),
    Fault(
        "problems of GSM8K are taken for other questions",
        "data/detection.py",
        'if kind == "gsm8k" and not all(',
        'if kind == "gsm8k" and all(',
        f"{DETECT}test_records_are_of_the_kind_that_their_keys_have",
    ),
    Fault(
        "a resumed run gets the fields that would be chosen now",
        "runs/finetune.py",
        "table, notes = tomllib.loads(write_recipe(kept)), ()",
        "table, notes = _new_table(request)",
        f"{RUN}test_a_run_trains_says_what_to_try_next_and_is_resumed_by_the_same_command",
    ),
    Fault(
        "a planned warmup is added to the one that is given",
        "runs/finetune_choices.py",
        'if "warmup_steps" not in self.given.get("optimizer", {}):',
        "if True:",
        f"{RUN}test_fields_that_are_given_are_kept_and_the_others_chosen_around_them",
    ),
    Fault(
        "the length that is given is not the one that rows are planned with",
        "runs/finetune_choices.py",
        'length = self._value("data", "sequence_length", table["sequence_length"])\n        longer',
        'length = table["sequence_length"]\n        longer',
        f"{RUN}test_fields_that_are_given_are_kept_and_the_others_chosen_around_them",
    ),
    Fault(
        "texts that are mixed with examples are truncated",
        "runs/finetune_choices.py",
        'all(source["kind"] != "text" for source in sources)',
        "True",
        f"{RUN}test_several_files_and_texts",
    ),
    Fault(
        "a batch does not divide over the devices",
        "runs/finetune_defaults.py",
        "return data_parallel * math.ceil(2 ** int(math.log2(wanted)) / data_parallel)",
        "return max(data_parallel, 2 ** int(math.log2(wanted)))",
        f"{DEFAULTS}test_a_batch_divides_over_devices_and_microbatches",
    ),
    Fault(
        "the plan of the memory forgets the moments",
        "runs/finetune_defaults.py",
        "BYTES_PER_PARAMETER = 18",
        "BYTES_PER_PARAMETER = 8",
        f"{DEFAULTS}test_the_plan_of_the_memory_is_near_what_the_compiler_says",
    ),
    Fault(
        "a packaged recipe hides the file of the same name",
        "recipes/__init__.py",
        "if path.exists() or path.suffix",
        "if path.suffix",
        f"{RECIPES}test_train_takes_the_name_of_a_recipe_unless_a_file_has_it",
    ),
    Fault(
        "copying a recipe replaces a file",
        "cli/packaged_recipes.py",
        'file.open("x", encoding="utf-8")',
        'file.open("w", encoding="utf-8")',
        f"{RECIPES}test_recipes_are_listed_shown_and_copied",
    ),
)
