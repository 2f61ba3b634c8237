"""Runs that train an adapter: what they train and save, how they resume, and from what they may start."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import camelid
import camelid.runs.run
from camelid.checkpoint.registry import open_checkpoint
from camelid.checkpoint.state import saved_state
from camelid.checkpoint.state.orbax_state import RunCheckpoints
from camelid.errors import UserError
from camelid.model.adapters import initialize_adapters
from camelid.model.config import ComputeConfig
from camelid.model.decoder import Decoder
from camelid.model.params import named
from camelid.model.weights import Quantized
from camelid.parallel.mesh import one_device
from camelid.parallel.stop_signal import StopSignal
from camelid.runs.components import build_components
from camelid.runs.lora import Base, load_base
from camelid.runs.lora import base_of as base_checkpoint
from camelid.runs.lora_targets import plan_adapters
from camelid.runs.run import run
from camelid.runs.run_folder import record
from camelid.runs.start import Start, find_start
from camelid.runs.summary import start_summary
from camelid.train.loggers import read_metrics
from camelid.train.state import start_state
from programs import largest_array
from runs import VOCAB, called, column, losses, recipe, tiny_run, write_recipe_file
from tiny import tiny_config, tiny_params, tiny_tokens

pytestmark = pytest.mark.quick_compile

CONFIG = tiny_config(vocab_size=VOCAB, num_layers=3, bos_id=256, eos_ids=(257,))
TOKENS = tiny_tokens(CONFIG, 2, 9)
# Everything at once: ranks that differ, a layer without an adapter, magnitudes, dropout and microbatches.
LORA = {
    "rank": 4,
    "targets": ["attention", r"layers\.[02]\.mlp\.(up|down)_proj", "lm_head"],
    "kind": "dora",
    "dropout": 0.25,
    "rank_pattern": {r"layers\.1\.self_attn\.(q|v)_proj": 2},
    "alpha_pattern": {"o_proj": 3},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of random parameters."""
    folder = tmp_path_factory.mktemp("base") / "base"
    camelid.Model(CONFIG, tiny_params(CONFIG), None, ComputeConfig(), one_device()).save(folder)
    return folder


def lora_run(folder: Path, base: Path, lora: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    table = tiny_run(folder, **{"init": str(base), "lora": LORA if lora is None else lora} | fields)
    del table["model"]
    return table


def on_one_device(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())


class StopAfterTwo(StopSignal):
    def should_stop(self, step: int) -> bool:
        return step == 2


def shared_run(folder: Path, base: Path, **fields: Any) -> dict[str, Any]:
    """A recipe's table: the run that the tests below share, in another folder."""
    return lora_run(folder, base, LORA | {"merge": True}, train__accumulate=2, data__validation_fraction=0.3, **fields)


@pytest.fixture(scope="module")
def straight(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, camelid.Model]:
    """The folder of a run of four steps on one device, and its model."""
    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        on_one_device(patch)
        outcome = run(recipe(shared_run(folder, base)))
    assert outcome.finished
    return outcome.folder, outcome.model


def params_of(run_folder: Path, step: int) -> dict[str, np.ndarray]:
    arrays = saved_state.open_step(run_folder / "checkpoints", step)
    return {
        name.removeprefix("params."): array.read(tuple(slice(0, n) for n in array.shape), array.dtype)
        for name, array in arrays.items()
        if name.startswith("params.")
    }


# What is trained and saved --------------------------------------------------------------------


def test_only_factors_and_magnitudes_have_gradients_moments_and_places_in_a_checkpoint(straight: tuple[Path, Any]):
    names = saved_state.open_step(straight[0] / "checkpoints", 4).keys()
    ends = {
        name.rpartition(".")[2] for name in names if name.startswith(("params.", "opt_state.0.mu", "opt_state.0.nu"))
    }
    assert ends == {"a", "b", "magnitude"}
    paths = {name.removeprefix("params.").rpartition(".")[0] for name in names if name.startswith("params.")}
    attention = {f"layers.attn.{name}_proj" for name in "qkvo"}
    assert paths == attention | {"layers.mlp.up_proj", "layers.mlp.down_proj", "lm_head"}


def test_what_is_not_used_of_a_factor_stays_zero_and_a_layer_without_an_adapter_stays_as_it_is(
    straight: tuple[Path, camelid.Model], base: Path
):
    arrays = params_of(straight[0], 4)
    q, up = arrays["layers.attn.q_proj.b"], arrays["layers.mlp.up_proj.b"]
    assert not arrays["layers.attn.q_proj.a"][1, 2:].any()
    assert not q[1, ..., 2:].any()
    assert np.abs(q[1, ..., :2]).min() > 0
    assert np.abs(q[0]).min() > 0
    assert not up[1].any()
    assert np.abs(up[2]).min() > 0
    tuned, before = camelid.load(straight[0]).params.layers, camelid.load(base).params.layers
    np.testing.assert_array_equal(tuned.mlp.up_proj[1], before.mlp.up_proj[1])
    assert np.abs(tuned.mlp.up_proj[2] - before.mlp.up_proj[2]).max() > 1e-5


def test_the_run_the_adapter_and_the_merged_model_are_the_trained_model(straight: tuple[Path, camelid.Model]):
    """Attached, merged when it is read, and merged when it was written."""
    folder, model = straight
    expected = np.asarray(model.logits(TOKENS))
    for place in (folder, folder / "checkpoints" / "4", folder / "adapter", folder / "model"):
        np.testing.assert_allclose(camelid.load(place).logits(TOKENS), expected, atol=1e-5 * np.abs(expected).max())


def test_inspect_tells_what_the_adapter_is(base: Path, straight: tuple[Path, camelid.Model]):
    folder = straight[0]
    count = sum(array.size for array in load_file(folder / "adapter" / "adapter_model.safetensors").values())
    for place in (folder, folder / "checkpoints" / "4", folder / "adapter"):
        about = json.loads(called("inspect", place, "--json").stdout)["adapter"]
        assert about == {
            "kind": "DoRA",
            "ranks": [2, 4],
            "alphas": [3.0, 8.0],
            "rank_stabilized": False,
            "parameters": count,
            "base": str(base.resolve()),
        }
        line = f"DoRA, ranks 2, 4, alphas 3, 8, {count:,} parameters, on {base.resolve()}\n"
        assert called("inspect", place).stdout.endswith(line)
    assert "adapter" not in json.loads(called("inspect", base, "--json").stdout)


def test_training_lowers_the_loss_and_validation_sees_the_adapter(straight: tuple[Path, camelid.Model]):
    found = [row["validation_loss"] for row in read_metrics(straight[0] / "metrics.jsonl") if "validation_loss" in row]
    assert found[0] > found[-1] + 0.01


def test_without_a_checkpoint_the_folder_of_a_run_is_its_adapter(
    base: Path, straight: tuple[Path, camelid.Model], tmp_path: Path
):
    folder = tmp_path / "copy"
    shutil.copytree(straight[0], folder, ignore=shutil.ignore_patterns("checkpoints", "model"))
    expected = np.asarray(straight[1].logits(TOKENS))
    np.testing.assert_allclose(camelid.load(folder).logits(TOKENS), expected, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(UserError, match="has the adapter of a run without checkpoints"):
        run(recipe(shared_run(tmp_path, base, run=str(folder))))


# A quantized base ------------------------------------------------------------------------------


def base_of(table: dict[str, Any]) -> Base:
    described = recipe(table)
    assert described.init is not None
    assert described.lora is not None
    source = open_checkpoint(described.init)
    return load_base(described, source, plan_adapters(described.lora, base_checkpoint(source).config), one_device())


def test_a_base_is_read_and_quantized_one_parameter_after_another(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lora = {"targets": ["q_proj"], "rank": 2}
    plain = base_of(lora_run(tmp_path, base, lora | {"base": "bfloat16"}))
    before, matrices, held, load = {id(x) for x in jax.live_arrays()}, 7, [], saved_state.load

    def counting(*args: Any) -> Any:
        alive = [x for x in jax.live_arrays() if id(x) not in before and x.dtype == "bfloat16" and x.ndim > 2]
        held.append(len(alive))
        return load(*args)

    monkeypatch.setattr(saved_state, "load", counting)
    quantized = base_of(lora_run(tmp_path, base, lora | {"base": "int8"}))
    assert len(held) > matrices
    assert max(held) == 0, "a matrix is read while another one is not quantized"
    assert quantized.about.checksums == plain.about.checksums
    assert sum(isinstance(leaf, Quantized) for leaf in named(quantized.params).values()) == matrices


def test_magnitudes_are_computed_of_one_layer_after_another(base: Path, tmp_path: Path):
    given = base_of(lora_run(tmp_path, base, {"targets": ["mlp"], "rank": 2, "kind": "dora", "base": "int8"}))

    def magnitude(params: Decoder) -> jax.Array:
        new = initialize_adapters(given.about.plan, CONFIG, jax.random.key(0), params)
        return named(new)["layers.mlp.up_proj"].magnitude

    matrix = named(given.params)["layers.mlp.up_proj"]
    rows = jax.vmap(lambda layer: layer.dense())(matrix)
    np.testing.assert_allclose(jax.jit(magnitude)(given.params), jnp.linalg.norm(rows, axis=-1), rtol=1e-5)
    assert largest_array(magnitude, given.params) < rows.size


def test_the_base_of_an_adapter_is_a_step_of_a_run_that_may_train_on(base: Path, tmp_path: Path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "recipe.toml").write_text("")
    shutil.copy(base / "config.json", full)
    checkpoints = RunCheckpoints(full / "checkpoints", 9)
    checkpoints.save(2, start_state(tiny_params(CONFIG), optax.sgd(0.1)))
    checkpoints.wait()
    checkpoints.close()
    for init in (str(full), f"run::{full}", str(full / "checkpoints" / "2")):
        name = base_of(lora_run(tmp_path, base, {"targets": ["q_proj"]}, init=init)).about.base
        assert name.removeprefix("run::") == str(full.resolve() / "checkpoints" / "2")


# Resuming, microbatches, meshes ----------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on_bit_for_bit_with_dropout(
    base: Path, straight: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    on_one_device(monkeypatch)
    table = shared_run(tmp_path, base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(camelid.runs.run, "StopSignal", StopAfterTwo)
        assert not run(recipe(table)).finished
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").is_file(), "there is one at each checkpoint"
    assert not (tmp_path / "run" / "model").exists()
    assert run(recipe(table)).finished
    for name in ("loss", "gradient_norm"):
        assert column(losses(tmp_path / "run"), name).tolist() == column(losses(straight[0]), name).tolist()
    file = "adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / file).read_bytes() == (straight[0] / file).read_bytes()


def test_a_mesh_and_other_microbatches_train_the_same_with_dropout(
    base: Path, straight: tuple[Path, Any], tmp_path: Path
):
    table = shared_run(tmp_path, base, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    table["train"]["accumulate"] = 1
    run(recipe(table))
    ours, alone = losses(tmp_path / "run"), losses(straight[0])
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(column(ours, name), column(alone, name), rtol=1e-5, err_msg=name)


# From what a run may start --------------------------------------------------------------------


def test_a_base_that_changed_is_refused(
    straight: tuple[Path, Any], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    on_one_device(monkeypatch)
    own = tmp_path / "base"
    camelid.load(base).save(own)
    table = lora_run(tmp_path, own, {"targets": ["q_proj"], "rank": 2}, train__steps=1)
    run(recipe(table))
    assert not (tmp_path / "run" / "model").exists(), "nobody asked for it"
    tensors = load_file(own / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1
    save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    table["train"]["steps"] = 2
    with pytest.raises(
        UserError, match=r"not the base that the run in .* was started with: layers\.mlp\.up_proj differs"
    ):
        run(recipe(table))
    (own / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"the base of .* cannot be opened"):
        camelid.load(tmp_path / "run")


def start_of(table: dict[str, Any]) -> Start:
    """The state before the first step of a new run."""
    return start_and_lines(table)[0]


def start_and_lines(table: dict[str, Any]) -> tuple[Start, str]:
    """The state before the first step of a new run, and what is printed about it."""
    described, mesh = recipe(table), one_device()
    with jax.set_mesh(mesh):
        components = build_components(described, mesh)
        checkpoints = RunCheckpoints(Path(described.run) / "checkpoints", 1)
        start = find_start(described, None, None, components, checkpoints, mesh)
        return start, "\n".join(start_summary(described, components, mesh, start))


def test_an_adapter_is_continued_if_the_recipe_describes_it(base: Path, straight: tuple[Path, Any], tmp_path: Path):
    for place, optimizer in (("adapter", False), (".", False), ("checkpoints/4", True)):
        table = lora_run(tmp_path, base, init=str(straight[0] / place), init_optimizer=optimizer, train__steps=9)
        start = start_of(table)
        assert start.base is not None
        assert start.base.about.base == str(base.resolve())
        assert int(start.state.step) == (4 if optimizer else 0)
        for name, expected in params_of(straight[0], 4).items():
            path, _, factor = name.rpartition(".")
            np.testing.assert_array_equal(getattr(named(start.state.trainable)[path], factor), expected, err_msg=name)
        moments = named(start.state.opt_state[0].mu)["layers.attn.k_proj"].a
        assert np.any(moments) == optimizer


def test_an_adapter_without_a_table_is_merged_and_what_is_frozen_is_not_counted(
    straight: tuple[Path, Any], tmp_path: Path
):
    table = lora_run(tmp_path, straight[0], train__freeze=["embed", "layers.0-1"])
    del table["lora"]
    start, told = start_and_lines(table)
    assert start.base is None
    assert "note: init is an adapter: it is merged into its base, and all parameters are trained" in told
    params = named(start.state.trainable)
    total = sum(leaf.size for leaf in params.values())
    count = sum(leaf[2:].size for path, leaf in params.items() if path.startswith("layers."))
    count += sum(leaf.size for path, leaf in params.items() if not path.startswith(("layers.", "embed")))
    assert f"trains {count:,} of {total:,} parameters; train.freeze keeps embed, layers.0-1 as they are" in told
    assert "init is an adapter" not in start_and_lines(lora_run(tmp_path, straight[0]))[1]


def test_what_is_frozen_or_decays_is_an_adapter(base: Path, tmp_path: Path):
    for change in ({"train__freeze": ["embed"]}, {"optimizer__decay": ["norm"]}):
        message = (
            r"matches no parameter\nWith \[lora\], only adapters are trained: layers\.attn\.q_proj\.a, .*\.magnitude"
        )
        with pytest.raises(UserError, match=message):
            build_components(recipe(lora_run(tmp_path, base, **change)), one_device())


def test_an_adapter_of_another_form_is_refused(base: Path, straight: tuple[Path, Any], tmp_path: Path):
    def table(**lora: Any) -> dict[str, Any]:
        return lora_run(tmp_path, base, LORA | lora, init=str(straight[0]))

    message = (
        r"an adapter with ranks \(4, 2, 4\), alphas 8 for layers\.attn\.q_proj, and \[lora\] has ranks \(5, 2, 5\)"
    )
    with pytest.raises(UserError, match=message):
        start_of(table(rank=5))
    with pytest.raises(UserError, match=r"an adapter with dora = True, and .*\n.*camelid convert ADAPTER MODEL"):
        start_of(table(kind="lora"))
    with pytest.raises(UserError, match=r"has no step and no moments of AdamW for an adapter"):
        start_of(lora_run(tmp_path, base, init_optimizer=True))


def test_the_command_tells_what_is_trained_and_what_can_be_done_next(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The base is held in bfloat16, and the adapter in float32."""
    on_one_device(monkeypatch)
    lora = {"targets": ["q_proj"], "rank": 2, "merge": True}
    table = lora_run(tmp_path, base, lora, compute__dtype="bfloat16", train__steps=1, train__freeze=["layers.0"])
    result = called("train", write_recipe_file(table, tmp_path / "recipe.toml"))
    assert result.returncode == 0, result.stderr
    count = (CONFIG.num_layers - 1) * 2 * (CONFIG.embed_dim + CONFIG.num_heads * CONFIG.head_dim)
    assert f"trains {count} parameters" in result.stderr
    assert "adapters for q_proj; the others stay as they are, in bfloat16; train.freeze keeps layers.0" in result.stderr
    folder = tmp_path / "run"
    assert f"adapter {folder / 'adapter'}   model {folder / 'model'}" in result.stderr
    assert f'camelid generate {folder}/model "Hello"' in result.stderr
    assert "camelid convert" not in result.stderr
    for file, dtype in (("adapter/adapter_model", "float32"), ("model/model", "bfloat16")):
        assert {dtype} == {array.dtype.name for array in load_file(folder / f"{file}.safetensors").values()}


# What is written again, and what starts after a change -----------------------------------------


def test_a_finished_run_writes_an_adapter_that_is_missing_from_its_last_state(
    base: Path, straight: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    on_one_device(monkeypatch)
    folder = tmp_path / "run"
    shutil.copytree(straight[0], folder)
    (folder / "adapter" / "adapter_config.json").unlink()
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    outcome = run(recipe(shared_run(straight[0].parent, base, run=str(folder))))
    assert outcome.saved == (folder / "adapter", folder / "model")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / "adapter" / file).read_bytes() == (straight[0] / "adapter" / file).read_bytes()


def test_the_files_of_an_adapter_that_was_never_trained_do_not_stay_in_a_run_of_all_parameters(tmp_path: Path):
    table = tiny_run(tmp_path)
    folder = Path(table["run"])
    folder.mkdir()
    (folder / "lora.json").write_text("{}")
    record(folder, recipe(table), {}, {})
    assert not (folder / "lora.json").exists()


def test_another_optimizer_is_refused_and_a_moving_average_starts_anew(
    base: Path, straight: tuple[Path, Any], tmp_path: Path
):
    continued = {"init": str(straight[0] / "checkpoints" / "4"), "init_optimizer": True, "train__steps": 9}
    state = start_of(lora_run(tmp_path, base, ema={"decay": 0.9}, **continued)).state
    assert int(state.step) == 4
    for average, trained in zip(jax.tree.leaves(state.ema), jax.tree.leaves(state.trainable), strict=True):
        np.testing.assert_array_equal(average, trained)
    with pytest.raises(UserError, match=r"init_optimizer = true: .*\n.*leave out init_optimizer"):
        start_of(lora_run(tmp_path, base, optimizer__name="lion", **continued))


def test_a_run_that_continued_an_adapter_resumes_without_it(base: Path, straight: tuple[Path, Any], tmp_path: Path):
    table = lora_run(tmp_path, base, init=str(tmp_path / "gone"), run=str(tmp_path / "run"), train__steps=9)
    shutil.copytree(straight[0], tmp_path / "run")
    components = build_components(recipe(table), one_device(), started=True)
    assert components.source is not None
    assert components.source.folder == base.resolve()


def test_an_adapter_with_nan_is_refused(base: Path, straight: tuple[Path, Any], tmp_path: Path):
    shutil.copytree(straight[0] / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    arrays = load_file(file)
    next(iter(arrays.values()))[0, 0] = np.nan
    save_file(arrays, file)
    with pytest.raises(UserError, match=r"init = .* has infinite or NaN values"):
        start_of(lora_run(tmp_path, base, init=str(tmp_path / "adapter")))


def test_a_run_resumes_after_its_base_was_moved_and_names_the_new_place(
    base: Path, straight: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    on_one_device(monkeypatch)
    shutil.copytree(base, tmp_path / "moved")
    shutil.copytree(straight[0], tmp_path / "run")
    about = json.loads((tmp_path / "run" / "lora.json").read_text())
    (tmp_path / "run" / "lora.json").write_text(json.dumps(about | {"base": str(tmp_path / "gone")}))
    shutil.rmtree(tmp_path / "run" / "adapter")  # so that it is written again
    run(recipe(shared_run(straight[0].parent, tmp_path / "moved", run=str(tmp_path / "run"))))
    assert json.loads((tmp_path / "run" / "lora.json").read_text())["base"] == str(tmp_path / "moved")
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "moved"
    )
