"""Faults in what a long run saves and keeps, and in what it validates."""

from mutations.fault import Fault

LOOP = "train/test_loop.py::"
KEPT = "train/test_kept_checkpoints.py::"
VALIDATION = "train/test_validation.py::"

FAULTS = (
    Fault(
        "the best checkpoint is removed as others are",
        "checkpoint/state/orbax_state.py",
        "if old != self.best and not is_milestone:",
        "if not is_milestone:",
        f"{KEPT}test_the_best_checkpoint_is_kept_and_named_also_by_a_resumed_run",
    ),
    Fault(
        "a resumed run forgets the best step",
        "runs/best.py",
        "self._loss, step = broadcast_from_main(lambda: _lowest(folder))",
        "self._loss, step = math.inf, None",
        f"{KEPT}test_the_best_checkpoint_is_kept_and_named_also_by_a_resumed_run",
    ),
    Fault(
        "a best step that has no checkpoint",
        "runs/best.py",
        "if loss is not None and step in saved]",
        "if loss is not None]",
        f"{KEPT}test_a_checkpoint_that_is_gone_is_not_the_best_any_more",
    ),
    Fault(
        "milestones are removed",
        "checkpoint/state/orbax_state.py",
        "is_milestone = self._milestones_every is not None and old % self._milestones_every == 0",
        "is_milestone = False",
        f"{KEPT}test_milestones_are_never_removed",
    ),
    Fault(
        "no checkpoint is due at a milestone",
        "train/save_schedule.py",
        "for every in (config.checkpoint_every, config.milestones_every)",
        "for every in (config.checkpoint_every, None)",
        f"{LOOP}test_milestones_save_besides_checkpoint_every",
    ),
    Fault(
        "the clock is asked after every step",
        "train/save_schedule.py",
        "return False, step + max(1, int(steps_left / 2))",
        "return False, step + 1",
        f"{LOOP}test_the_clock_saves_besides_checkpoint_every_and_is_asked_seldom",
    ),
    Fault(
        "the clock goes on when a checkpoint is saved",
        "train/save_schedule.py",
        "self._saved, self._time, self._next = step, self._clock(), step + 1",
        'self._saved, self._time, self._next = step, getattr(self, "_time", self._clock()), step + 1',
        f"{LOOP}test_the_clock_saves_besides_checkpoint_every_and_is_asked_seldom",
    ),
    Fault(
        "a state whose validation loss is NaN replaces good ones",
        "runs/validation.py",
        "checkpoints.discard(step)",
        "pass",
        f"{LOOP}test_a_checkpoint_whose_validation_loss_is_not_finite_is_discarded",
    ),
    Fault(
        "a state whose update was skipped is the best",
        "runs/validation.py",
        "if best is not None and not log.skipping:",
        "if best is not None:",
        f"{LOOP}test_each_validated_step_is_offered_as_the_best_unless_updates_are_skipped",
    ),
    Fault(
        "the rows that are validated are the first ones",
        "data/rows/loader.py",
        'chosen = np.sort(permute(np.arange(count), total, seed_of(self.config.seed, "validation rows")))',
        "chosen = np.arange(count)",
        f"{VALIDATION}test_a_maximum_of_tokens_chooses_rows_of_all_sources_by_the_seed",
    ),
    Fault(
        "the rows of a batch are padded with a row that exists",
        "data/rows/loader.py",
        "padding = np.full(-len(rows) % batch_size, packing.num_rows)",
        "padding = np.full(-len(rows) % batch_size, 0)",
        f"{VALIDATION}test_each_chosen_row_is_read_once_and_batches_are_padded_by_source",
    ),
    Fault(
        "the name of a source changes its store",
        "data/preparation/task.py",
        'del source["name"]',
        "pass",
        f"{VALIDATION}test_sources_without_names_are_one_and_names_change_no_store",
    ),
    Fault(
        "the losses of sources are averaged without their weights",
        "runs/validation.py",
        "np.sum([found[name] for found in sums if found], 0)",
        "np.sum([found[name] / found[name][1] for found in sums if found], 0)",
        f"{VALIDATION}test_the_loss_of_each_named_source_and_of_all_is_that_of_its_rows",
    ),
    Fault(
        "MLflow gets another run when a run is resumed",
        "train/trackers.py",
        "        if kept.is_file():\n            mlflow.start_run",
        "        if False:\n            mlflow.start_run",
        "train/test_trackers.py::test_mlflow_resumes_its_run_and_gets_parameters_once",
    ),
)
