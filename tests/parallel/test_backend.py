"""XLA's fusion of reductions on CPUs, which computes wrong sums, is off in everything that computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import camelid
from camelid.errors import UserError
from camelid.model.decoder import decode_params
from camelid.model.kv_cache import empty_cache
from camelid.parallel import backend
from camelid.parallel.backend import FLAG, fuses_reductions, prepare_backend
from runs import TIMEOUT_S, tiny_run, write_recipe_file

# Of 32,769 rows the last, [32768, 0, 0], gave 1,065,369,600 with jaxlib 0.10.2 (jax-ml/jax issue 39103).
REPRODUCTION = """
import jax, jax.numpy as jnp, numpy as np
rows = np.zeros((32769, 3), np.float32)
rows[:, 0] = np.arange(32769)
sums = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(rows)
print(float(sums[-1]))
"""
RIGHT = 32768.0**2
PREPARE = "from camelid.parallel.mesh import one_device; one_device()\n"


def python(
    program: str, env: dict[str, str], flags: str = "", arguments: tuple[object, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, with these XLA_FLAGS and the camelid that is tested here."""
    env = env | {"XLA_FLAGS": flags, "PYTHONPATH": str(Path(camelid.__file__).parents[1])}
    words = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def test_sums_are_right_with_the_installed_jax_and_what_camelid_sets(capsys):
    """The tests' own process computes as every process of camelid's does."""
    exec(REPRODUCTION, {})
    assert float(capsys.readouterr().out) == RIGHT


@pytest.mark.parametrize("first", ["", "import jax\n"], ids=["camelid first", "jax imported first"])
def test_the_flag_is_added_to_the_users_own_before_jax_starts(first: str, user_env: dict[str, str]):
    show = "import jax, os; print(jax.device_count(), os.environ['XLA_FLAGS'])"
    done = python(first + PREPARE + REPRODUCTION + show, user_env, "--xla_force_host_platform_device_count=3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [
        str(RIGHT),
        f"3 --xla_force_host_platform_device_count=3 {FLAG}=-reduce",
    ]


@pytest.mark.parametrize("kept", [f"{FLAG}=-reduce", f"{FLAG}=-individual_dot,-reduce", f"{FLAG}="])
def test_a_setting_of_the_users_that_turns_the_fusion_off_is_left_alone(kept: str, user_env: dict[str, str]):
    done = python(PREPARE + REPRODUCTION + "import os; print(os.environ['XLA_FLAGS'])", user_env, kept)
    assert done.stdout.split("\n")[:2] == [str(RIGHT), kept], done.stderr


CATCH = f"""
from camelid.errors import UserError
from camelid.parallel.backend import fuses_reductions
if fuses_reductions():
    try:
        {PREPARE.strip()}
    except UserError as error:
        print(error)
else:
    print("JAX does not fuse reductions by itself any more")
"""


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ("", "load the model (camelid.load) before the first JAX computation"),
        (f"{FLAG}=-individual_dot", "add -reduce"),
        (f"{FLAG}=reduce", f"Remove reduce from {FLAG} in XLA_FLAGS"),
    ],
)
def test_a_jax_that_was_started_with_the_fusion_is_refused(flags: str, advice: str, user_env: dict[str, str]):
    done = python("import jax; jax.devices()\n" + CATCH, user_env, flags)
    problem, way_out = done.stdout.strip().split("\n")
    assert problem == "XLA's fusion of reductions with YNNPACK is on, which gives wrong results on CPUs", done.stderr
    assert advice in way_out


def test_what_was_set_is_what_the_user_had_when_it_comes_too_late(monkeypatch: pytest.MonkeyPatch):
    """JAX's cache of compiled programs is keyed on XLA_FLAGS: they must not promise what does not hold."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    monkeypatch.setattr(backend, "fuses_reductions", lambda: True)
    for _ in range(2):
        with pytest.raises(UserError, match="before camelid could disable it"):
            prepare_backend.__wrapped__()
        assert os.environ["XLA_FLAGS"] == "--xla_force_host_platform_device_count=8"


def test_other_backends_are_not_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(backend, "fuses_reductions", lambda: True)
    prepare_backend.__wrapped__()
    assert os.environ["XLA_FLAGS"] == f"{FLAG}=-reduce"


# Each runs in a process of its own, a copy of one in which JAX has not started.
ENTRIES = """
import contextlib, io, json, os, sys, warnings
import camelid.api, camelid.cli, camelid.evaluate.parity, camelid.runs.run, orbax.checkpoint
from camelid.parallel.backend import fuses_reductions

stories, recipe, folder = sys.argv[1:]

def command(*words):
    sys.argv = ["camelid", *words]
    camelid.cli.main()

open(f"{folder}/text.txt", "w").write("One day, Tim saw a big red dog.")
entries = {
    "load": lambda: camelid.load(stories),
    "load on a mesh": lambda: camelid.load(stories, mesh=camelid.MeshConfig()),
    "generate": lambda: command("generate", stories, "One", "--max-new-tokens", "2"),
    "evaluate": lambda: command("evaluate", "perplexity", stories, f"{folder}/text.txt"),
    "train": lambda: command("train", recipe, "--run", f"{folder}/command"),
    "convert": lambda: command("convert", stories, f"{folder}/converted", "--to", "meta", "--verify"),
}
for name, entry in entries.items():
    if os.fork() == 0:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                entry()
                found = fuses_reductions()
            except BaseException as error:
                found = f"{error!r} {output.getvalue()}"
        print(json.dumps([name, found]), flush=True)
        os._exit(0)
    os.wait()
"""


def test_every_entry_turns_the_fusion_off(stories: Path, tmp_path: Path, user_env: dict[str, str]):
    recipe = write_recipe_file(tiny_run(tmp_path, train__steps=1), tmp_path / "recipe.toml")
    done = python(ENTRIES, user_env, arguments=(stories, recipe, tmp_path))
    found = dict(map(json.loads, done.stdout.splitlines()))
    assert len(found) == 6, done.stderr
    assert set(found.values()) == {False}, found


# What the fusion did to batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rows_logits_are_the_same_bits_alone_and_in_a_batch(stories: Path, dtype: str):
    model = camelid.load(stories, dtype=dtype)
    tokens = np.random.default_rng(0).integers(0, 512, (33, 64))
    alone = np.asarray(model.logits(tokens[:1]))
    for rows in (2, 33):
        np.testing.assert_array_equal(model.logits(tokens[:rows])[:1], alone)


def test_a_rows_logits_do_not_depend_on_the_length_of_its_cache(stories: Path):
    """Nor, beyond one row, on how many others there are: of one row, products are of a matrix with a vector."""
    model = camelid.load(stories)
    tokens = np.random.default_rng(0).integers(0, 512, (8, 51))

    @jax.jit
    def step(params, tokens, positions, cache):
        ends = jnp.full(len(tokens), 60)
        return params(tokens, positions, None, model.config, model.compute, cache=cache, lengths=ends)

    def last(rows: int, slots: int) -> np.ndarray:
        cache = empty_cache(model.config, rows, slots, jnp.dtype("float32"), ())
        positions = jnp.broadcast_to(jnp.arange(50), (rows, 50))
        _, cache = step(model.params, tokens[:rows, :50], positions, cache)
        logits, _ = step(decode_params(model.params), tokens[:rows, 50:], jnp.full((rows, 1), 50), cache)
        return np.asarray(logits)[0]

    with jax.set_mesh(model.mesh):
        np.testing.assert_array_equal(last(1, 512), last(1, 64))
        np.testing.assert_array_equal(last(8, 512), last(2, 64))


def test_this_process_does_not_fuse_reductions():
    assert not fuses_reductions()
