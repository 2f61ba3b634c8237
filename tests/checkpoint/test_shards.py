"""Checkpoints of many shards: every number of them leads to every other, in one step, with no bit changed."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

import camelid
from camelid.checkpoint.compare import config_differences
from camelid.checkpoint.convert import convert
from camelid.checkpoint.registry import open_checkpoint
from runs import tensor_bytes


class Form(NamedTuple):
    """A way to cut a checkpoint."""

    format: str
    ways: int
    stages: int = 1

    def __str__(self) -> str:
        return f"{self.format}, {self.ways} x {self.stages}"

    def write(self, source: Path | str, folder: Path) -> Path:
        convert(source, folder, to=self.format, tensor_parallel=self.ways, pipeline_parallel=self.stages)
        assert len([*shard_bytes(folder)]) == self.ways * self.stages
        return folder


def forms(*stages: int) -> list[Form]:
    """Every number of shards, in an order in which each step of STEP changes the ways and mostly all else too."""
    names = ("megatron", "megatron-legacy", "mindspore")
    return [
        *(Form(name, ways, count) for count in stages for name in names for ways in (1, 2, 4)),
        *(Form("meta", ways) for ways in (1, 2, 4)),
    ]


STORIES = "models/stories260K/hf"
MODELS = {  # by folder of the assets: what cuts its layers evenly
    STORIES: forms(1, 5),
    "golden/hf_variants/hf_mha_untied": forms(1, 5),
    "golden/hf_variants/hf_4layer": forms(1, 2, 4),
}
CASES = [*((model, "float32") for model in MODELS), (STORIES, "bfloat16")]
STEP = 8  # of the order above
PAIRS = [
    (model, dtype, first, MODELS[model][(i + STEP) % len(MODELS[model])])
    for model, dtype in CASES
    for i, first in enumerate(MODELS[model])
]


class Cut(NamedTuple):
    """A model in one dtype."""

    source: Path
    forms: dict[Form, Path]
    """it in every form"""


@pytest.fixture(scope="module")
def cut(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Cut]:
    """From a model and a dtype; each is written once."""

    @functools.cache
    def write(model: str, dtype: str) -> Cut:
        folder = tmp_path_factory.mktemp("cut")
        convert(assets / model, folder / "source", dtype=dtype)
        found = {form: form.write(folder / "source", folder / str(i)) for i, form in enumerate(MODELS[model])}
        return Cut(folder / "source", found)

    return write


def shard_bytes(folder: Path) -> dict[str, bytes]:
    files = (file for suffix in ("pt", "pth", "ckpt") for file in folder.rglob(f"*.{suffix}"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if "strategy" not in file.name}


def test_the_pairs_have_every_form_on_either_side_and_change_both_counts_in_one_step():
    for i in (2, 3):
        assert {(*pair[:2], pair[i]) for pair in PAIRS} == {(*case, form) for case in CASES for form in MODELS[case[0]]}
    changes = [(a.ways != b.ways, a.stages != b.stages) for _, _, a, b in PAIRS]
    assert all(ways for ways, _ in changes)
    assert sum(all(change) for change in changes) > len(changes) / 2


@pytest.mark.parametrize(("model", "dtype", "first", "second"), PAIRS, ids=str)
def test_every_number_of_shards_leads_to_every_other_and_back(
    cut: Callable[[str, str], Cut], tmp_path: Path, model: str, dtype: str, first: Form, second: Form
):
    held = cut(model, dtype)
    second.write(held.forms[first], tmp_path / "second")
    # The detour has left nothing: neither in the files nor in what they say.
    assert shard_bytes(tmp_path / "second") == shard_bytes(held.forms[second])
    convert(tmp_path / "second", tmp_path / "back")
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(held.source)
    source = open_checkpoint(held.source)
    for folder in ("second", "back"):
        assert config_differences(source.config, open_checkpoint(tmp_path / folder).config) == {}


@pytest.mark.parametrize(("model", "dtype"), CASES)
def test_shards_compute_what_one_file_does(cut: Callable[[str, str], Cut], model: str, dtype: str):
    held, ids = cut(model, dtype), np.array([[1, 403, 407, 261, 378]])
    whole = camelid.load(held.source).logits(ids)
    stages = max(form.stages for form in held.forms)
    for form in (Form("megatron", 4, stages), Form("mindspore", 4, stages), Form("meta", 4)):
        np.testing.assert_array_equal(camelid.load(held.forms[form]).logits(ids), whole)


def test_bfloat16_is_the_original_rounded_once(assets: Path, tmp_path: Path):
    convert(assets / STORIES, tmp_path / "rounded", dtype="bfloat16")
    original, held = tensor_bytes(assets / STORIES), tensor_bytes(tmp_path / "rounded")
    assert original.keys() == held.keys()
    for name, (dtype, shape, content) in held.items():
        exact = torch.frombuffer(bytearray(original[name][2]), dtype=torch.float32)
        assert (dtype, shape) == ("bfloat16", original[name][1])
        assert content == exact.to(torch.bfloat16).view(torch.int16).numpy().tobytes()
