"""Faults in the terms and averages of the training loss, in dropout, and in what is reported of them."""

from mutations.fault import Fault

TERMS = "model/test_summed_loss.py::"
TORCH = f"{TERMS}test_the_loss_its_parts_and_its_gradients_equal_torch"
OBJECTIVE = "train/test_objective.py::"
DEFINED = f"{OBJECTIVE}test_loss_and_metrics_are_those_of_their_definitions"
EASYLM = "end_to_end/test_train_state.py::test_a_run_of_easylm_is_reproduced_and_goes_on_from_the_state_that_it_left"
ACCUMULATION = "train/test_accumulation.py::"
FORGETFUL = "model/test_forgetful_mask.py::"
RECIPE = "test_recipe.py::"

FAULTS = (
    Fault(
        "the gradient of the z-loss lacks the factor of the square",
        "model/loss.py",
        "logsumexp = 2 * terms.z *",
        "logsumexp = terms.z *",
        f"{TORCH}[None-z-loss]",
    ),
    Fault(
        "the z-loss ignores the weights",
        "model/loss.py",
        "jnp.sum(softmax.logsumexp**2 * weights)",
        "jnp.sum(softmax.logsumexp**2)",
        f"{TORCH}[None-z-loss]",
    ),
    Fault(
        "smoothing leaves the target its whole probability",
        "model/loss.py",
        "loss = (1 - terms.label_smoothing) * loss + ",
        "loss = loss + ",
        f"{TORCH}[None-smoothing]",
    ),
    Fault(
        "the gradient of smoothing leaves the target its whole probability",
        "model/loss.py",
        "(terms.label_smoothing - 1) * weights, ",
        "-weights, ",
        f"{TORCH}[3.0-both]",
    ),
    Fault(
        "accuracy counts tokens without weight",
        "model/loss.py",
        "jnp.where(softmax.is_argmax(targets), weights, 0.0)",
        "jnp.where(softmax.is_argmax(targets), 1.0, 0.0)",
        f"{TORCH}[None-z-loss]",
    ),
    Fault(
        "rows without weight count",
        "train/objective.py",
        "jnp.sum((of_row > 0).astype(jnp.float32))",
        "jnp.float32(len(of_row))",
        f"{DEFINED}[rows]",
    ),
    Fault(
        "the average of rows is one of tokens",
        "train/objective.py",
        'averaged(batch["weights"], self.loss.average)',
        'averaged(batch["weights"], "tokens")',
        f"{DEFINED}[rows]",
    ),
    Fault(
        "validation has the z-loss",
        "train/objective.py",
        "z=self.loss.z if training else 0.0",
        "z=self.loss.z",
        f"{DEFINED}[tokens]",
    ),
    Fault(
        "param_norm is that before the update",
        "train/step.py",
        "global_norm(_float32(self._masked(updated.trainable)))",
        "global_norm(_float32(self._masked(state.trainable)))",
        EASYLM,
    ),
    Fault(
        "dropout of the MLP's hidden layer is forgotten",
        "model/decoder.py",
        '        hidden = dropout(hidden, context.mlp_dropout, "mlp hidden", context)\n',
        "",
        f"{ACCUMULATION}test_each_kind_of_dropout_changes_the_loss",
    ),
    Fault(
        "every layer drops the same elements of the MLP",
        "model/context.py",
        "self.residual_dropout, self.mlp_dropout\n",
        "self.residual_dropout\n",
        "model/test_context.py::test_layers_and_purposes_drop_different_elements[mlp_dropout]",
    ),
    Fault(
        "all rows forget the same tokens",
        "model/mask.py",
        '(context.row_keys("forgetful mask"))',
        '(jnp.broadcast_to(context.row_keys("forgetful mask")[:1], (rows,)))',
        f"{FORGETFUL}test_rows_are_known_by_their_numbers_and_steps_by_their_keys",
    ),
    Fault(
        "the first token of a later document is forgotten",
        "model/mask.py",
        "    if segments is not None:\n        first = first.at",
        "    if False:\n        first = first.at",
        f"{FORGETFUL}test_the_first_token_of_a_document_is_never_hidden",
    ),
    Fault(
        "attention is not told which keys are hidden",
        "model/decoder.py",
        "segments=inputs.segments, valid=inputs.valid)",
        "segments=inputs.segments)",
        f"{FORGETFUL}test_a_model_sees_what_transformers_sees_with_the_same_mask[dense]",
    ),
    Fault(
        "a fused kernel ignores the forgetful mask",
        "model/kernels.py",
        "        and not keys_hidden,\n",
        ",\n",
        f"{FORGETFUL}test_kernels_that_cannot_hide_keys_are_refused[gpu-cudnn]",
    ),
    Fault(
        "the recipe of an older run loses its dropout",
        "runs/renamed.py",
        "moved.setdefault(new_table, {})[new_field] = moved[old_table].pop(old_field)",
        "moved[old_table].pop(old_field)",
        f"{RECIPE}test_an_older_run_with_dropout_is_resumed_by_the_new_names",
    ),
)
