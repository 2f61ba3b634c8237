"""Makes XLA's CPU backend safe to use: one of its fusions computes wrong sums, and is turned off before JAX starts."""

import os
from functools import cache

from camelid.errors import UserError

# Which operations XLA:CPU hands to the YNNPACK library. Every jaxlib that pyproject.toml allows knows the flag; XLA
# ends the process at one that it does not know.
FLAG = "--xla_cpu_experimental_ynn_fusion_type"


@cache
def prepare_backend() -> None:
    """Turns off the fusion of reductions on CPUs and starts JAX's default backend, the first time that it is called.

    jaxlib 0.10.2 gives wrong sums with that fusion (jax-ml/jax issue 39103), and later versions are repaired in part
    only. With it, a row's result also depends on how many rows are computed together.

    XLA reads XLA_FLAGS once, when a process first uses a device. Raises UserError where JAX was started before
    without the flag, or XLA_FLAGS asks for the fusion.
    """
    import jax

    before = os.environ.get("XLA_FLAGS", "")
    if FLAG not in before:
        os.environ["XLA_FLAGS"] = f"{before} {FLAG}=-reduce".strip()
    if jax.default_backend() != "cpu" or not fuses_reductions():
        return
    os.environ["XLA_FLAGS"] = before
    raise UserError(
        "XLA's fusion of reductions with YNNPACK is on, which gives wrong numbers on CPUs",
        f"Remove reduce from {FLAG} in XLA_FLAGS, or add -reduce to a list of operations that are turned off."
        if FLAG in before
        else f"JAX was used before camelid could turn it off: load the model (camelid.load) before the first JAX "
        f"computation, or start Python with XLA_FLAGS={FLAG}=-reduce.",
    )


def fuses_reductions() -> bool:
    """Whether programs compiled in this process compute sums on the CPU with YNNPACK."""
    import jax
    import jax.numpy as jnp

    # Large enough to be worth a call of the library.
    rows = jax.ShapeDtypeStruct((4096, 64), jnp.float32)
    program = jax.jit(lambda x: jnp.sum(x, -1)).lower(rows).compile().as_text()
    return program is not None and "ynn_fusion" in program
