"""What the marker `quick_compile` turns off: most of XLA's optimizations, and its newer code generator for fusions.

Each takes about half of the time that XLA needs for the programs of tests on a CPU.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax._src import compiler

OLD_FUSIONS = "xla_cpu_disable_new_fusion_emitters"


def _message(field: int, content: bytes) -> bytes:
    """A field of a protocol buffer that holds a message or a string of fewer than 128 bytes."""
    tag = field << 3 | 2
    return bytes([tag] if tag < 128 else [tag & 127 | 128, tag >> 7]) + bytes([len(content)]) + content


# XLA reads XLA_FLAGS once in a process, and jaxlib gives Python no access to this option. But a protocol buffer with
# another behind it is read as both together: CompileOptionsProto.executable_build_options.debug_options, and of it an
# entry (key, value) of xla_backend_extra_options.
_WITH_OLD_FUSIONS = _message(3, _message(3, _message(500, _message(1, OLD_FUSIONS.encode()) + _message(2, b""))))
_compile_options = compiler.get_compile_options


def _quick_compile_options(*args: Any, **kwargs: Any) -> Any:
    options = _compile_options(*args, **kwargs)
    if is_on():
        return options.ParseFromString(options.SerializeAsString() + _WITH_OLD_FUSIONS)
    return options


compiler.get_compile_options = _quick_compile_options


def is_on() -> bool:
    return jax.config.read("jax_disable_most_optimizations")


def turn(on: bool) -> None:
    """Turns it on or off in this process; what was compiled the other way is not used again."""
    if on != is_on():
        jax.config.update("jax_disable_most_optimizations", on)
        jax.clear_caches()


def environment(plain: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that compiles quickly."""
    flags = f"{plain['XLA_FLAGS']} --xla_backend_extra_options={OLD_FUSIONS}".strip()
    return dict(plain) | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": flags}
