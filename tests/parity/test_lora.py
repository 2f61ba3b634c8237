"""LoRA compared with PEFT: the same adapters, logits, gradients and training, in both directions."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

import camelid
import camelid.runs.run
from camelid.checkpoint.adapters.peft import adapter_files, open_adapter
from camelid.checkpoint.adapters.trained import plan_of, to_adapter, to_arrays
from camelid.checkpoint.files import write_files
from camelid.model.adapters import declare_adapters, freeze, initialize_adapters
from camelid.model.config import ComputeConfig, ModelConfig
from camelid.model.context import Context, dropout
from camelid.model.decoder import Decoder
from camelid.model.params import named
from camelid.model.pytree import path_name
from camelid.model.weights import Adapted, einsum
from camelid.parallel.mesh import one_device
from camelid.runs.components import build_components
from camelid.runs.lora_targets import plan_adapters
from camelid.runs.run import run
from camelid.train.loggers import read_metrics
from camelid.train.lora_config import LoRAConfig
from camelid.train.trainable import combine
from runs import recipe, stories_run
from tiny import save_hf, tiny_config, tiny_params, tiny_tokens, transformers_twin

# PEFT speaks of heads that are tied, and calls deprecated functions of transformers.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
LLAMA, TIED = tiny_config(num_layers=2), tiny_config(num_layers=2, tie_embeddings=True)
ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
PATTERNS = {"rank_pattern": {r"layers\.1\..*q_proj": 5, "down_proj": 2}, "alpha_pattern": {"up_proj": 7}}
# The table of a recipe, and PEFT's settings.
CASES: dict[str, tuple[ModelConfig, dict[str, Any], dict[str, Any]]] = {
    "LoRA, ranks and alphas by pattern": (LLAMA, PATTERNS, {"target_modules": ATTENTION + MLP, **PATTERNS}),
    "rsLoRA, with table and head": (
        LLAMA,
        {"targets": ["mlp", "embed", "lm_head"], "rank_stabilized": True},
        {"target_modules": [*MLP, "embed_tokens", "lm_head"], "use_rslora": True},
    ),
    "DoRA": (
        LLAMA,
        {"targets": ["attention", r"layers\.1\..*up_proj", "lm_head"], "kind": "dora"},
        {"target_modules": [*ATTENTION, "model.layers.1.mlp.up_proj", "lm_head"], "use_dora": True},
    ),
    "tied table and head": (
        TIED,
        {"targets": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ),
}
CLOSE = 1e-5


@partial(jax.jit, static_argnames="config")
def logits_loss_gradients(trainable: Any, frozen: Any, tokens: jax.Array, config: ModelConfig):
    """The logits, and the gradients of the mean cross-entropy of the next tokens."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def loss(trainable: Any) -> tuple[jax.Array, jax.Array]:
        params: Decoder = combine(trainable, frozen)
        x, _ = params.hidden(tokens, positions, None, config, ComputeConfig())
        targets, weights = jnp.roll(tokens, -1, 1), jnp.ones(tokens.shape).at[:, -1].set(0)
        total = params.loss(x, targets, weights, config).loss
        return total / weights.sum(), params.logits(x, config, ComputeConfig())

    return jax.value_and_grad(loss, has_aux=True)(trainable)


def peft_model(base: Path, **settings: Any) -> Any:
    """PEFT's model of a base, every number of the adapter drawn."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32", attn_implementation="eager")
    lora = peft.LoraConfig(**{"r": 3, "lora_alpha": 12, "task_type": "CAUSAL_LM"} | settings)
    model = peft.get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + torch.rand(parameter.shape) / 5)
            elif parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) / 5)
    return model


def assert_close(ours: Any, theirs: torch.Tensor, what: str) -> None:
    theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE * np.abs(theirs).max(), err_msg=what)


@partial(jax.jit, static_argnames="config")
def logits_of(trainable: Any, frozen: Any, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    params: Decoder = combine(trainable, frozen)
    return params(tokens, positions, None, config, ComputeConfig())[0]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_the_gradient_of_every_adapter_are_those_of_peft(case: str, tmp_path: Path):
    config, table, settings = CASES[case]
    base = save_hf(transformers_twin(config, tiny_params(config)), tmp_path / "base")
    theirs = peft_model(base, **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    adapter = open_adapter(tmp_path / "theirs", config)
    lora = LoRAConfig(
        **{"rank": 3, "alpha": 12.0, **table, "targets": tuple(table.get("targets", ("attention", "mlp")))}
    )
    plan = plan_adapters(lora, config)
    assert plan == plan_of(adapter), "the recipe and PEFT's settings mean the same modules, ranks and scales"

    arrays, specs = to_arrays(adapter, plan, config), declare_adapters(plan, config)
    trainable = jax.tree.map_with_path(lambda path, spec: jnp.asarray(arrays[path_name(path)]), specs)
    frozen = freeze(tiny_params(config), plan, config)
    tokens = tiny_tokens(config, 2, 9)
    (loss, logits), gradients = logits_loss_gradients(trainable, frozen, jnp.asarray(tokens), config)
    expected = theirs(torch.from_numpy(tokens).long(), labels=torch.from_numpy(tokens).long())
    expected.loss.backward()
    assert_close(logits, expected.logits, "logits")
    assert_close(loss, expected.loss, "loss")
    # The gradients in PEFT's form, under PEFT's names.
    held = {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(gradients)}
    write(tmp_path / "gradients", to_adapter(plan, held, config, None))
    ours = open_raw(tmp_path / "gradients")
    found = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    found = {name.removesuffix(".weight") if "magnitude" in name else name: grad for name, grad in found.items()}
    assert ours.keys() == found.keys()
    for name, gradient in found.items():
        assert_close(ours[name], gradient, name)

    # The other way: what camelid writes is the adapter that PEFT has, and PEFT loads it.
    write(tmp_path / "ours", to_adapter(plan, arrays, config, str(base)))
    fresh = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="float32", attn_implementation="eager")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "ours").eval()
    with torch.no_grad():
        assert_close(logits, loaded(torch.from_numpy(tokens).long()).logits, "logits of what camelid wrote")
    merged = camelid.load(tmp_path / "ours").logits(tokens)
    np.testing.assert_allclose(merged, logits, rtol=0, atol=CLOSE * np.abs(logits).max())


def write(folder: Path, adapter: Any) -> None:
    folder.mkdir()
    write_files(folder, adapter_files(adapter))


def open_raw(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_new_adapters_are_drawn_as_in_peft_and_leave_the_base_as_it_is(kind: Any):
    targets = ("q_proj", "down_proj", "lm_head", *(["embed"] if kind == "lora" else []))
    plan = plan_adapters(LoRAConfig(rank=8, targets=targets, kind=kind), LLAMA)
    params = tiny_params(LLAMA)
    new = initialize_adapters(plan, LLAMA, jax.random.key(0), params)
    frozen, tokens = freeze(params, plan, LLAMA), jnp.asarray(tiny_tokens(LLAMA, 2, 9))
    ours, reference = logits_of(new, frozen, tokens, LLAMA), logits_of(params, None, tokens, LLAMA)
    np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-6 * np.abs(reference).max())
    for path, inputs in (("layers.attn.q_proj", 48), ("layers.mlp.down_proj", 80), ("lm_head", 48)):
        layer = peft.tuners.lora.Linear(torch.nn.Linear(inputs, 10), "x", config=peft.LoraConfig(r=8), r=8)
        a, theirs = np.asarray(named(new)[path].a), layer.lora_A["x"].weight.detach().numpy()
        bound = 1 / np.sqrt(inputs)
        assert 0.95 * bound < np.abs(a).max() <= bound
        assert 0.95 * bound < np.abs(theirs).max() <= bound
        # Of n uniform values the variance is off by some 2 / sqrt(n) of itself.
        assert abs(a.var() / (bound**2 / 3) - 1) < 4 * 2 / np.sqrt(a.size)
        assert not named(new)[path].b.any()
    if kind == "lora":
        assert abs(np.asarray(new.embed.a).std() - 1) < 4 / np.sqrt(new.embed.a.size)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_inputs_are_dropped_where_peft_drops_them(kind: str):
    """In front of the factors; with DoRA also in front of the base, for the part that the magnitude adds."""
    draw = np.random.default_rng(0)
    layer = torch.nn.Linear(12, 20, bias=False)
    settings = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["only"], use_dora=kind == "dora", lora_dropout=0.3)
    theirs = peft.get_peft_model(torch.nn.ModuleDict({"only": layer}), settings).base_model.model["only"]  # pyright: ignore
    with torch.no_grad():
        theirs.lora_B["default"].weight.normal_()
        if kind == "dora":
            theirs.lora_magnitude_vector["default"].weight.mul_(1.5)
    context = Context("training", adapter_dropout=0.3, dropout_key=jax.random.key(4), rows=jnp.arange(2)).at("q_proj")
    x = draw.standard_normal((2, 7, 12), np.float32)
    dropped = np.array(dropout(jnp.asarray(x), 0.3, "adapter of q_proj", context))
    assert 0.1 < np.mean(dropped == 0) < 0.5

    class SameMask(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(dropped)

    theirs.lora_dropout["default"] = SameMask()
    factors = [theirs.base_layer.weight, theirs.lora_A["default"].weight, theirs.lora_B["default"].weight]
    factors += [theirs.lora_magnitude_vector["default"].weight] if kind == "dora" else []
    base, a, b, *magnitude = (jnp.asarray(tensor.detach().numpy()) for tensor in factors)
    weight = Adapted(base, a, b, jnp.float32(7 / 3), *magnitude)
    ours = einsum("BSE,ME->BSM", jnp.asarray(x), weight, context)
    assert_close(ours, theirs.train()(torch.from_numpy(x)), kind)
    other = einsum("BSE,ME->BSM", jnp.asarray(x), weight, context.at("k_proj"))
    assert np.abs(ours - other).max() > 0.1, "queries and keys drop the same inputs"


# Training a real model -------------------------------------------------------------------------


def test_a_real_model_finetuned_on_instructions_learns_what_peft_learns(
    assets: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())
    instructions = str(assets / "data" / "instruct" / "rasbt-instruction-data.json")
    data = {
        "train": [{"files": [instructions], "kind": "fields", "fields": "[instruction+input],output,<|eos|>"}],
        "validation_fraction": 0.02,
        "sequence_length": 128,
        "batch_size": 8,
        "packing": "none",
        "overlong": "truncate",
    }
    optimizer = {"learning_rate": 3e-3, "warmup_steps": 3}
    table = stories_run(tmp_path, assets, data=data, optimizer=optimizer, lora={"rank": 16}, train={"steps": 12})
    described = recipe(table)
    assert described.lora is not None
    outcome = run(described)
    ours = [
        row["validation_loss"] for row in read_metrics(outcome.folder / "metrics.jsonl") if "validation_loss" in row
    ]

    # PEFT starts with the same factors, and gets the same rows, learning rates and clipping.
    components = build_components(described, one_device())
    config, plan = components.config, plan_adapters(described.lora, components.config)
    new = initialize_adapters(plan, config, jax.random.key(described.train.seed), camelid.load(stories).params)
    arrays = {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(new)}
    write(tmp_path / "start", to_adapter(plan, arrays, config, str(stories)))
    model = transformers.AutoModelForCausalLM.from_pretrained(stories, dtype="float32")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "start", is_trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = described.optimizer
    adamw = torch.optim.AdamW(
        trained, betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=settings.weight_decay
    )

    def loss(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, targets, weights = (
            torch.from_numpy(np.asarray(x)) for x in (batch.tokens, batch.targets, batch.weights)
        )
        logits = model(tokens.long()).logits
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.long().flatten(), reduction="none")
        return (each * weights.flatten()).sum(), weights.sum()

    def held_out() -> float:
        assert components.validation is not None
        with torch.no_grad():
            sums = [loss(batch) for batch in components.validation.in_order(8)]
        return float(sum(total for total, _ in sums) / sum(weight for _, weight in sums))

    theirs = [held_out()]
    for step in range(described.train.steps):
        total, weight = loss(components.loader.batch(step))
        adamw.zero_grad()
        (total / weight).backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        adamw.param_groups[0]["lr"] = float(components.step.schedule(step))
        adamw.step()
    theirs.append(held_out())
    assert theirs[0] > theirs[1] * 1.1, "nothing is learned"
    # The same start makes them agree to the rounding of 12 steps.
    np.testing.assert_allclose(ours, theirs, rtol=1e-3)
