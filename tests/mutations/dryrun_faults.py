"""Faults in planning a run: dry runs, the memory of adapters, and what is printed about defaults."""

from mutations.fault import Fault

DRY = "end_to_end/test_dry_run.py::"
SAME = f"{DRY}test_the_program_and_the_sizes_are_those_of_the_run"
SAID = f"{DRY}test_what_a_dry_run_says_comes_true"
PRODUCTS = f"{DRY}test_products_are_counted_as_often_as_they_are_computed"
PRINTED = "test_printed_recipe.py::"

FAULTS = (
    Fault(
        "a dry run compiles for a frozen base that is not quantized",
        "runs/lora.py",
        "shapes = held_shapes(config, base_form(recipe))",
        "shapes = held_shapes(config, base_dtype(recipe))",
        f"{SAME}[nf4]",
    ),
    Fault(
        "a dry run compiles for a frozen base that every device holds",
        "runs/lora.py",
        "freeze(jax.tree.map(_placed, shapes, places), plan, config)",
        "freeze(jax.tree.map(lambda x, _: _placed(x, placement((), mesh)), shapes, places), plan, config)",
        f"{SAME}[nf4]",
    ),
    Fault(
        "a dry run forgets the moving average",
        "runs/dry_run.py",
        '"moving average": state.ema,',
        '"moving average": None,',
        f"{SAME}[full]",
    ),
    Fault(
        "a dry run compiles for batches without a reference",
        "runs/components.py",
        "return PairBatch if self.precomputes_reference else Batch",
        "return Batch",
        f"{SAME}[preference]",
    ),
    Fault(
        "bytes of all devices are taken for those of one",
        "runs/dry_run.py",
        "x.sharding.shard_shape(x.shape)",
        "x.shape",
        f"{SAME}[full]",
    ),
    Fault(
        "memory that results reuse counts twice",
        "runs/dry_run.py",
        "self.memory.argument_size_in_bytes + self.memory.output_size_in_bytes - self.memory.alias_size_in_bytes",
        "self.memory.argument_size_in_bytes + self.memory.output_size_in_bytes",
        f"{SAME}[full]",
    ),
    Fault(
        "a dry run does not check whether the data changed",
        "runs/dry_run.py",
        "broadcast_from_main(lambda: check_data(folder, components.data))",
        "pass",
        SAID,
    ),
    Fault(
        "a dry run resumes from the newest step only",
        "runs/dry_run.py",
        "opened.previous is not None, from_step)",
        "opened.previous is not None, None)",
        SAID,
    ),
    Fault(
        "a dry run does not miss the reference of a run",
        "runs/dry_run.py",
        "if resumed is not None and components.precomputes_reference:",
        "if False:",
        f"{DRY}test_a_run_that_cannot_be_resumed_shows",
    ),
    Fault(
        "products of the layers count once",
        "model/flops.py",
        'equation.params.get("length", 1) * sum(counts)',
        "sum(counts)",
        f"{PRODUCTS}[none-dense-1-1-True]",
    ),
    Fault(
        "products in loops of unknown length pass for all products",
        "model/flops.py",
        '(name == "while" and any(counts))',
        "False",
        f"{PRODUCTS}[none-blockwise-0.5-1-False]",
    ),
    Fault(
        "the time is that of one step",
        "runs/dry_run_report.py",
        "_duration(compiled.flops * steps, ",
        "_duration(compiled.flops, ",
        f"{DRY}test_the_time_is_estimated_and_what_does_not_fit_is_noted",
    ),
    Fault(
        "QLoRA keeps what LoRA keeps",
        "describe.py",
        '"qlora": "nf4"',
        '"qlora": "bfloat16"',
        "test_describe.py::test_training_of_adapters_keeps_what_a_run_of_adapters_holds",
    ),
    Fault(
        "a printed default belongs to the section above",
        "runs/recipe_defaults.py",
        "_add(lines, comments.pop(section, []))\n            section = header[1]",
        "section = header[1]\n            _add(lines, comments.pop(section, []))",
        f"{PRINTED}test_defaults_that_follow_from_other_fields_are_comments",
    ),
    Fault(
        "a field that is given is printed as a default, too",
        "runs/recipe_defaults.py",
        "if field not in there and",
        "if",
        f"{PRINTED}test_what_is_given_has_no_comment",
    ),
    Fault(
        "a batch as large as the data is noted",
        "runs/notes.py",
        "if data.batch_size > rows:",
        "if data.batch_size >= rows:",
        f"{PRINTED}test_a_batch_of_more_rows_than_there_are_is_noted",
    ),
)
