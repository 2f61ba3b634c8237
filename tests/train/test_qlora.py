"""A run whose frozen base is quantized."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import camelid
import camelid.runs.run
from camelid.errors import UserError
from camelid.model.params import named
from camelid.model.weights import NF4, Adapted
from camelid.parallel.mesh import MeshConfig, make_mesh, one_device
from camelid.runs.run import Outcome, run
from camelid.train.loggers import read_metrics
from runs import recipe, stories_run

pytestmark = pytest.mark.quick_compile


def losses(outcome: Outcome) -> list[float]:
    rows = read_metrics(outcome.folder / "metrics.jsonl")
    return [row["validation_loss"] for row in rows if "validation_loss" in row]


def test_a_base_in_nf4_on_a_mesh_learns_what_a_base_in_float32_learns(
    assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On a real model of 260,000 parameters, which 4 bits harm more than larger ones."""
    instructions = str(assets / "data" / "instruct" / "rasbt-instruction-data.json")
    fields = {
        "data": {
            "train": [{"files": [instructions], "kind": "fields", "fields": "[instruction+input],output,<|eos|>"}],
            "validation_fraction": 0.05,
            "sequence_length": 160,
            "batch_size": 8,
            "packing": "none",
            "overlong": "truncate",
        },
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 3},
    }
    monkeypatch.setattr(camelid.runs.run, "make_mesh", lambda config: one_device())
    plain = run(recipe(stories_run(tmp_path / "plain", assets, lora={"rank": 16}, **fields)))
    monkeypatch.setattr(camelid.runs.run, "make_mesh", lambda config: make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    lora = {"rank": 16, "base": "nf4", "merge": True}
    quantized = run(recipe(stories_run(tmp_path / "nf4", assets, lora=lora, **fields)))

    reference, ours = losses(plain), losses(quantized)
    assert reference[0] > 1.2 * reference[1], "nothing is learned"
    np.testing.assert_allclose(ours[1], reference[1], rtol=0.02)
    assert 0.001 < ours[0] / reference[0] - 1 < 0.05, "the base is not quantized, or badly"
    adapted = [leaf for leaf in named(quantized.model.params).values() if isinstance(leaf, Adapted)]
    assert len(adapted) == 7
    assert all(isinstance(leaf.base, NF4) for leaf in adapted)
    assert quantized.model.params.embed.dtype == jnp.bfloat16

    tokens = [[1, 50, 60, 70, 80]]
    trained = np.asarray(quantized.model.logits(tokens))
    # The merged matrices are rounded to bfloat16; the folder of the run opens the base that it was given.
    merged, attached = (np.asarray(camelid.load(quantized.folder / name).logits(tokens)) for name in ("model", "."))
    np.testing.assert_allclose(merged, trained, rtol=0, atol=0.02 * np.abs(trained).max())
    assert np.abs(attached - trained).max() < 0.2 * np.abs(trained).max()


def test_a_form_of_the_base_that_does_not_exist_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"lora\.base.*int4"):
        recipe(stories_run(tmp_path, tmp_path, lora={"base": "int4"}))
