"""Huge pages for commands that train on a CPU under Linux.

Every step of training allocates and frees its temporary arrays. In pages of 4 KiB, the kernel spends a good part of a
step clearing pages and the processor misses its translation cache. glibc requests huge pages if a variable says so when
a process starts, so the command executes itself once more with it; the process keeps its id.
"""

import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path

TUNABLES = "GLIBC_TUNABLES"
"""the variable; if it is set, also to nothing, it is left alone"""
REQUEST = "glibc.malloc.hugetlb=1"
COMMANDS = ("train", "finetune", "demo")
MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def use_huge_pages(arguments: Sequence[str]) -> None:
    """Executes this process again with REQUEST, if a command of `arguments` gains from it; otherwise it returns.

    It has to be called before anything is read, started or imported that would be lost or done twice.
    """
    if not _requested(arguments):
        return
    os.environ[TUNABLES] = REQUEST
    try:
        os.execv(sys.executable, sys.orig_argv)
    except OSError:  # slower, but no reason to fail
        del os.environ[TUNABLES]


def _requested(arguments: Sequence[str]) -> bool:
    if TUNABLES in os.environ or not sys.executable or not sys.orig_argv or not {*arguments[:1]} & {*COMMANDS}:
        return False
    try:
        # "always" needs no request, and "never" allows none; systems other than Linux have no such file.
        return "[madvise]" in MODE.read_text() and _computes_on_cpu()
    except OSError:
        return False


def _computes_on_cpu() -> bool:
    """Whether JAX will use the CPU, as far as one can tell without starting it."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] == "cpu"
    return not any(glob.glob(pattern) for pattern in ACCELERATORS)
