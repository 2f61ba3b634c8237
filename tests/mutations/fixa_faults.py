"""Faults around checkpoints without moments, in the disk space of a dry run, and in evaluation outside of runs."""

from mutations.fault import Fault

RESTARTED = "train/test_milestones.py::test_a_run_without_moments_goes_on_with_checkpoints_that_have_them"
SPACE = "end_to_end/test_dry_run.py::test_the_disk_space_is_that_of_what_is_written"
TRUNCATED = "end_to_end/test_evaluation.py::test_truncated_answers_are_noted_and_tokens_are_counted"
PAIRS = "test_trainer.py::test_preferences_are_not_evaluated_but_their_chosen_answers_are"

FAULTS = (
    Fault(
        "a new run is told to restart its optimizer",
        "runs/run.py",
        "        recipe.checkpoint.check_new()\n",
        "",
        "train/test_milestones.py::test_exports_that_cannot_work_are_refused_before_training",
    ),
    Fault(
        "a dry run resumes from a checkpoint without moments",
        "runs/dry_run.py",
        "restarts_optimizer(recipe, RunCheckpoints(folder / STEPS, recipe.train.keep_checkpoints), resumed)",
        "pass",
        RESTARTED,
    ),
    Fault(
        "checkpoints without moments are as large as those with them",
        "runs/dry_run.py",
        "state if recipe.checkpoint.optimizer else replace(state, opt_state=None)",
        "state",
        f"{SPACE}[all]",
    ),
    Fault(
        "an adapter is as large as in training",
        "runs/dry_run.py",
        "_bytes(state.trainable, recipe.checkpoint.dtype)",
        "_bytes(state.trainable)",
        f"{SPACE}[adapters]",
    ),
    Fault(
        "exported milestones need no space",
        "runs/dry_run.py",
        "self.milestone * (1 + self.milestones)",
        "self.milestone",
        f"{SPACE}[all]",
    ),
    Fault(
        "truncated examples are evaluated without a note",
        "runs/evaluation.py",
        "*loader.notes, *_truncation_notes(loader)",
        "*loader.notes",
        TRUNCATED,
    ),
    Fault(
        "the number of tokens is a float",
        "cli/models.py",
        "tokens = int(tokens)",
        "pass",
        TRUNCATED,
    ),
    Fault(
        "the tokens of both answers of a prepared pair are evaluated",
        "runs/evaluation.py",
        "    if loader.pairs:\n",
        "    if False:\n",
        PAIRS,
    ),
)
