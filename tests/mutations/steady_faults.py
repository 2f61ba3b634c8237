"""Faults in updates that are skipped, the loss scale of float16, the moving average and reports of spikes."""

from mutations.fault import Fault

SKIP = "train/test_skipped_updates.py::"
BITS = f"{SKIP}test_an_update_that_is_not_finite_is_skipped_bit_for_bit_and_the_schedule_goes_on"
LOOP = "train/test_loop.py::"
RUN = "end_to_end/test_steady.py::"
RESUMED = f"{RUN}test_a_float16_run_with_an_average_that_overflows_resumes_to_the_same_bits"

FAULTS = (
    Fault(
        "an update with a NaN gradient and a finite loss is made",
        "train/step.py",
        "finite = jnp.isfinite(loss) & jnp.isfinite(norm)",
        "finite = jnp.isfinite(loss)",
        BITS,
    ),
    Fault(
        "skipped updates hold the schedule back",
        "train/step.py",
        "node._replace(count=optax.safe_increment(node.count)) if is_schedule(node) else node",
        "node",
        BITS,
    ),
    Fault(
        "all counts of the optimizer advance when an update is skipped",
        "train/step.py",
        "return dataclasses.replace(state, opt_state=jax.tree.map(advanced, state.opt_state, is_leaf=is_schedule))",
        "return dataclasses.replace(state, opt_state=jax.tree.map(lambda x: x if x.ndim else x + 1, state.opt_state))",
        BITS,
    ),
    Fault(
        "the average is of the parameters before the update",
        "train/step.py",
        "average + (1 - decay) * (p - average), ema, new)",
        "average + (1 - decay) * (p - average), ema, params)",
        f"{SKIP}test_training_with_skipped_updates_and_its_average_equal_torch",
    ),
    Fault(
        "an average that shares the buffers of the parameters",
        "train/state.py",
        "ema = jax.tree.map(jnp.copy, masters) if averaged else None",
        "ema = masters if averaged else None",
        f"{SKIP}test_the_average_starts_as_a_copy_which_can_be_donated_with_the_parameters",
    ),
    Fault(
        "gradients are not divided by the loss scale",
        "train/step.py",
        "return sums, grads if scale is None else jax.tree.map(lambda g: g / scale, grads)",
        "return sums, grads",
        f"{SKIP}test_a_loss_scale_changes_no_bit_where_nothing_overflows[1]",
    ),
    Fault(
        "the loss scale is not applied",
        "train/step.py",
        'scale = None if self.loss_scale is None else state.counters["loss_scale"]',
        "scale = None",
        f"{SKIP}test_gradients_that_overflow_float16_halve_the_scale_until_they_do_not",
    ),
    Fault(
        "an overflow does not restart the window",
        "train/counters.py",
        'jnp.where(finite, counters["steps_at_scale"] + 1, 0)',
        'jnp.where(finite, counters["steps_at_scale"] + 1, counters["steps_at_scale"])',
        f"{SKIP}test_the_loss_scale_follows_the_rule_of_torch",
    ),
    Fault(
        "the loss scale falls below 1",
        "train/counters.py",
        "jnp.maximum(scale / config.factor, 1.0)",
        "scale / config.factor",
        f"{SKIP}test_an_overflow_that_no_smaller_scale_can_prevent_counts_as_skipped",
    ),
    Fault(
        "an overflow counts as a loss that is NaN",
        "train/counters.py",
        "skipped = ~finite & ~overflow",
        "skipped = ~finite",
        f"{SKIP}test_the_loss_scale_follows_the_rule_of_torch",
    ),
    Fault(
        "skipped updates that are not in a row add up",
        "train/counters.py",
        'jnp.where(skipped, counters["skipped_in_a_row"] + 1, 0)',
        'counters["skipped_in_a_row"] + skipped.astype(jnp.int32)',
        f"{SKIP}test_training_with_skipped_updates_and_its_average_equal_torch",
    ),
    Fault(
        "a NaN loss enters the running mean",
        "train/counters.py",
        'jnp.where(counts, mean, counters["loss_mean"])',
        "mean",
        f"{SKIP}test_the_running_mean_and_variance_of_the_loss_are_numpys_and_a_spike_stands_out",
    ),
    Fault(
        "checkpoints are written while updates are skipped",
        "runs/run.py",
        "saves = (due and not log.skipping) or ending or stopping",
        "saves = due or ending or stopping",
        f"{LOOP}test_while_updates_are_skipped_checkpoints_wait",
    ),
    Fault(
        "a checkpoint that waited is never written",
        "runs/run.py",
        "due = due or schedule.due(made)",
        "due = schedule.due(made)",
        f"{LOOP}test_while_updates_are_skipped_checkpoints_wait",
    ),
    Fault(
        "the parameters are validated in place of their average",
        "runs/validation.py",
        "validate(replace(state, trainable=state.ema))",
        "validate(state)",
        f"{LOOP}test_the_average_is_validated_beside_the_parameters",
    ),
    Fault(
        "the trained parameters are saved as their average",
        "runs/results.py",
        "MODEL_EMA: state.ema}",
        "MODEL_EMA: state.trainable}",
        RESUMED,
    ),
    Fault(
        "checkpoints without counters are refused",
        "runs/start.py",
        "state = checkpoints.restore(resumed, target, counters)",
        "state = checkpoints.restore(resumed, target)",
        f"{RUN}test_a_run_of_a_camelid_without_counters_resumes",
    ),
    Fault(
        "counters of a checkpoint are replaced by those of the start",
        "checkpoint/state/orbax_state.py",
        "for name, value in (initial or {}).items() if name not in arrays}",
        "for name, value in (initial or {}).items()}",
        RESUMED,
    ),
    Fault(
        "a spike between two lines of the log is not written",
        "train/metrics_log.py",
        "if finite and not spike and step % self._config.log_every",
        "if finite and step % self._config.log_every",
        f"{LOOP}test_a_spike_is_reported_whatever_log_every_is_and_changes_nothing",
    ),
)
