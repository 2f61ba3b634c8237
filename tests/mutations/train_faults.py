"""Faults in what is trained, in objectives and their randomness, and in the placement of optimizer states."""

from mutations.fault import Fault

TRAINABLE = "train/test_trainable.py::"
STATE = "train/test_optimizer_state.py::"
STEP = "train/test_step.py::"

FAULTS = (
    Fault(
        "weight decay moves frozen layers",
        "train/step.py",
        "optax.apply_updates(params, self._masked(updates))",
        "optax.apply_updates(params, updates)",
        f"{TRAINABLE}test_layers_that_are_not_trained_stay_although_weights_decay",
    ),
    Fault(
        "frozen layers count in the norm of the gradients",
        "train/step.py",
        "return self._masked(jax.tree.map(lambda g: _mean(g, weight), summed))",
        "return jax.tree.map(lambda g: _mean(g, weight), summed)",
        f"{TRAINABLE}test_layers_that_are_not_trained_stay_although_weights_decay",
    ),
    Fault(
        "a predicate sees the parameter, not the array inside of it",
        "train/trainable.py",
        "bool(predicate(path_name(path), leaf))",
        "bool(predicate(path_name(path[:3]), leaf))",
        f"{TRAINABLE}test_a_tree_is_split_inside_of_its_weights_and_joined_again",
    ),
    Fault(
        "metrics are divided by the number of rows, not by their weight",
        "train/step.py",
        "jnp.where(jnp.isfinite(loss), _mean(*pair), jnp.nan)",
        "_mean(pair[0], jnp.float32(len(batch['tokens'])))",
        f"{STEP}test_metrics_of_an_objective_are_means_that_no_microbatch_changes[1]",
    ),
    Fault(
        "every step has the same key",
        "train/step.py",
        "jax.random.fold_in(jax.random.key(self.seed), state.step)",
        "jax.random.key(self.seed)",
        f"{STEP}test_metrics_of_an_objective_are_means_that_no_microbatch_changes[1]",
    ),
    Fault(
        "rows are numbered within their microbatch",
        "train/step.py",
        "jnp.arange(len(next(iter(batch.values()))))",
        "jnp.arange(len(next(iter(batch.values())))) // self.accumulate",
        f"{STEP}test_dropout_is_the_same_for_any_number_of_microbatches",
    ),
    Fault(
        "validation drops",
        "train/objective.py",
        "        if key is not None:\n",
        "        key = jax.random.key(0) if key is None else key\n        if key is not None:\n",
        f"{STEP}test_dropout_changes_the_loss_of_training_from_step_to_step_and_never_that_of_validation[residual]",
    ),
    Fault(
        "dropout of a recipe is ignored",
        "runs/components.py",
        "        dropout=recipe.dropout,\n",
        "",
        "test_recipe.py::test_loss_dropout_and_metrics_reach_the_step",
    ),
    Fault(
        "moments are replicated",
        "train/state.py",
        "PartitionSpec() if param is None else _spec_of_axes(leaf.shape, param)",
        "PartitionSpec()",
        f"{STATE}test_a_statistic_of_a_parameter_is_sharded_like_it[muon]",
    ),
    Fault(
        "a factored statistic is sharded like the first axes of its parameter",
        "train/state.py",
        "if tuple(param.shape[axis] for axis in axes) == shape",
        "if axes == tuple(range(len(shape)))",
        f"{STATE}test_factored_statistics_are_sharded_like_the_axes_that_they_keep",
    ),
    Fault(
        "a moving average is not saved",
        "train/state.py",
        "_FIELDS = tuple(field.name for field in dataclasses.fields(TrainState))",
        '_FIELDS = ("step", "trainable", "opt_state")',
        f"{STATE}test_a_moving_average_and_counters_are_saved_and_restored",
    ),
    Fault(
        "parameters have another name in checkpoints",
        "train/state.py",
        'SAVED_NAMES = {"trainable": "params"}',
        "SAVED_NAMES = {}",
        f"{TRAINABLE}test_adapters_are_saved_without_the_frozen_weights_and_resume_to_the_same_bits",
    ),
)
