"""Faults in what a run writes besides its checkpoints, and in checkpoints without the state of the optimizer."""

from mutations.fault import Fault

SAMPLES = "train/test_samples.py::"
RESUMED = f"{SAMPLES}test_a_resumed_run_has_the_lines_of_one_that_was_not_interrupted"
MILESTONES = "train/test_milestones.py::"
MADE_UP = f"{MILESTONES}test_a_milestone_that_a_killed_process_did_not_write_is_made_up_for_and_written_once"

FAULTS = (
    Fault(
        "samples are those of the parameters, not of their average",
        "runs/samples.py",
        "state.trainable if state.ema is None else state.ema",
        "state.trainable",
        f"{SAMPLES}test_samples_are_what_the_average_of_the_parameters_generates",
    ),
    Fault(
        "samples that were written are written again",
        "runs/samples.py",
        " if (prompt, seed + i) not in present]",
        "]",
        RESUMED,
    ),
    Fault(
        "samples of steps that are made again stay",
        "runs/samples.py",
        "MetricsFile(self._path, resume_from)",
        "MetricsFile(self._path, 10**9)",
        RESUMED,
    ),
    Fault(
        "samples of the step that is resumed are missing",
        "runs/run.py",
        "if samples is not None and (start.resumed is None or samples.is_due(first)):",
        "if samples is not None and start.resumed is None:",
        RESUMED,
    ),
    Fault(
        "samples use the seed of the first prompt",
        "runs/samples.py",
        '"seed": self._config.seed + number,',
        '"seed": self._config.seed,',
        f"{SAMPLES}test_each_step_has_a_line_for_each_prompt",
    ),
    Fault(
        "prompts of chats are plain texts",
        "runs/samples.py",
        "if len(names) == 1 and all(store.templates for store in stores):",
        "if False:",
        f"{SAMPLES}test_prompts_of_chats_have_the_template_of_the_training_data",
    ),
    Fault(
        "a terminal interprets what a model generates",
        "runs/samples.py",
        r'c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}"',
        "c",
        f"{SAMPLES}test_a_model_without_finite_logits_ends_no_run_and_control_characters_reach_no_terminal",
    ),
    Fault(
        "every checkpoint is a milestone",
        "runs/results.py",
        "if format is not None and every is not None and step % every == 0:",
        "if format is not None:",
        f"{MILESTONES}test_milestones_of_adapters_are_opened_by_peft_or_merged[True]",
    ),
    Fault(
        "a milestone that was not written is missing for ever",
        "runs/run.py",
        "    results.make_up(state, start)\n",
        "",
        MADE_UP,
    ),
    Fault(
        "a milestone is written again when the run is resumed",
        "runs/results.py",
        " and not is_written(self._milestone(start.resumed), self.names):",
        ":",
        MADE_UP,
    ),
    Fault(
        "models are not rounded to checkpoint.dtype",
        "runs/results.py",
        "return self.recipe.checkpoint.dtype or (",
        "return (",
        f"{MILESTONES}test_only_what_is_written_for_use_elsewhere_is_rounded",
    ),
    Fault(
        "adapters are not rounded to checkpoint.dtype",
        "runs/lora.py",
        "arrays = {path: rounded(path, array, dtype_named(dtype)) for path, array in arrays.items()}",
        "pass",
        f"{MILESTONES}test_milestones_of_adapters_are_opened_by_peft_or_merged[False]",
    ),
    Fault(
        "milestones of steps that are made again are lost",
        "runs/start.py",
        "names = (MILESTONES, STEPS)",
        "names = (STEPS,)",
        f"{MILESTONES}test_going_back_moves_later_milestones_aside",
    ),
    Fault(
        "a format that cannot hold the model is found out at the first milestone",
        "runs/results.py",
        "if format is not None and MODEL in self.names:",
        "if False:",
        f"{MILESTONES}test_exports_that_cannot_work_are_refused_before_training",
    ),
    Fault(
        "checkpoints hold the state of the optimizer against the recipe",
        "checkpoint/state/orbax_state.py",
        "if self._without:",
        "if False:",
        f"{MILESTONES}test_a_run_without_moments_is_resumed_only_when_told",
    ),
    Fault(
        "an optimizer restarts without being told",
        "runs/start.py",
        "if not recipe.checkpoint.restart_optimizer:",
        "if False:",
        f"{MILESTONES}test_a_run_without_moments_is_resumed_only_when_told",
    ),
    Fault(
        "a restarted optimizer restarts its schedule too",
        "train/state.py",
        "node._replace(count=step) if is_schedule(node) else node",
        "node",
        f"{MILESTONES}test_an_optimizer_that_keeps_nothing_but_its_schedule_restarts_with_the_same_bits",
    ),
)
