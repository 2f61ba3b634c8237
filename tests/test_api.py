"""What camelid.load returns, as Python users see it; tests/checkpoint has the files, tests/generate the tokens."""

import pickle
from pathlib import Path

import jax
import numpy as np
import pytest

import camelid
from text.tiny import BOS, VOCAB_SIZE, save_byte_tokenizer
from tiny import save_hf, tiny_config, tiny_params, tiny_tokens, transformers_twin

CONFIG = tiny_config(vocab_size=VOCAB_SIZE, bos_id=BOS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = save_hf(transformers_twin(CONFIG, tiny_params(CONFIG)), tmp_path_factory.mktemp("model"))
    return save_byte_tokenizer(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> camelid.Model:
    return camelid.load(folder)


@pytest.fixture(scope="module")
def free(model: camelid.Model) -> list[camelid.Completion]:
    """Sampled without an end: no id of the tiny model's is EOS but by chance."""
    return model.generate(["ab", "the red camel"], max_new_tokens=20, temperature=0.7, seed=4)


def test_one_text_and_a_list_and_ids_are_prompts(model: camelid.Model, free):
    ids = [BOS, *b"ab"]
    for prompt in ("ab", ["ab"], [ids]):
        (alone,) = model.generate(prompt, max_new_tokens=20, temperature=0.7, seed=4)
        assert alone == free[0]
    assert free[0].prompt == "ab"


def test_row_i_draws_with_seed_plus_i(model: camelid.Model, free):
    (second,) = model.generate("the red camel", max_new_tokens=20, temperature=0.7, seed=5)
    assert second == free[1]


def test_the_text_is_that_of_the_tokens(model: camelid.Model, free):
    for completion in free:
        assert completion.text == bytes(token for token in completion.tokens if token < 256).decode(errors="replace")


def test_the_finish_reason_says_who_ended_the_text(folder: Path, model: camelid.Model, free, monkeypatch):
    tokens = free[1].tokens
    assert (len(tokens), free[1].finish_reason) == (20, "length")
    end = max(tokens, key=tokens.index)
    monkeypatch.setitem(vars(model.tokenizer), "eos_ids", (end,))
    (stopped,) = model.generate("the red camel", max_new_tokens=20, temperature=0.7, seed=5)
    assert (stopped.tokens, stopped.finish_reason) == (tokens[: tokens.index(end)], "stop")
    (short,) = model.generate("the red camel", max_new_tokens=tokens.index(end), temperature=0.7, seed=5)
    assert (short.tokens, short.finish_reason) == (stopped.tokens, "length")


def test_logits_take_numpy_and_jax_arrays_of_any_integers(model: camelid.Model):
    tokens = tiny_tokens(CONFIG, 2, 7)
    logits = model.logits(tokens)
    assert (logits.shape, logits.dtype) == ((2, 7, VOCAB_SIZE), np.float32)
    for same in (tokens.astype(np.int64), jax.numpy.asarray(tokens)):
        np.testing.assert_array_equal(model.logits(same), logits)


def test_without_a_tokenizer_ids_work_and_text_is_refused(tmp_path: Path, folder: Path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    bare = camelid.load(tmp_path)
    (completion,) = bare.generate([[BOS, *b"ab"]], max_new_tokens=20)
    assert len(completion.tokens) == 20
    with pytest.raises(camelid.UserError, match="no tokenizer"):
        bare.generate("ab")


def test_every_public_name_is_there():
    assert {name for name in dir(camelid) if getattr(camelid, name)} == {*camelid.__all__, "__version__"}
    with pytest.raises(AttributeError, match="nothing"):
        camelid.nothing  # noqa: B018


def test_a_user_error_comes_out_of_another_process_as_it_was():
    error = pickle.loads(pickle.dumps(camelid.UserError("a problem", "a way out")))
    assert (type(error), error.problem, error.advice, str(error)) == (
        camelid.UserError,
        "a problem",
        "a way out",
        "a problem\na way out",
    )
