"""Disables a fusion of XLA's CPU backend that computes wrong sums, before JAX is initialized."""

import os
from functools import cache

from camelid.errors import UserError

# The operations that XLA:CPU delegates to the YNNPACK library. Every jaxlib that pyproject.toml allows knows the flag;
# XLA aborts the process for an unknown flag.
FLAG = "--xla_cpu_experimental_ynn_fusion_type"


@cache
def prepare_backend() -> None:
    """Disables the fusion of reductions on CPUs and initializes JAX's default backend, at the first call.

    jaxlib 0.10.2 computes wrong sums with that fusion (jax-ml/jax issue 39103), and later versions are only partly
    fixed. With it, the result of a row also depends on the number of rows that are computed together.

    XLA reads XLA_FLAGS once, when a process first uses a device. Raises UserError if JAX was initialized before
    without the flag, or XLA_FLAGS enables the fusion.
    """
    import jax

    before = os.environ.get("XLA_FLAGS", "")
    if FLAG not in before:
        os.environ["XLA_FLAGS"] = f"{before} {FLAG}=-reduce".strip()
    if jax.default_backend() != "cpu" or not fuses_reductions():
        return
    os.environ["XLA_FLAGS"] = before
    raise UserError(
        "XLA's fusion of reductions with YNNPACK is on, which gives wrong results on CPUs",
        f"Remove reduce from {FLAG} in XLA_FLAGS, or add -reduce to the list of disabled operations."
        if FLAG in before
        else f"JAX was used before camelid could disable it: load the model (camelid.load) before the first JAX "
        f"computation, or start Python with XLA_FLAGS={FLAG}=-reduce.",
    )


def fuses_reductions() -> bool:
    """Whether programs that are compiled in this process compute sums on the CPU with YNNPACK."""
    import jax
    import jax.numpy as jnp

    # Large enough for XLA to call the library.
    rows = jax.ShapeDtypeStruct((4096, 64), jnp.float32)
    program = jax.jit(lambda x: jnp.sum(x, -1)).lower(rows).compile().as_text()
    return program is not None and "ynn_fusion" in program
