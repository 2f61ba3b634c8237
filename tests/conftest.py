"""What every test sees: eight CPU devices, strict dtype promotion, annotated shapes that are checked, no network."""

import atexit
import contextlib
import gc
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
ON_GPU = os.environ.get("CAMELID_TEST_PLATFORM", "cpu") == "gpu"

PROGRAMS = ROOT / ".cache" / "programs"
PROGRAMS_BYTES = 2 << 30
# A compiled program takes some ten mappings of memory, of which Linux gives a process 65,530.
MANY_MAPPINGS = 20_000

# Prepared data is of files in temporary folders, which no other run will see.
DATA_CACHE = tempfile.mkdtemp(prefix="camelid-tests-")
atexit.register(shutil.rmtree, DATA_CACHE, ignore_errors=True)

ENVIRONMENT = {
    "CAMELID_CACHE": DATA_CACHE,
    "HF_HUB_OFFLINE": "1",
    "JAX_PLATFORMS": "cuda,cpu" if ON_GPU else "cpu",
    # Compiled programs are kept for the next run. JAX's keys contain the processor and the devices, and a loaded
    # program gives the same bits as a compiled one. With a size limit JAX would read the size and the age of every
    # entry at each write, and keep other processes waiting meanwhile: `discard_old_programs` limits the size.
    "JAX_COMPILATION_CACHE_DIR": str(PROGRAMS),
    "JAX_COMPILATION_CACHE_MAX_SIZE": "-1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several processes test on one GPU
}
EIGHT = "--xla_force_host_platform_device_count=8"
RIGHT_SUMS = "--xla_cpu_experimental_ynn_fusion_type=-reduce"
# pytest-xdist's processes inherit what is set here, and a width that readline sets: a user has none of it.
for name in ("COLUMNS", "LINES", "NPROC"):
    os.environ.pop(name, None)
USER_ENVIRONMENT = os.environ | ENVIRONMENT
USER_ENVIRONMENT["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
USER_ENVIRONMENT["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "").replace(EIGHT, "").replace(RIGHT_SUMS, "").strip()

# All of this before jax is imported, because it reads the environment once. Tests compute before any of them calls what
# turns off XLA's fusion of reductions (camelid/parallel/backend.py).
os.environ.update(ENVIRONMENT)
os.environ["XLA_FLAGS"] = f"{USER_ENVIRONMENT['XLA_FLAGS']} {EIGHT} {RIGHT_SUMS}".strip()
# Eight simulated devices on few cores wait for each other for ever once many dispatches are queued, unless XLA is told
# to keep a thread for each.
os.environ["NPROC"] = "16"

# A shell starts jobs in the background with SIGINT ignored, and children inherit that; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

import quick  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
# jaxtyping's wrapper takes most of the time of small functions: it is for modules with shapes alone.
SHAPED = [file for file in (ROOT / "src" / "camelid").rglob("*.py") if "jaxtyping" in file.read_text("utf-8")]
jaxtyping.install_import_hook(
    [".".join(file.relative_to(ROOT / "src").with_suffix("").parts) for file in SHAPED], "beartype.beartype"
)


def discard_old_programs() -> None:
    """Removes the oldest compiled programs until the others take at most PROGRAMS_BYTES."""
    found = []
    for file in PROGRAMS.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # another run may discard them too
            status = file.stat()
            found.append((status.st_mtime, status.st_size, file))
    total = 0
    for _, size, file in sorted(found, reverse=True):
        total += size
        if total > PROGRAMS_BYTES:
            file.unlink(missing_ok=True)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # once, not in each process of pytest-xdist
        discard_old_programs()


def takes_long(item: pytest.Item) -> bool:
    return item.path.parent.name == "sharded" or item.path.name in ("test_docs.py", "test_migrating.py")


def is_quick(node: pytest.Item) -> bool:
    return node.get_closest_marker("quick_compile") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # One process would wait for the other if the longest tests were the last. Those with quick_compile stand together,
    # because programs that were compiled before it was turned on or off are not used again.
    items.sort(key=lambda item: (not takes_long(item), is_quick(item)))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and jax.default_backend() != "gpu":
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and CAMELID_TEST_PLATFORM=gpu"))


def pytest_collection_finish() -> None:
    # Half a million objects of imported modules live as long as the process: the garbage collector skips them now.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Turns XLA's optimizations off or on, before any fixture."""
    quick.turn(is_quick(item))


def mappings() -> int:
    """The mappings of this process; 0 where the system does not list them."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Drops compiled programs at the end of a file, once there are many."""
    if nextitem is not None and nextitem.path != item.path and mappings() > MANY_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real models, tokenizers and data, and checkpoints written by other people's code."""
    folder = os.environ.get("CAMELID_ASSETS")
    if not folder:
        pytest.skip("CAMELID_ASSETS is not set; point it at the folder of test assets (see CONTRIBUTING.md)")
    if not Path(folder).is_dir():
        pytest.fail(f"CAMELID_ASSETS is {folder!r}, which is no folder")
    return Path(folder).resolve()


@pytest.fixture(scope="session")
def stories(assets: Path) -> Path:
    """A real Llama of 260 thousand parameters in Hugging Face form, that tells stories."""
    return assets / "models" / "stories260K" / "hf"


@pytest.fixture
def user_env(request: pytest.FixtureRequest) -> dict[str, str]:
    """The environment of a command that is run as a user would run it: one CPU device, this Python's scripts first."""
    return quick.environment(USER_ENVIRONMENT) if is_quick(request.node) else USER_ENVIRONMENT.copy()
