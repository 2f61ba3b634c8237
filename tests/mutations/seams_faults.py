"""Faults in decoding steps of different lengths, in shared prompts and sampling, and in what commands print."""

from mutations.fault import Fault

STATE = "generate/test_state.py::"
SAMPLING = "generate/test_sampling.py::"
ATTENTION = "model/test_attention.py::"
RUN_FOLDER = "end_to_end/test_run_folder.py::"

FAULTS = (
    Fault(
        "padding of a row that advances by fewer tokens is written",
        "generate/state.py",
        "offsets < counts[:, None]",
        "state.active[:, None]",
        f"{STATE}test_rows_that_advance_by_different_numbers_of_tokens_are_as_each_alone",
    ),
    Fault(
        "a row that advances by fewer tokens becomes as long as the others",
        "generate/state.py",
        "lengths = state.lengths + counts",
        "lengths = state.lengths + jnp.where(state.active, size, 0)",
        f"{STATE}test_rows_that_advance_by_different_numbers_of_tokens_are_as_each_alone",
    ),
    Fault(
        "a prompt's tokens are scored by the logits after them",
        "generate/state.py",
        "targets = jnp.roll(prompts.tokens, -1, 1)",
        "targets = prompts.tokens",
        f"{STATE}test_prompts_are_scored_while_they_are_processed",
    ),
    Fault(
        "a shared prompt is not seen",
        "model/mask.py",
        "((queries == keys) | (keys == EVERY_SEGMENT))",
        "(queries == keys)",
        f"{ATTENTION}test_packed_continuations_of_a_cached_prompt_are_as_rows_of_their_own",
    ),
    Fault(
        "packed continuations see each other",
        "model/attention.py",
        "return Mask(query_positions, visible, query_segments, view.segments, window)",
        "return Mask(query_positions, visible, None, None, window)",
        f"{ATTENTION}test_packed_continuations_of_a_cached_prompt_are_as_rows_of_their_own",
    ),
    Fault(
        "a layer is held while the next one is read",
        "model/decoder.py",
        "            del layer, unrolled  # before the next one is read\n",
        "",
        "model/test_decoder.py::test_unrolled_layers_give_what_stacked_ones_give_and_only_one_is_read_at_a_time",
    ),
    Fault(
        "negative logits are in the wrong order",
        "generate/filters.py",
        "jnp.where(bits < sign, bits | sign, ~bits)",
        "bits ^ sign",
        f"{SAMPLING}test_top_k_without_sorting_keeps_what_sorting_keeps",
    ),
    # Commands
    Fault(
        "data inspect ignores overrides",
        "cli/data.py",
        "recipe = read_recipe(path, overrides)",
        "recipe = read_recipe(path)",
        "test_data_cli.py::test_overrides_change_what_is_inspected",
    ),
    Fault(
        "values are rounded to the dtype of the second checkpoint alone",
        "checkpoint/compare.py",
        "return a if a.itemsize < b.itemsize else b",
        "return b",
        "checkpoint/test_compare.py::test_rounding_is_told_from_change",
    ),
    Fault(
        "a finished run is saved again",
        "runs/run.py",
        "if start.resumed == recipe.train.steps and is_finished(folder, recipe.train.steps, results.names):",
        "if start.resumed != start.resumed:",
        f"{RUN_FOLDER}test_starting_a_finished_run_again_changes_nothing",
    ),
    Fault(
        "the model of an earlier step passes for that of a finished run",
        "runs/run_folder.py",
        "_step(folder) == step",
        "_step(folder) is not None",
        f"{RUN_FOLDER}test_a_model_that_is_missing_or_of_an_earlier_step_is_saved_again",
    ),
    Fault(
        "all rows of a source are examined before training",
        "data/report.py",
        "SilentRows(_examine(packing, examined)[0], examined",
        "SilentRows(_examine(packing, _rows(packing))[0], examined",
        "data/test_report.py::test_rows_without_loss_are_those_whose_weights_are_all_zero",
    ),
)
