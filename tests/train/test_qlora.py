"""Runs whose frozen base is quantized."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import camelid
import camelid.runs.run
from camelid.errors import UserError
from camelid.model.params import named
from camelid.model.weights import NF4, Adapted, Quantized
from camelid.parallel.mesh import MeshConfig, make_mesh, one_device
from camelid.runs.run import run
from camelid.train.loggers import read_metrics
from runs import recipe, stories_run


def losses(folder: Path) -> list[float]:
    return [row["validation_loss"] for row in read_metrics(folder / "metrics.jsonl") if "validation_loss" in row]


@pytest.fixture
def qlora(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Finetunes a real model with a base of the given form on instructions."""
    instructions = str(assets / "data" / "instruct" / "rasbt-instruction-data.json")
    data = {
        "train": [{"files": [instructions], "kind": "fields", "fields": "[instruction+input],output,<|eos|>"}],
        "validation_fraction": 0.05,
        "sequence_length": 160,
        "batch_size": 8,
        "packing": "none",
        "overlong": "truncate",
    }
    optimizer = {"learning_rate": 3e-3, "warmup_steps": 3}

    def finetune(base: str, mesh: MeshConfig | None = None, **lora: Any) -> Any:
        monkeypatch.setattr(
            camelid.runs.run, "make_mesh", lambda config: one_device() if mesh is None else make_mesh(mesh)
        )
        table = stories_run(
            tmp_path / f"{base}-{mesh is None}",
            assets,
            data=data,
            optimizer=optimizer,
            lora={"rank": 16, "base": base, **lora},
            train={"steps": 20},
        )
        return run(recipe(table))

    return finetune


def test_a_quantized_base_learns_what_a_base_in_float32_learns(qlora: Any):
    """NF4 and int8 within 2% of the float32 base, before and after 20 steps; the base is held in few bits."""
    reference = losses(qlora("float32").folder)
    assert reference[0] > 1.1 * reference[1]
    for base, weight_type in (("nf4", NF4), ("int8", Quantized)):
        outcome = qlora(base)
        np.testing.assert_allclose(losses(outcome.folder), reference, rtol=0.02)
        assert losses(outcome.folder) != reference
        layers = {path: leaf for path, leaf in named(outcome.model.params).items() if isinstance(leaf, Adapted)}
        assert len(layers) == 7
        assert all(isinstance(leaf.base, weight_type) for leaf in layers.values())
        assert outcome.model.params.embed.dtype == jax.numpy.bfloat16
        # The adapter is opened with the base that it was given, which is not rounded.
        tokens = [[1, 50, 60, 70, 80]]
        attached, trained = camelid.load(outcome.folder).logits(tokens), outcome.model.logits(tokens)
        assert np.abs(np.asarray(attached) - trained).max() < 0.2 * np.abs(np.asarray(trained)).max()


def test_a_quantized_base_on_a_mesh_and_merged(qlora: Any):
    alone, sharded = qlora("nf4"), qlora("nf4", MeshConfig(data=2, fsdp=2, tensor=2), merge=True)
    np.testing.assert_allclose(losses(sharded.folder), losses(alone.folder), rtol=1e-4)
    tokens = [[1, 50, 60, 70, 80]]
    expected = np.asarray(sharded.model.logits(tokens))
    # The merged matrices are rounded to bfloat16.
    merged = np.asarray(camelid.load(sharded.folder / "model").logits(tokens))
    np.testing.assert_allclose(merged, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_a_form_of_the_base_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"lora.base.*int4"):
        recipe({"run": "x", "init": "y", "lora": {"base": "int4"}, "data": {}, "train": {"steps": 1}})
