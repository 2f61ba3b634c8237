import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import camelid
from camelid.data.config import DataConfig, Source, Stage
from camelid.errors import UserError

SOURCE = Source(files=("a.txt",))
GOOD = {"train": (SOURCE,), "sequence_length": 8, "batch_size": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": ()}, "train names no file"),
        ({"validation": (SOURCE,), "validation_fraction": 0.1}, "both validation files and validation_fraction = 0.1"),
        ({"validation_fraction": 1.0}, "validation_fraction = 1.0"),
        ({"validation_fraction": -0.1}, "validation_fraction = -0.1"),
        ({"sequence_length": 0}, "sequence_length = 0"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**32}, "seed = 4294967296"),
        ({"workers": -1}, "workers = -1"),
        ({"prepare_workers": 0}, "prepare_workers = 0"),
        ({"packing": "best_fit", "cross_documents": True}, "cross_documents does not apply to packing = 'best_fit'"),
        ({"overlong": "drop"}, "overlong = 'drop' does not apply to packing = 'stream'"),
        ({"train": (SOURCE, replace(SOURCE, weight=1.0))}, "some sources have a weight and others do not"),
        ({"train": (replace(SOURCE, weight=0.0),)}, r"weights \[0\.0\]"),
        ({"train": (replace(SOURCE, weight=1e308),) * 2}, r"weights \[1e\+308, 1e\+308\]"),
        ({"stages": (Stage(first_step=5, weights=(1.0, 1.0)),)}, "from step 5 has 2 weights for 1 sources"),
        ({"stages": (Stage(first_step=5, weights=(1.0,)),) * 2}, r"stages start at steps \[5, 5\]"),
    ],
)
def test_an_impossible_configuration_is_refused(change: dict, message: str):
    DataConfig(**GOOD)
    with pytest.raises(UserError, match=message):
        DataConfig(**GOOD | change)


@pytest.mark.parametrize("share", [1.0, -0.1])
def test_a_share_of_all_is_refused_as_the_advice_says(share: float):
    with pytest.raises(UserError, match=f"max_unreadable = {share}\nChoose a fraction from 0 to below 1"):
        Source(files=("a.txt",), max_unreadable=share)
    with pytest.raises(UserError, match=f"validation_fraction = {share}\nChoose a fraction from 0 to below 1"):
        DataConfig(train=(SOURCE,), sequence_length=8, batch_size=2, validation_fraction=share)


@pytest.mark.parametrize("weight", [-3.0, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_named(weight: float):
    with pytest.raises(UserError, match=f"^weight = {weight}\n"):
        Source(files=("a.txt",), weight=weight)


@pytest.mark.parametrize("weights", [(-1.0, 2.0), (0.0, 0.0), (float("nan"), 1.0), (float("inf"), 1.0)])
def test_weights_of_a_stage_that_are_none_are_named(weights: tuple[float, ...]):
    with pytest.raises(UserError, match=r"weights \[.*, .*\]"):
        Stage(first_step=5, weights=weights)


@pytest.mark.parametrize(
    ("source", "prompts"),
    [
        ({}, False),
        ({"kind": "tokens"}, False),
        ({"kind": "chat"}, True),
        ({"kind": "chat", "loss": "all"}, True),
        ({"kind": "instruct"}, True),
        ({"kind": "preference"}, True),
        ({"kind": "gsm8k"}, True),
        ({"kind": "fields", "fields": "[question],answer"}, True),
        ({"kind": "fields", "fields_from_example": "template"}, True),
        ({"kind": "fields", "fields": "title,body"}, False),
    ],
)
def test_sources_with_prompts_are_packed_whole_unless_the_recipe_says_otherwise(source: dict, prompts: bool):
    text, given = Source(files=("b",)), Source(files=("a",), **source)
    sizes = {"sequence_length": 8, "batch_size": 2}
    default = "best_fit" if prompts else "stream"
    assert DataConfig(train=(given,), **sizes).packing_method == default
    assert DataConfig(train=(text, given), **sizes).packing_method == default, "one way for all rows of a mixture"
    assert DataConfig(train=(text,), validation=(given,), **sizes).packing_method == "stream"
    assert DataConfig(train=(given,), cross_documents=True, **sizes).packing_method == "stream"
    for packing in ("stream", "best_fit", "none"):
        assert DataConfig(train=(given,), packing=packing, **sizes).packing_method == packing
    if prompts:
        assert DataConfig(train=(given,), overlong="drop", **sizes).overlong == "drop"


def test_declaring_a_configuration_loads_no_numpy():
    code = "import sys, camelid.data.config; sys.exit('numpy' in sys.modules)"
    source = str(Path(camelid.__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": source}, check=False).returncode == 0
