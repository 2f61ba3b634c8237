"""How long a run trains, its loss and dropout, and what it saves; declared without JAX, so that the CLI starts fast."""

import math
from dataclasses import dataclass, fields
from typing import Literal, NoReturn

from camelid.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """An exponential moving average of the parameters, or of the adapters, which is saved beside them.

    Parameters that `train.freeze` keeps as they are have one too, which is equal to them.
    """

    decay: float = 0.999
    """weight of the previous average in that after a step; the parameters have 1 - decay"""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"ema.decay = {self.decay}", "Choose a number from 0 up to 1, such as 0.999.")


@dataclass(frozen=True, kw_only=True)
class LossScaleConfig:
    """Dynamic loss scaling for float16 (arXiv:1710.03740): gradients are computed of the loss times a factor."""

    initial: float = 65536.0
    """loss scale of the first step, a power of two"""
    factor: float = 2.0
    """a power of two: the scale is divided by it when a gradient overflows, to no less than 1, and multiplied by it
    after `window` steps"""
    window: int = 1000
    """number of steps without an overflow after which the scale grows"""

    def __post_init__(self) -> None:
        for name, fits, advice in (
            ("initial", 1 <= self.initial < math.inf, "a number of 1 or more"),
            ("factor", 1 < self.factor < math.inf, "a number above 1"),
            ("window", self.window >= 1, "a number of steps: 1 or more"),
        ):
            if not fits:
                raise UserError(f"loss_scale.{name} = {getattr(self, name)}", f"Choose {advice}.")
        for name, least in (("initial", 1), ("factor", 2)):
            value = getattr(self, name)
            mantissa, exponent = math.frexp(value)
            if mantissa != 0.5:
                near = [f"{2.0**n:g}" for n in (exponent - 1, exponent) if 2.0**n >= least]
                raise UserError(
                    f"loss_scale.{name} = {value} is not a power of two: the scale would round the gradients",
                    f"Choose {' or '.join(near)}.",
                )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    steps: int
    """total number of updates, including those of earlier starts of the run and of init_optimizer"""
    accumulate: int = 1
    """microbatches per step (gradient accumulation); each has batch_size / accumulate rows"""
    freeze: tuple[str, ...] = ()
    """patterns of parameters that are not trained, such as "embed" or "layers.0-3\""""
    log_every: int = 1
    """number of steps between lines of metrics.jsonl"""
    checkpoint_every: int = 1000
    """number of steps between checkpoints; another is saved at the end, and on SIGTERM"""
    keep_checkpoints: int = 2
    """number of checkpoints to keep; older ones are removed"""
    checkpoint_minutes: float | None = None
    """also save a checkpoint when this many minutes have passed since the last one"""
    milestones_every: int | None = None
    """number of steps between checkpoints that are never removed"""
    keep_best: bool = False
    """also keep the checkpoint with the lowest validation loss, which best.json names; it is saved when it is found"""
    evaluate_every: int | None = None
    """number of steps between validation losses; with validation text, the last step is always validated"""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """services that also receive the metrics; each is an optional dependency of the same name"""
    max_skipped: int = 10
    """number of updates in a row that may be skipped because a loss or gradient is infinite or NaN; 0 stops at once"""
    spike_sigma: float = 6.0
    """a loss this many standard deviations above its running mean is reported as a spike; inf reports none"""
    metrics: tuple[Literal["accuracy", "param_norm"], ...] = ()
    """further metrics of each step: the fraction of targets that are the most probable token, averaged as the loss is;
    the global norm of the trained parameters after the update"""
    seed: int = 0
    """seed of newly initialized parameters and of dropout"""

    def __post_init__(self) -> None:
        counts = ("steps", "accumulate", "log_every", "checkpoint_every", "keep_checkpoints", "evaluate_every")
        for name in (*counts, "milestones_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"train.{name} = {value}", "It is a number of items or steps: choose 1 or more.")
        if self.checkpoint_minutes is not None and not 0 < self.checkpoint_minutes < math.inf:
            raise UserError(
                f"train.checkpoint_minutes = {self.checkpoint_minutes}", "Choose a number above 0, such as 30."
            )
        if self.keep_best and self.evaluate_every is None:
            raise UserError(
                "train.keep_best = true compares validation losses, and only the last step is validated",
                "Set train.evaluate_every, for example to train.checkpoint_every.",
            )
        if self.max_skipped < 0:
            raise UserError(f"train.max_skipped = {self.max_skipped}", "It is a number of steps: choose 0 or more.")
        if not self.spike_sigma > 0:
            raise UserError(f"train.spike_sigma = {self.spike_sigma}", "Choose a number above 0; inf reports none.")


ExportFormat = Literal[
    "hf",
    "meta",
    "easylm",
    "easylm-flax",
    "mindspore",
    "mindspore-safetensors",
    "mindspore-interleaved",
    "megatron",
    "megatron-legacy",
    "llama2-jax",
    "llama2c",
    "llama2c-v1",
    "llama2c-v2",
    "gguf",
    "gguf-q8_0",
    "gguf-q4_0",
]
"""The formats in which `camelid convert` writes a model and nothing else, by the names of its option --to."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What the checkpoints of a run hold, and in which form its models and adapters are written for use elsewhere."""

    export: ExportFormat | None = None
    """format in which each milestone is also written, to milestones/STEP/ in the folder of the run; None: in none"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """dtype of the models and adapters that are written for use elsewhere; checkpoints keep the dtypes of training"""
    optimizer: bool = True
    """whether checkpoints hold the state of the optimizer, without which no run is resumed exactly"""
    restart_optimizer: bool = False
    """resume from a checkpoint without the state of the optimizer: with new moments, at its step and learning rate"""

    def check_new(self) -> None:
        """Raises UserError if a new run, which will save the state of the optimizer, is told to restart without it.

        A run that is resumed may be told so: from a checkpoint without this state, it goes on with checkpoints that
        have it.
        """
        if self.restart_optimizer and self.optimizer:
            raise UserError(
                "checkpoint.restart_optimizer = true applies to checkpoints without the state of the optimizer, and "
                "checkpoint.optimizer = true",
                "Leave it out, or set checkpoint.optimizer = false.",
            )


@dataclass(frozen=True, kw_only=True)
class SamplesConfig:
    """Prompts that are completed in the course of training, to show what the model has learned."""

    prompts: tuple[str, ...]
    """the prompts: the beginnings of texts, or messages of the user if `chat` is true"""
    chat: bool | None = None
    """whether a prompt is a message of the user, in the chat template of the training data; None: if they have one"""
    system: str | None = None
    """chat: the system message before each prompt"""
    every: int | None = None
    """number of steps between samples; None: train.evaluate_every. The last step always has samples"""
    max_new_tokens: int = 64
    """number of tokens after which a sample ends, if it has not ended before"""
    temperature: float = 0.0
    """the logits are divided by it before a token is drawn; 0: the most probable token"""
    seed: int = 0
    """seed of the draws; prompt i has seed + i, the same at every step"""

    def __post_init__(self) -> None:
        if not self.prompts or not all(self.prompts):
            raise UserError(
                f"samples.prompts = {list(self.prompts)!r}",
                "Give at least one text that is not empty, or remove [samples].",
            )
        for name in ("every", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"samples.{name} = {value}", "Choose 1 or more.")
        if not 0 <= self.temperature < math.inf:
            raise UserError(
                f"samples.temperature = {self.temperature}", "Choose 0 for the most probable tokens, or a number above."
            )
        if self.system is not None and self.chat is False:
            raise UserError(
                f"samples.system = {self.system!r} is a message of a chat, and samples.chat = false",
                "Leave out one of the two.",
            )


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Which steps the profiler of JAX traces."""

    first_step: int = 10
    """first step that is traced; the first steps of a run are slower than the others"""
    steps: int = 3
    """number of steps that are traced"""

    def __post_init__(self) -> None:
        for name in ("first_step", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"profile.{name} = {getattr(self, name)}", "Choose 1 or more.")


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Direct preference optimization (arXiv:2305.18290): training on pairs of a chosen and a rejected answer."""

    beta: float = 0.1
    """how strongly the model is kept near the reference; the tau of IPO"""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """the loss of DPO, or of IPO (arXiv:2310.12036), which averages log-probabilities over the tokens of an answer"""
    label_smoothing: float = 0.0
    """sigmoid: assumed probability that the two answers of a pair are interchanged (conservative DPO)"""

    def __post_init__(self) -> None:
        if not 0 < self.beta < math.inf:
            raise UserError(f"dpo.beta = {self.beta}", "Choose a number above 0, such as 0.1.")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(
                f"dpo.label_smoothing = {self.label_smoothing}", "It is a probability: choose 0 or more, below 0.5."
            )
        if self.loss == "ipo" and self.label_smoothing:
            raise UserError(
                f"dpo.label_smoothing = {self.label_smoothing} does not apply to dpo.loss = 'ipo'",
                "Leave it out, or use loss = 'sigmoid'.",
            )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The loss of training; that of validation is the cross-entropy alone, with the same average."""

    average: Literal["tokens", "rows"] = "tokens"
    """mean over all tokens of the batch; or over its rows, of the mean over the tokens of each row that has a weight"""
    z: float = 0.0
    """coefficient of the z-loss, which is logsumexp(logits)^2 (arXiv:2204.02311); PaLM has 1e-4"""
    label_smoothing: float = 0.0
    """probability that the targets divide equally among all tokens of the vocabulary, as in PyTorch"""

    def __post_init__(self) -> None:
        if not 0 <= self.z < math.inf:
            raise UserError(f"loss.z = {self.z}", "Choose a number of 0 or more; PaLM has 1e-4.")
        if not 0 <= self.label_smoothing < 1:
            _refuse_probability("loss.label_smoothing", self.label_smoothing)


@dataclass(frozen=True, kw_only=True)
class DropoutConfig:
    """What training drops at random (arXiv:1207.0580); validation drops nothing."""

    embedding: float = 0.0
    """probability of dropping an element of the token embeddings"""
    attention: float = 0.0
    """probability of dropping an attention weight"""
    residual: float = 0.0
    """probability of dropping an element of what attention or the MLP adds to the residual stream"""
    mlp: float = 0.0
    """probability of dropping an element of the MLP's hidden layer, the input of its last matrix"""
    forgetful_min_ratio: float = 0.0
    """smallest fraction of a row's tokens that attention forgets"""
    forgetful_max_ratio: float = 0.0
    """largest fraction of a row's tokens that attention forgets (arXiv:2210.13432): each row draws its fraction, and
    each of its tokens but the first of a document is then hidden from all queries with that probability"""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 <= (value := getattr(self, field.name)) < 1:
                _refuse_probability(f"dropout.{field.name}", value)
        if self.forgetful_min_ratio > self.forgetful_max_ratio:
            raise UserError(
                f"dropout.forgetful_min_ratio = {self.forgetful_min_ratio} exceeds forgetful_max_ratio = "
                f"{self.forgetful_max_ratio}",
                "Set dropout.forgetful_max_ratio to at least as much.",
            )


def _refuse_probability(name: str, value: float) -> NoReturn:
    raise UserError(f"{name} = {value}", "It is a probability: choose 0 or more, and less than 1.")
