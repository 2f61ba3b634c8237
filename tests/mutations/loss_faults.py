"""Faults in the loss, the log-probabilities of tokens, and evaluation."""

from mutations.fault import Fault

TOKENS = "model/test_token_log_probs.py::"
STATISTICS = f"{TOKENS}test_every_statistic_equals_torch"
GRADIENTS = f"{TOKENS}test_gradients_of_any_function_equal_torch"
TIES = f"{TOKENS}test_of_equal_logits_the_lowest_id_is_the_argmax_and_comes_first"
SHARDED = f"{TOKENS}test_a_sharded_vocabulary_gives_the_same_and_its_logits_stay_on_their_devices"
HEADS = "model/test_head.py::"

FAULTS = (
    Fault(
        "the normalizer is that of the shifted logits",
        "model/loss.py",
        "(self.top + jnp.log(self.total))[..., 0]",
        "jnp.log(self.total)[..., 0]",
        STATISTICS,
    ),
    Fault(
        "the candidates' log-probabilities are their logits",
        "model/loss.py",
        "values - logsumexp[..., None]",
        "values",
        STATISTICS,
    ),
    Fault(
        "any of several equal logits is the argmax",
        "model/loss.py",
        "return jnp.argmax(self.logits, -1) == targets",
        "return jnp.where(self.hit, self.logits == self.top, False).any(-1)",
        TIES,
    ),
    Fault(
        "the gradient of the normalizer is dropped",
        "model/loss.py",
        "gradient = gradient + probabilities * logsumexp",
        "pass",
        f"{GRADIENTS}[plain-z_loss]",
    ),
    Fault(
        "the mean over the vocabulary has the gradient of a sum",
        "model/loss.py",
        "(1 / self.logits.shape[-1] - probabilities)",
        "(1 - probabilities)",
        f"{GRADIENTS}[plain-label_smoothing]",
    ),
    Fault(
        "candidates of a shard keep their local ids",
        "model/loss.py",
        "ids = ids + jnp.arange(parts)[:, None] * (vocab // parts)",
        "pass",
        SHARDED,
    ),
    Fault(
        "candidates are selected from the gathered vocabulary",
        "model/loss.py",
        "if parts == 1 or vocab % parts",
        "if parts or vocab % parts",
        SHARDED,
    ),
    Fault(
        "gradients of chunks are added in the dtype of the head",
        "model/loss.py",
        "jax.tree.map(jnp.add, sums, dhead)), dx",
        "jax.tree.map(lambda a, b, c: (a + b).astype(c.dtype).astype(a.dtype), sums, dhead, head)), dx",
        f"{HEADS}test_gradients_of_a_bfloat16_head_are_added_in_float32",
    ),
)
