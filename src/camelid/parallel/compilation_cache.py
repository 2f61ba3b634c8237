"""The persistent cache of programs that XLA compiles."""

import hashlib
import os
import platform
import warnings
from pathlib import Path

from camelid.disk.paths import cache_folder, make_writable
from camelid.errors import UserError

LARGEST = 2 * 2**30  # bytes; the least recently used programs are removed


def keep_compiled() -> None:
    """Enables JAX's persistent compilation cache in camelid's cache folder, unless JAX_COMPILATION_CACHE_DIR is set."""
    import jax

    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    folder = cache_folder() / "xla" / _processor()
    try:
        make_writable(folder)
    except UserError as error:
        warnings.warn(f"compiled programs are not cached: {error.problem}. {error.advice}", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LARGEST)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _processor() -> str:
    """An identifier of this type of processor: machines that share a home folder may need different programs."""
    about = platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        about += next((line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))), "")
    return hashlib.sha256(about.encode()).hexdigest()[:12]
