"""The optimizer and the learning rates of a run, as a recipe describes them; declared without JAX.

The defaults of most fields depend on the optimizer and on the schedule. They are None where a field is declared, and
`OptimizerConfig` fills them in from the tables below, so that a field is None exactly if it does not apply.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from camelid.errors import UserError

Name = Literal["adamw", "adafactor", "palm", "uio", "lion", "muon", "sgd"]
Schedule = Literal["cosine", "linear", "constant", "inverse_sqrt", "polynomial", "wsd"]

_DECOUPLED = {"weight_decay": 0.1, "moment_dtype": "float32"}
_ADAM = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
_ADAFACTOR = {
    "learning_rate": 1e-2,
    "decay_rate": 0.8,
    "momentum": 0.0,
    "eps": 1e-30,
    "factored": True,
    "parameter_scale": True,
    "update_clip": 1.0,
    "weight_decay": 0.0,
    "weight_decay_power": 1,
    "moment_dtype": "float32",
}
_UNFACTORED = _ADAFACTOR | {
    "momentum": 0.9,
    "factored": False,
    "update_clip": math.inf,
    "schedule": "inverse_sqrt",
    "first_update": "initial",
}

OPTIMIZERS: Mapping[str, Mapping[str, Any]] = {
    "adamw": {"learning_rate": 3e-4, **_ADAM, "bias_correction": True, **_DECOUPLED},
    "adafactor": _ADAFACTOR,
    # arXiv:2204.02311, section 5, with EasyLM's constants.
    "palm": _UNFACTORED
    | {"decay_rate": 0.99, "weight_decay": 1.0, "weight_decay_power": 2, "warmup_steps": 10_000, "learning_rate": 1e-2},
    "uio": _UNFACTORED | {"warmup_steps": 5000, "learning_rate": 1 / math.sqrt(5000)},
    "lion": {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.99, **_DECOUPLED},
    "muon": {
        "learning_rate": 3e-4,
        "momentum": 0.95,
        "nesterov": True,
        "muon_scale": "rms",
        **_ADAM,
        **_DECOUPLED,
    },
    "sgd": {"learning_rate": 1e-2, "momentum": 0.9, "nesterov": False, **_DECOUPLED, "weight_decay": 0.0},
}
"""The options of each optimizer, with their defaults."""

SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "cosine": {"final_fraction": 0.1, "restarts": 0, "restart_growth": 1.0},
    "linear": {"final_fraction": 0.1},
    "constant": {},
    "inverse_sqrt": {},
    "polynomial": {"final_fraction": 0.1, "power": 1.0},
    "wsd": {"final_fraction": 0.1, "power": 1.0, "cooldown_ratio": 0.1},
}
"""The options of each schedule, with their defaults."""

_COMMON = {"schedule": "cosine", "warmup_steps": 0, "warmup_start": 0.0, "first_update": "warm", "decay": ("matrices",)}


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer, its learning rates, and which parameters weight decay applies to."""

    name: Name = "adamw"
    """the optimizer; palm (EasyLM) and uio (LL3M) are adafactor with other defaults"""
    learning_rate: float | None = None
    """peak learning rate, reached at the end of the warmup"""
    schedule: Schedule | None = None
    """how the learning rate changes after the warmup; wsd is warmup, stable, decay"""
    final_fraction: float | None = None
    """learning rate at the end of the decay and after it, as a fraction of learning_rate"""
    decay_steps: int | None = None
    """step at which the decay ends, counting the warmup; default: train.steps of the first start of the run, also when
    it is resumed with more steps"""
    warmup_steps: int | None = None
    """number of steps over which the learning rate rises linearly"""
    warmup_ratio: float | None = None
    """alternatively: the warmup as a fraction of decay_steps, rounded down"""
    warmup_start: float | None = None
    """learning rate at which the warmup starts"""
    first_update: Literal["warm", "initial"] | None = None
    """whether the first update has the learning rate after one step of the schedule (warm), or its initial value"""
    restarts: int | None = None
    """cosine: number of times that the learning rate jumps back to its peak; the cycles together last decay_steps"""
    restart_growth: float | None = None
    """cosine: length of each cycle as a multiple of the one before it"""
    power: float | None = None
    """polynomial, wsd: exponent of the decay; 1 is linear"""
    cooldown_ratio: float | None = None
    """wsd: the decay at the end as a fraction of decay_steps"""
    beta1: float | None = None
    """decay rate of the moving average of the gradients"""
    beta2: float | None = None
    """decay rate of the moving average of the squared gradients; of lion, of the average that is kept"""
    eps: float | None = None
    """added to the square root of the second moment; adafactor: to the squared gradients"""
    bias_correction: bool | None = None
    """adamw: whether the moments are divided by 1 - beta^step, since they start at 0"""
    momentum: float | None = None
    """sgd, muon, adafactor: decay rate of the sum or the moving average of the gradients or updates; 0: none is kept"""
    nesterov: bool | None = None
    """sgd, muon: Nesterov's momentum"""
    muon_scale: Literal["rms", "width"] | None = None
    """muon: multiplies an update by 0.2 sqrt(max(inputs, outputs)), so that it is as large as one of AdamW, or by
    sqrt(max(1, outputs / inputs))"""
    decay_rate: float | None = None
    """adafactor: the second moment of step t has the decay rate 1 - t^-decay_rate"""
    factored: bool | None = None
    """adafactor: whether rows and columns of the second moment are kept in place of all elements"""
    parameter_scale: bool | None = None
    """adafactor: whether updates are multiplied by the root mean square of the parameter"""
    update_clip: float | None = None
    """adafactor: maximum root mean square of an update, before the learning rate; inf disables clipping"""
    moment_dtype: Literal["float32", "bfloat16"] | None = None
    """dtype of the first moment or momentum; the second moment is always float32"""
    weight_decay: float | None = None
    """decoupled weight decay: a step subtracts learning rate x weight_decay x parameter"""
    weight_decay_power: int | None = None
    """adafactor: exponent of the learning rate in the weight decay"""
    decay: tuple[str, ...] | None = None
    """which parameters have weight decay: matrices, all, or patterns of names"""
    factors: Mapping[str, float] = field(default_factory=dict, hash=False)
    """factors of the learning rate by pattern; those of several patterns that match are multiplied"""
    clip_norm: float = 1.0
    """maximum global norm of the gradients, which are scaled down to it; inf disables clipping"""

    def __post_init__(self) -> None:
        options = {**_COMMON, **OPTIMIZERS[self.name]}
        schedule = self.schedule or options["schedule"]
        self._refuse_foreign("name", OPTIMIZERS, self.name)
        self._refuse_foreign("schedule", SCHEDULES, schedule)
        if self.warmup_ratio is not None:
            if self.warmup_steps is not None:
                raise UserError(
                    f"both optimizer.warmup_steps = {self.warmup_steps} and optimizer.warmup_ratio = "
                    f"{self.warmup_ratio} are given",
                    "Keep one of the two.",
                )
            del options["warmup_steps"]
        if self.name == "palm" and schedule == "inverse_sqrt":  # its learning rate is constant during the warmup
            options["warmup_start"] = options["learning_rate"] if self.learning_rate is None else self.learning_rate
        for name, default in {**options, **SCHEDULES[schedule]}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        self._check_numbers()
        self._check_combinations()

    @property
    def options(self) -> Mapping[str, Any]:
        """The values of all fields by name, None for those that do not apply."""
        return vars(self)

    @property
    def has_end(self) -> bool:
        """Whether the learning rates depend on when the decay ends."""
        return self.final_fraction is not None or self.warmup_ratio is not None

    def warmup(self, steps: int) -> int:
        """The number of steps of the warmup in a run whose `train.steps` is `steps`."""
        if self.warmup_ratio is None:
            assert self.warmup_steps is not None
            return self.warmup_steps
        return int(self.warmup_ratio * (self.decay_steps or steps))

    def end(self, steps: int) -> int:
        """The step at which the decay ends; a run that is shorter than its warmup ends during the warmup."""
        return max(self.decay_steps or steps, self.warmup(steps) + 1)

    def check_decay(self) -> None:
        """Raises UserError if the decay would end before the warmup.

        Not a part of `__post_init__`, because runs with such a recipe exist and must stay readable.
        """
        if self.decay_steps is not None and self.warmup_steps is not None and self.decay_steps <= self.warmup_steps:
            raise UserError(
                f"optimizer.decay_steps = {self.decay_steps} is not above optimizer.warmup_steps = {self.warmup_steps}",
                "decay_steps counts the warmup: leave it out for train.steps, or set it to at least "
                f"{self.warmup_steps + 1}.",
            )

    def _refuse_foreign(self, which: str, tables: Mapping[str, Mapping[str, Any]], chosen: str) -> None:
        """Raises UserError for the first field that is set and belongs to other optimizers or schedules alone."""
        own = tables[chosen].keys() | _COMMON.keys()
        for name in sorted(set().union(*tables.values()) - own):
            if (value := getattr(self, name)) is not None:
                having = [other for other, options in tables.items() if name in options]
                raise UserError(
                    f"optimizer.{name} = {value!r} does not apply to optimizer.{which} = {chosen!r}",
                    f"Leave it out; it applies to {', '.join(having)}.",
                )

    def _check_numbers(self) -> None:
        below_1, positive = (lambda x: 0 <= x < 1), (lambda x: 0 < x < math.inf)
        for names, fits, advice in (
            ("learning_rate eps restart_growth power decay_rate", positive, "above 0"),
            ("final_fraction", lambda x: 0 <= x <= 1, "from 0 to 1"),
            ("cooldown_ratio", lambda x: 0 < x <= 1, "above 0 and up to 1"),
            ("warmup_ratio beta1 beta2 momentum", below_1, "from 0 up to 1"),
            ("warmup_steps restarts weight_decay_power", lambda x: x >= 0, "0 or more"),
            ("warmup_start weight_decay", lambda x: 0 <= x < math.inf, "0 or more"),
            ("decay_steps", lambda x: x >= 1, "1 or more"),
            ("update_clip", lambda x: x >= 1, "1 or more"),
            ("clip_norm", lambda x: x > 0, "above 0"),
        ):
            for name in names.split():
                if (value := getattr(self, name)) is not None and not fits(value):
                    raise UserError(f"optimizer.{name} = {value}", f"Choose a number {advice}.")
        for pattern, factor in self.factors.items():
            if not positive(factor):
                advice = "Choose a number above 0; train.freeze keeps parameters as they are."
                raise UserError(f"optimizer.factors has {pattern!r} = {factor}", advice)

    def _check_combinations(self) -> None:
        """Raises UserError for a field that is set and would have no effect."""
        for name, idle, why, advice in (
            (
                "decay_steps",
                self.decay_steps is not None and not self.has_end,
                f"optimizer.schedule = {self.schedule!r} does not end",
                "Leave it out.",
            ),
            (
                "schedule",
                self.schedule == "inverse_sqrt" and self.warmup_steps == 0,
                "it continues the warmup, and there is none",
                "Set warmup_steps: the learning rate of step t is learning_rate x sqrt(warmup_steps / t).",
            ),
            (
                "warmup_start",
                self.warmup_start != 0 and self.warmup_steps == 0,
                "there is no warmup",
                "Set warmup_steps or warmup_ratio.",
            ),
            (
                "restart_growth",
                self.restart_growth not in (None, 1) and not self.restarts,
                "restarts is 0",
                "Set restarts.",
            ),
            (
                "decay",
                self.decay != _COMMON["decay"] and self.weight_decay == 0,
                "weight_decay is 0",
                "Set weight_decay.",
            ),
            (
                "weight_decay_power",
                self.weight_decay_power != OPTIMIZERS[self.name].get("weight_decay_power") and self.weight_decay == 0,
                "weight_decay is 0",
                "Set weight_decay.",
            ),
            ("nesterov", self.nesterov and self.momentum == 0, "momentum is 0", "Set momentum."),
            (
                "moment_dtype",
                self.moment_dtype == "bfloat16" and self.momentum == 0,
                "with momentum = 0 no moment has that dtype",
                "Leave it out, or set momentum.",
            ),
        ):
            if idle:  # defaults are not: the kept recipe of a run has the value of every field
                raise UserError(f"optimizer.{name} = {getattr(self, name)!r} has no effect: {why}", advice)
