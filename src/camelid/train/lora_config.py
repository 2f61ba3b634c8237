"""The [lora] table of a recipe: which adapters are trained; declared without JAX, so that the CLI starts fast."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from camelid.errors import UserError

GROUPS: Mapping[str, tuple[str, ...]] = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
"""names that stand for several modules in `targets`"""


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters (LoRA, arXiv:2106.09685), which are trained instead of the parameters of `init`.

    The defaults are the usual ones: every matrix of every layer, because adapters of attention alone do not reach the
    quality of full finetuning (QLoRA, arXiv:2305.14314, section 4), and a scale alpha / rank of 2.
    """

    rank: int = 16
    """rank of the factors"""
    alpha: float | None = None
    """the update is scaled by alpha / rank; default: 2 x rank"""
    dropout: float = 0.0
    """probability of dropping an input of the factors"""
    targets: tuple[str, ...] = ("attention", "mlp")
    """modules that get an adapter: groups (attention, mlp), names such as "q_proj", "embed" and "lm_head", or regular
    expressions that match the end of a module's path, or patterns of parameters as in train.freeze"""
    kind: Literal["lora", "dora"] = "lora"
    """dora also trains the length of each output's row (arXiv:2402.09353)"""
    rank_stabilized: bool = False
    """scale by alpha / sqrt(rank) instead (rsLoRA, arXiv:2312.03732)"""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """other ranks for some modules, by name or regular expression; the first that matches counts"""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """other values of alpha, in the same form"""
    base: Literal["float32", "bfloat16", "int8", "nf4"] | None = None
    """form in which the frozen matrices are held; default: compute.dtype, in which they are multiplied. int8 and nf4
    (QLoRA, arXiv:2305.14314) quantize the matrices of the layers, and hold the others in bfloat16"""
    merge: bool = False
    """also write the model with the adapter merged into it, in model/, when the run is finished"""

    def __post_init__(self) -> None:
        for name, fits, advice in (
            ("rank", self.rank >= 1, "Choose 1 or more, for example 16."),
            ("alpha", self.alpha is None or 0 < self.alpha < math.inf, "Choose a number above 0."),
            ("dropout", 0 <= self.dropout < 1, "It is a probability: choose 0 or more, and less than 1."),
            ("targets", bool(self.targets), f"Name modules, such as q_proj, or groups: {', '.join(GROUPS)}."),
        ):
            if not fits:
                raise UserError(f"lora.{name} = {getattr(self, name)!r}", advice)
        for key, rank in self.rank_pattern.items():
            if rank < 1:
                raise UserError(f"lora.rank_pattern has {key!r} = {rank}", "Choose 1 or more.")
        for key, alpha in self.alpha_pattern.items():
            if not 0 < alpha < math.inf:
                raise UserError(f"lora.alpha_pattern has {key!r} = {alpha}", "Choose a number above 0.")
        for name in ("targets", "rank_pattern", "alpha_pattern"):
            for pattern in getattr(self, name):
                if not is_expression(pattern) and not re.fullmatch(r"[\w.*-]+", pattern):
                    raise UserError(
                        f"lora.{name} has {pattern!r}, which is not a regular expression",
                        "Write a name such as q_proj, a part of names such as layers.0-7.mlp, or a regular expression "
                        "such as 'layers\\.[0-7]\\..*_proj'.",
                    )

    @property
    def usual_alpha(self) -> float:
        """`alpha`, or its default."""
        return 2.0 * self.rank if self.alpha is None else self.alpha


def is_expression(pattern: str) -> bool:
    """Whether a pattern is a regular expression; "*_proj" is none."""
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True
