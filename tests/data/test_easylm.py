"""EasyLM's own batches out of a recipe: rows that run across documents, and around, in the order of the file."""

import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from camelid.data.rows.loader import Loader
from camelid.runs.recipe import structure
from camelid.text.tokenizer import load_tokenizer


def test_the_six_batches_of_easylms_run_are_the_recipes(
    assets: Path, stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CAMELID_CACHE", str(tmp_path / "cache"))
    golden = json.loads((assets / "golden/easylm/training_run.json").read_text())
    told, file = golden["data"], assets / "golden/easylm/train.jsonl"
    rows, length, steps = told["batch_size"], told["seq_length"], 2 * len(golden["steps"])  # which read the file twice
    data = {
        "train": [{"files": str(file), "kind": "fields", "fields": told["fields"]}],
        "sequence_length": length,
        "batch_size": rows,
        "shuffle": False,
        "cross_documents": True,
    }
    recipe = structure({"run": "r", "init": "m", "data": data, "train": {"steps": steps}})
    loader = Loader(recipe.data, load_tokenizer(stories))

    # Its own rules (training_run.json), on the library that it used.
    model = sentencepiece.SentencePieceProcessor(model_file=str(stories / "tokenizer.model"))
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    once = [[model.bos_id(), *model.encode(text), model.eos_id()] for text in texts]
    size = steps * rows * length + 1
    stream = np.resize([token for ids in once for token in ids], size)
    weights = np.resize([float(i > 0) for ids in once for i, _ in enumerate(ids)], size)
    assert size > sum(map(len, once))  # it is read more than once

    for step in range(steps):
        at, batch = step * rows * length, loader.batch(step)
        for name, expected in (("tokens", stream[:-1]), ("targets", stream[1:]), ("weights", weights[1:])):
            found = getattr(batch, name)
            assert found.tolist() == expected[at : at + rows * length].reshape(rows, length).tolist(), (step, name)
        assert (batch.positions == np.arange(length)).all()
        assert (batch.segments == 1).all()
