"""The loss of preferences beside TRL's own trainer, and what packing, microbatches and adapters may not change."""

import itertools
import json
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import camelid
from camelid.data.config import Source
from camelid.data.preparation.prepare import prepare
from camelid.data.preparation.store import Store
from camelid.data.rows.best_fit import Overlong
from camelid.data.rows.packing import Method, Packing
from camelid.errors import UserError
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.context import Context
from camelid.model.decoder import Decoder, declare_decoder
from camelid.model.params import build, named
from camelid.text.tokenizer import load_tokenizer
from camelid.train.config import DPOConfig, DropoutConfig
from camelid.train.optimizer import make_optimizer
from camelid.train.optimizer_config import OptimizerConfig
from camelid.train.preference import DPOLoss, by_answer
from camelid.train.schedules import learning_rate
from camelid.train.state import start_state
from camelid.train.step import TrainStep
from data.stores import write_store
from leaves import adapted
from text.tiny import save_byte_tokenizer
from tiny import tiny_config, tiny_params, to_transformers, transformers_twin

pytestmark = pytest.mark.quick_compile

CONFIG = tiny_config(vocab_size=264, num_layers=2)
ROWS, LENGTH = 10, 64  # the same for all tests, so that each loss is compiled once
NAMES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
SIGMOID, SMOOTHED, IPO = DPOConfig(), DPOConfig(beta=0.3, label_smoothing=0.2), DPOConfig(loss="ipo")
LOSSES = pytest.mark.parametrize("dpo", [SIGMOID, SMOOTHED, IPO], ids=["sigmoid", "label smoothing", "ipo"])


class Pair(NamedTuple):
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def drawn_pairs(count: int = 9) -> list[Pair]:
    """Pairs of different lengths, some of whose answers begin alike."""
    draw = np.random.default_rng(5)

    def ids(least: int, most: int) -> list[int]:
        return draw.integers(0, 256, draw.integers(least, most + 1)).tolist()

    pairs = []
    for number in range(count):
        shared = ids(1, 3) if number % 3 == 0 else []
        pairs.append(Pair(ids(1, 7), [*shared, *ids(1, 9)], [*shared, *ids(1, 9)]))
    return pairs


PAIRS = drawn_pairs()


def store_of(folder: Path, pairs: Sequence[Pair]) -> Store:
    answers = [(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    documents = [prompt + answer for prompt, answer in answers]
    return write_store(folder, documents, [[0.0] * len(p) + [1.0] * len(a) for p, a in answers], 264)


def rows_of(
    store: Store,
    method: Method = "best_fit",
    reference: Any = None,
    rows: int = ROWS,
    length: int = LENGTH,
    overlong: Overlong = "split",
) -> dict[str, jax.Array]:
    """All rows, and rows of padding."""
    packing = Packing(store, length, method, overlong, pairs=True, reference=reference)
    assert packing.num_rows <= rows
    return {name: jnp.asarray(x) for name, x in vars(packing.rows(np.arange(rows))).items()}


def objective(dpo: DPOConfig, config: ModelConfig = CONFIG, **how: Any) -> DPOLoss:
    return DPOLoss(config=config, compute=ComputeConfig(), dpo=dpo, **how)


def near(params: Decoder, seed: int) -> Decoder:
    """Parameters that differ a little from others, so that no loss is saturated."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda p: p + 0.02 * jnp.asarray(draw.standard_normal(p.shape, np.float32)), params)


@partial(jax.jit, static_argnames="config")
def answer_log_probs(params: Decoder, rows: dict[str, jax.Array], config: ModelConfig = CONFIG) -> jax.Array:
    return objective(SIGMOID, config).answer_log_probs(params, rows, Context("scoring"))


def log_probs_of_documents(params: Decoder, store: Store, config: ModelConfig = CONFIG, **how: int) -> np.ndarray:
    """The log-probability of every answer, in the order of the documents."""
    found = np.asarray(answer_log_probs(params, rows_of(store, "none", **how), config))
    return found[: store.num_documents // 2, 0].reshape(-1)


@pytest.fixture(scope="module")
def policy() -> Decoder:
    return near(tiny_params(CONFIG), 3)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return store_of(tmp_path_factory.mktemp("pairs") / "store", PAIRS)


@pytest.fixture(scope="module")
def reference(store: Store) -> np.ndarray:
    return log_probs_of_documents(tiny_params(CONFIG), store)


class Found(NamedTuple):
    loss: float
    metrics: dict[str, float]
    gradients: dict[str, np.ndarray]


@partial(jax.jit, static_argnames="loss")
def loss_and_gradients(params: Decoder, rows: dict[str, jax.Array], loss: DPOLoss) -> tuple[Any, Decoder]:
    """The mean loss over the pairs and the means of the metrics; the gradients of the mean loss."""

    def mean(params: Decoder) -> tuple[jax.Array, Any]:
        total, weight, metrics = loss(params, rows, None)
        return total / weight, {name: a / b for name, (a, b) in metrics.items()}

    return jax.value_and_grad(mean, has_aux=True)(params)


def ours(dpo: DPOConfig, params: Decoder, rows: dict[str, jax.Array], config: ModelConfig = CONFIG) -> Found:
    (value, metrics), gradients = loss_and_gradients(params, rows, objective(dpo, config))
    return Found(float(value), {name: float(x) for name, x in metrics.items()}, to_transformers(gradients))


# TRL -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A function that makes TRL's DPOTrainer from two models; its data is given to it later."""
    folder = tmp_path_factory.mktemp("trl")
    tokenizer_folder = save_byte_tokenizer(folder / "tokenizer")

    def make(model: transformers.PreTrainedModel, reference: transformers.PreTrainedModel) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from datasets import Dataset
            from trl import DPOConfig as Arguments
            from trl import DPOTrainer

            arguments = Arguments(
                output_dir=str(folder / "out"), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False
            )
            data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
            tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
            return DPOTrainer(model, reference, arguments, train_dataset=data, processing_class=tokenizer)

    return make


def theirs(trainer: Any, dpo: DPOConfig, pairs: Sequence[Pair]) -> Found:
    """The mean over batches that TRL computes by its own trainer.

    TRL's `sigmoid` has no label smoothing. Its `aot` has the one of conservative DPO, and is the same loss for a batch
    of one pair, in which there is nothing to sort.
    """
    trainer.beta, trainer.label_smoothing = dpo.beta, dpo.label_smoothing
    trainer.loss_types, at_once = (
        ["aot"] if dpo.label_smoothing else [dpo.loss],
        1 if dpo.label_smoothing else len(pairs),
    )
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    trainer.model.train()
    losses = []
    for first in range(0, len(pairs), at_once):
        examples = [
            {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
            for pair in pairs[first : first + at_once]
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
        (loss * len(examples) / len(pairs)).backward()
        losses.append(loss.item())
    metrics = {name: float(np.mean(trainer._metrics["train"][name])) for name in NAMES}
    gradients = {name: p.grad.numpy() for name, p in trainer.model.named_parameters()}
    return Found(float(np.mean(losses)), metrics, gradients)


def assert_equal_to_trl(found: Found, expected: Found) -> None:
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert found.metrics.keys() == expected.metrics.keys()
    for name, value in expected.metrics.items():
        assert found.metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    assert found.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        shaped = found.gradients[name].reshape(gradient.shape)
        # Of a tensor, as a whole: single elements of attention's gradients are small differences of large numbers.
        assert np.linalg.norm(shaped - gradient) <= 1e-5 * np.linalg.norm(gradient), name


@pytest.fixture(scope="module")
def tiny_trainer(trl_trainer: Callable[..., Any], policy: Decoder) -> Any:
    return trl_trainer(transformers_twin(CONFIG, policy), transformers_twin(CONFIG, tiny_params(CONFIG)))


@LOSSES
def test_loss_gradients_and_metrics_equal_trls(
    tiny_trainer: Any, policy: Decoder, store: Store, reference: np.ndarray, dpo: DPOConfig
):
    found = ours(dpo, policy, rows_of(store, reference=reference))
    expected = theirs(tiny_trainer, dpo, PAIRS)
    assert_equal_to_trl(found, expected)
    assert 0 < expected.metrics["rewards/accuracies"] < 1
    assert abs(expected.metrics["rewards/margins"]) > 0.01, "the reference makes no difference"


def test_real_pairs_on_a_real_model_equal_trls(
    trl_trainer: Callable[..., Any], assets: Path, stories: Path, tmp_path: Path
):
    """Short pairs of the instruct data, read, rendered and packed as training does, and a model that moved slightly.

    TRL computes in float64: the log-probability of an answer is a large sum, of which the gradients depend on the
    difference.
    """
    file = assets / "data" / "instruct" / "rasbt-instruction-data-with-preference.json"
    short = [row for row in json.loads(file.read_text()) if not row["input"] and len(row["rejected"]) < 40]
    (tmp_path / "pairs.json").write_text(json.dumps([row for row in short if row["chosen"] != row["rejected"]][:4]))
    source = Source(files=(str(tmp_path / "pairs.json"),), kind="preference", template="llama2")
    store = prepare([source], load_tokenizer(stories), tmp_path / "store")
    documents = [
        (store.tokens[begin:end].tolist(), int(np.count_nonzero(store.weights(begin, end) == 0)))
        for begin, end in itertools.pairwise(store.offsets.tolist())
    ]
    pairs = [
        Pair(chosen[:prompt], chosen[prompt:], rejected[prompt:])
        for (chosen, prompt), (rejected, _) in zip(documents[::2], documents[1::2], strict=True)
    ]
    assert len(pairs) == 4
    model = camelid.load(stories)
    policy, shape = near(model.params, 1), {"rows": 4, "length": 256}
    reference = log_probs_of_documents(model.params, store, model.config, **shape)
    rows = rows_of(store, reference=reference, **shape)
    twins = [transformers.AutoModelForCausalLM.from_pretrained(stories, attn_implementation="eager") for _ in "12"]
    with torch.no_grad():
        for name, array in to_transformers(policy).items():
            twins[0].get_parameter(name).copy_(torch.from_numpy(array.reshape(twins[0].get_parameter(name).shape)))
    trainer = trl_trainer(*(twin.double() for twin in twins))
    for dpo in (SIGMOID, IPO):
        assert_equal_to_trl(ours(dpo, policy, rows, model.config), theirs(trainer, dpo, pairs))


# Packing, microbatches ------------------------------------------------------------------------------------


def test_packed_pairs_are_padded_pairs(policy: Decoder, store: Store, reference: np.ndarray):
    packed, padded = (rows_of(store, method, reference) for method in ("best_fit", "none"))
    used = [int(np.count_nonzero(rows["segments"].max(1))) for rows in (packed, padded)]
    assert used[1] == len(PAIRS) >= 2 * used[0]
    one, other = (ours(IPO, policy, rows) for rows in (packed, padded))
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    for name, value in other.metrics.items():
        assert one.metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
    for name, gradient in other.gradients.items():
        np.testing.assert_allclose(one.gradients[name], gradient, rtol=0, atol=3e-6 * np.abs(gradient).max())


def test_a_pair_does_not_see_the_others_of_its_row(policy: Decoder, store: Store, tmp_path: Path):
    changed = [PAIRS[0], *(pair._replace(prompt=[7] * len(pair.prompt)) for pair in PAIRS[1:])]
    stores = store, store_of(tmp_path / "changed", changed)
    seen = [np.asarray(answer_log_probs(policy, rows_of(each))) for each in stores]
    packing = Packing(store, LENGTH, "best_fit", pairs=True)
    assert packing.plan is not None
    at = packing.documents(packing.plan.starts).tolist().index(0)
    row = int(np.searchsorted(packing.plan.offsets, at, "right")) - 1
    column = (at - int(packing.plan.offsets[row])) // 2
    np.testing.assert_array_equal(*(found[row, column] for found in seen))
    assert np.count_nonzero(seen[0] != seen[1]) == 2 * (len(PAIRS) - 1)


@pytest.mark.parametrize("length", [1, 15])
def test_sums_are_those_of_each_answer_alone(length: int):
    draw, rows = np.random.default_rng(0), 6
    segments = np.zeros((rows, length), np.int32)
    for row in segments:
        filled = int(draw.integers(0, length + 1))
        row[:filled] = np.cumsum(np.append(1, draw.random(length) < 0.4))[:filled]
    values = draw.standard_normal(segments.shape).astype(np.float32)
    compute, pairs = jax.jit(by_answer), -(-length // 2)
    found = np.asarray(compute(values, segments))
    expected = [[values[row][segments[row] == n].sum() for n in range(1, 2 * pairs + 1)] for row in range(rows)]
    np.testing.assert_allclose(found, np.reshape(expected, (rows, pairs, 2)), atol=1e-6)
    # The sum of an answer depends on its tokens alone, to the last bit.
    again = np.asarray(compute(np.where(segments == 1, values, 1e6 * values), segments))
    np.testing.assert_array_equal(found[:, 0, 0], again[:, 0, 0])


def step_of(dpo: DPOConfig, accumulate: int) -> TrainStep:
    optimizer = OptimizerConfig(learning_rate=1e-3)
    return TrainStep(
        objective(dpo, dropout=DropoutConfig(residual=0.1)),
        make_optimizer(optimizer, 4, declare_decoder(CONFIG)),
        learning_rate(optimizer, 4),
        optimizer.clip_norm,
        accumulate,
    )


def test_microbatches_change_nothing(policy: Decoder, store: Store, reference: np.ndarray):
    """Rows with different numbers of pairs, some without any; dropout, which the reference has none of."""
    rows = rows_of(store, reference=reference)
    pairs = (np.asarray(rows["segments"]).max(1) // 2).tolist()
    assert len(set(pairs)) > 2, pairs
    seen = []
    for accumulate in (1, 2):
        step = step_of(SIGMOID, accumulate)
        state, metrics = jax.jit(step)(start_state(policy, step.optimizer), rows)
        seen.append({name: float(value) for name, value in metrics.items()})
        assert seen[-1]["weight"] == len(PAIRS)
        assert int(state.step) == 1
        for name, mean in zip(("chosen", "rejected"), reference.reshape(-1, 2).mean(0), strict=True):
            assert seen[-1][f"logps/{name}"] - seen[-1][f"rewards/{name}"] / SIGMOID.beta == pytest.approx(mean, 1e-4)
    for name, value in seen[0].items():
        assert seen[1][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    without = ours(SIGMOID, policy, rows).metrics
    assert abs(seen[0]["logps/chosen"] - without["logps/chosen"]) > 1e-2, "nothing is dropped"


def test_pairs_whose_answer_was_cut_away_do_not_count(policy: Decoder, tmp_path: Path):
    whole = Pair([1, 2], [3, 4, 5], [6])
    cut = Pair([9] * 40, [3] * 8, [4] * 9)  # half a row holds nothing but its prompt
    values = np.float32([-1, -2, -3, -4])
    expected = ours(SIGMOID, policy, rows_of(store_of(tmp_path / "alone", [whole]), reference=values[:2]))
    both = rows_of(store_of(tmp_path / "both", [whole, cut]), reference=values, overlong="truncate")
    one = rows_of(store_of(tmp_path / "one", [whole, Pair([9], [3, 4], [5])]), "none", reference=values)
    left = (jnp.arange(ROWS)[:, None] != 1) | (one["segments"] == 1)  # of the second pair, one answer
    one["weights"] = jnp.where(left, one["weights"], 0.0)
    for rows in (both, one):
        found = ours(SIGMOID, policy, rows)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-6)
        assert all(np.isfinite(gradient).all() for gradient in found.gradients.values())


# The reference -------------------------------------------------------------------------------------------


def with_adapters(params: Decoder) -> Decoder:
    """LoRA on queries and the head, DoRA on values."""
    specs, leaves = named(declare_decoder(CONFIG)), named(params)
    for name, magnitude in (("layers.attn.q_proj", False), ("layers.attn.v_proj", True), ("lm_head", False)):
        ranks = [2] * CONFIG.num_layers if specs[name].stacked else [2]
        leaves[name] = adapted(specs[name], leaves[name], ranks, magnitude=magnitude)
    return build(declare_decoder(CONFIG), leaves.values())


def test_without_precomputed_values_the_reference_is_the_base_of_the_adapters(store: Store, reference: np.ndarray):
    params = with_adapters(tiny_params(CONFIG))
    rows = rows_of(store, reference=reference)
    without = {name: x for name, x in rows.items() if name != "reference"}

    (one, metrics), gradients = loss_and_gradients(params, without, objective(IPO))
    (other, expected), same = loss_and_gradients(params, rows, objective(IPO))
    assert float(one) == pytest.approx(float(other), rel=1e-5)
    assert jax.tree.map(float, metrics) == pytest.approx(jax.tree.map(float, expected), rel=1e-5, abs=1e-5)
    assert abs(float(metrics["rewards/margins"])) > 1e-2, "the adapters change nothing"
    for (path, found), wanted in zip(
        jax.tree_util.tree_flatten_with_path(gradients)[0], jax.tree.leaves(same), strict=True
    ):
        # The base gets the gradient of the policy alone: nothing flows through the reference.
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max(), err_msg=str(path))


def test_parameters_without_adapters_need_a_reference(policy: Decoder, store: Store):
    with pytest.raises(ValueError, match="a reference is needed"):
        jax.eval_shape(lambda params: objective(SIGMOID)(params, rows_of(store), None), policy)


# Options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, r"dpo\.beta = 0\.0"),
        ({"beta": float("nan")}, r"dpo\.beta = nan"),
        ({"label_smoothing": 0.5}, r"dpo\.label_smoothing = 0\.5\nIt is a probability"),
        ({"label_smoothing": -0.1}, r"dpo\.label_smoothing = -0\.1"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "does not apply to dpo.loss = 'ipo'\nLeave it out"),
    ],
)
def test_options_that_make_no_sense_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        DPOConfig(**fields)
