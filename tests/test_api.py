"""What camelid.load returns, as Python users see it; tests/checkpoint has the files, tests/generate the tokens."""

import dataclasses
import json
import pickle
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

import camelid
from camelid.checkpoint.registry import open_checkpoint
from camelid.evaluate.perplexity import perplexity
from runs import assert_refused, called
from text.tiny import BOS, VOCAB_SIZE, save_byte_tokenizer
from tiny import save_hf, tiny_config, tiny_params, tiny_tokens, transformers_twin

pytestmark = pytest.mark.quick_compile

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
    assert second == dataclasses.replace(free[1], prompt_index=0)


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


# Ids ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def as_users_call(monkeypatch):
    """Without the checks of annotations, which only tests have."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


FLAT = "Give a list of rows"
ROWS_THAT_ARE_NONE: dict[str, tuple[Any, str]] = {
    "above the vocabulary": ([[1, VOCAB_SIZE]], f"has token {VOCAB_SIZE}, and the vocabulary has {VOCAB_SIZE}"),
    "the second row": ([[1, 2], [3, 9999]], "1 has token 9999"),
    "negative": ([[5, -1]], "0 has token -1"),
    "far beyond any array": ([[5, 2**70]], f"0 has token {2**70}"),
    "beyond int64": (np.array([[5, 2**63 + 1]], np.uint64), f"0 has token {2**63 + 1}"),
    "negative in an array": (np.array([[5, -7]], np.int8), "0 has token -7"),
    "a float": ([[1, 2.0]], "0 contains 2.0, which is not a token id"),
    "a float array": (np.ones((1, 3), np.float32), "0 is an array of float32"),
    "a bool": ([[1, True]], "0 contains True"),
    "a bool array": (np.ones((1, 3), bool), "0 is an array of bool"),
    "a text among ids": ([[1, "a"]], "0 contains 'a'"),
    "a numpy bool": ([[1, np.True_]], "0 contains np.True_"),
    "none": ([[1, None]], "0 contains None"),
    "nested too deep": ([[[1, 2]]], "0 contains [1, 2]"),
    "an array of three axes": (np.ones((1, 2, 3), int), "0 is an array of int64 with shape (2, 3)"),
    "a flat list": ([1, 2, 3], f"0 is 1, not a row of token ids\n{FLAT}"),
    "a flat array": (np.arange(3), "0 is an array of int64 with shape ()"),
    "a flat jax array": (jnp.arange(3), "0 is an array of int32 with shape ()"),
    "an empty row": ([[]], "0 is empty"),
    "an empty row after another": ([[1], []], "1 is empty"),
    "an empty array": (np.ones((2, 0), int), "0 is empty"),
    "a number": (7, FLAT),
    "nothing": (None, FLAT),
}


@pytest.mark.parametrize(("ids", "message"), ROWS_THAT_ARE_NONE.values(), ids=ROWS_THAT_ARE_NONE)
def test_ids_that_are_none_are_refused_everywhere(model: camelid.Model, ids, message: str, as_users_call):
    for call in (model.logits, model.generate):
        with pytest.raises(camelid.UserError, match=re.escape(message)):
            call(ids)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2], [3]], "the rows have different lengths, from 1 to 2 tokens"),
        ([], "there are no token ids"),
        (np.ones((0, 5), int), "there are no token ids"),
        ([[1] * 65], "a row has 65 tokens, more than the context of 64\nGive at most 64 tokens a row."),
        ("ab", "'ab' is not a batch of token ids"),
        (["ab"], "row 0 is 'ab', not a row of token ids"),
    ],
)
def test_batches_that_have_no_logits_are_refused(model: camelid.Model, ids, message: str, as_users_call):
    with pytest.raises(camelid.UserError, match=re.escape(message)):
        model.logits(ids)


DTYPES = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_of_any_integer_dtype_are_the_same_ids(model: camelid.Model, dtype: str, as_users_call):
    ids = np.array([[7, 100, 3]])
    logits, (completion,) = model.logits(ids.tolist()), model.generate(ids.tolist(), max_new_tokens=3)
    for same in (ids.astype(dtype), list(ids[0].astype(dtype)), jnp.asarray(ids.astype(dtype))):
        rows = [same] if isinstance(same, list) else same
        np.testing.assert_array_equal(model.logits(rows), logits)
        assert model.generate(rows, max_new_tokens=3) == [completion]


def test_ids_of_other_libraries_are_the_same_ids(model: camelid.Model, as_users_call):
    logits = model.logits([[7, 1, 3]])
    for same in (torch.tensor([[7, 1, 3]]), [torch.tensor([7, 1, 3])], np.array([[7, 1, 3]], ml_dtypes.int4)):
        np.testing.assert_array_equal(model.logits(same), logits)


def test_a_jit_around_logits_is_refused(model: camelid.Model):
    with pytest.raises(camelid.UserError, match=r"Call this function outside jax\.jit"):
        jax.jit(model.logits)(tiny_tokens(CONFIG, 2, 7))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, -1], "the text has token -1"),
        ([1.0, 2.0], "the text contains 1.0"),
        ([[1, 2]], "the text contains [1, 2]"),
        (np.ones(5, bool), "the text is an array of bool"),
        ([], "the text has no token"),
    ],
)
def test_ids_that_cannot_be_scored_are_refused(model: camelid.Model, ids, message: str, as_users_call):
    with pytest.raises(camelid.UserError, match=re.escape(message)):
        perplexity(model.params, ids, 1, 8, model.config, model.compute, model.mesh)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5 is not a whole number"),
        ({"max_new_tokens": "2"}, "max_new_tokens = '2' is not a whole number"),
        ({"seed": 0.5}, "seed = 0.5 is not a whole number"),
        ({"temperature": 1.0, "top_k": 5.0}, "top_k = 5.0 is not a whole number"),
    ],
)
def test_numbers_that_are_not_whole_are_refused(model: camelid.Model, options, message: str, as_users_call):
    with pytest.raises(camelid.UserError, match=re.escape(message)):
        model.generate("ab", **options)


def test_the_advice_on_room_can_be_followed(model: camelid.Model):
    ids = [1] * 60
    with pytest.raises(camelid.UserError, match="request at most 4 new tokens"):
        model.generate([ids], max_new_tokens=5)
    assert len(model.generate([ids], max_new_tokens=4)[0].tokens) <= 4
    with pytest.raises(camelid.UserError, match="no room for new ones in the context of 64") as refused:
        model.generate([[1] * 64])
    assert refused.value.advice == "Shorten the prompt to at most 63 tokens."
    with pytest.raises(camelid.UserError, match="at most 1 new token\\."):
        model.generate([[1] * 63], max_new_tokens=2)


# A vocabulary with ids that have no token ---------------------------------------------------------------------------


def changed(folder: Path, destination: Path, change, **config: Any) -> Path:
    """A copy of a checkpoint whose tensors went through `change`."""
    destination.mkdir()
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            (destination / file.name).symlink_to(file)
    about = json.loads((folder / "config.json").read_text()) | config
    (destination / "config.json").write_text(json.dumps(about))
    save_file(change(load_file(folder / "model.safetensors")), destination / "model.safetensors", {"format": "pt"})
    return destination


@pytest.fixture(scope="module")
def padded(folder: Path, tmp_path_factory) -> Path:
    """64 rows more than the tokenizer has tokens, which the model likes best of all."""

    def pad(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        head, embed = tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]
        more = np.concatenate([20 * head[:32], -20 * head[:32]])
        return tensors | {
            "lm_head.weight": np.concatenate([head, more]),
            "model.embed_tokens.weight": np.concatenate([embed, embed[:64]]),
        }

    return changed(folder, tmp_path_factory.mktemp("padded") / "model", pad, vocab_size=VOCAB_SIZE + 64)


PROMPTS = ["ab", "the red camel", "xyz"]


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_ids_without_a_token_are_never_drawn(padded: Path, model: camelid.Model, temperature: float):
    wide = camelid.load(padded)
    best = np.asarray(wide.logits([[1, 2, 3]])).argmax(-1)
    assert (best >= VOCAB_SIZE).all(), "the padding is what would be drawn"
    found = wide.generate(PROMPTS, max_new_tokens=40, temperature=temperature)
    for completion in found:
        assert completion.tokens
        assert max(completion.tokens) < VOCAB_SIZE
        assert completion.text == wide.tokenizer.decode(completion.tokens)
    if not temperature:
        # Among the ids that are left, the choice is what it is without the padding.
        assert [each.tokens for each in found] == [each.tokens for each in model.generate(PROMPTS, max_new_tokens=40)]


def test_the_command_line_draws_and_scores_like_python(padded: Path, tmp_path: Path):
    wide = camelid.load(padded)
    texts = [completion.text for completion in wide.generate(PROMPTS, max_new_tokens=20, temperature=2.0)]
    done = called("generate", padded, *PROMPTS, "--max-new-tokens", 20, "--temperature", 2.0, "--json")
    assert [each["text"] for each in json.loads(done.stdout)["completions"]] == texts
    text = tmp_path / "text.txt"
    text.write_text("the red camel is not blue")
    scored = json.loads(called("evaluate", "perplexity", padded, text, "--json").stdout)
    ids = wide.tokenizer.encode(text.read_text(), bos=False)
    logits = np.asarray(wide.logits([ids[:-1]])[0], np.float64)
    losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]
    assert scored["loss"] == pytest.approx(losses.mean(), rel=1e-5)  # of the whole vocabulary, as elsewhere


def test_a_gap_between_tokens_is_never_drawn(padded: Path, monkeypatch):
    wide = camelid.load(padded)
    has = frozenset(range(0, VOCAB_SIZE, 3))
    monkeypatch.setattr(wide.tokenizer.backend, "token_ids", has)
    found = wide.generate([[1, 2]] * 5, max_new_tokens=20, temperature=3.0)
    drawn = {token for completion in found for token in completion.tokens}
    assert drawn <= has | set(wide.tokenizer.eos_ids)


def test_an_end_that_has_no_token_still_ends_a_text(padded: Path, monkeypatch):
    """Models end turns with ids that their tokenizer may not know."""
    wide = camelid.load(padded)
    (first,) = wide.logits([[1, 2, 3]])[0, -1:].argmax(-1)
    assert first >= VOCAB_SIZE
    monkeypatch.setitem(vars(wide.tokenizer), "eos_ids", (int(first),))
    (completion,) = wide.generate([[1, 2, 3]], max_new_tokens=5)
    assert (completion.tokens, completion.finish_reason) == ([], "stop")


def test_a_prompt_with_an_id_that_has_no_token_is_refused_before_anything_is_computed(padded: Path):
    with pytest.raises(camelid.UserError, match=f"token id {VOCAB_SIZE + 3} is outside the tokenizer's vocabulary"):
        camelid.load(padded).generate([[1, 2], [1, VOCAB_SIZE + 3]])


# Weights and results that are not finite ----------------------------------------------------------------------------


def broken(folder: Path, destination: Path, name: str, value: float, index: Any = ...) -> Path:
    def spoil(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        tensors[name][index] = value
        return tensors

    return changed(folder, destination, spoil)


@pytest.mark.parametrize(
    ("name", "value", "parameter"),
    [
        ("model.layers.2.mlp.up_proj.weight", np.nan, "layers.mlp.up_proj of layer 2"),
        ("model.layers.0.input_layernorm.weight", np.inf, "layers.attn_norm.scale of layer 0"),
        ("model.norm.weight", -np.inf, "final_norm.scale"),
        ("lm_head.weight", np.nan, "lm_head"),
    ],
)
def test_weights_that_are_not_finite_are_named(folder: Path, tmp_path: Path, name: str, value: float, parameter: str):
    path = broken(folder, tmp_path / "broken", name, value)
    text = tmp_path / "text.txt"
    text.write_text("the red camel")
    message = f"not finite, because weights are NaN or infinite: {parameter}"
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(camelid.UserError, match=message):
            camelid.load(path, dtype=dtype).generate("ab", max_new_tokens=5)
    assert_refused(called("generate", path, "ab", "the red camel", "--max-new-tokens", 5), message)
    assert_refused(called("evaluate", "perplexity", path, text), message)


def test_a_row_whose_logits_are_not_finite_does_not_lose_the_others(folder: Path, model: camelid.Model, tmp_path: Path):
    """One token's embedding is NaN, which only the prompt that holds it reads."""
    path = broken(folder, tmp_path / "broken", "model.embed_tokens.weight", np.nan, ord("X"))
    spoilt = camelid.load(path)
    with pytest.warns(UserWarning, match="prompt 1: the logits became NaN or infinite after 0 new tokens"):
        found = spoilt.generate(["ab", "aXb", "the red camel"], max_new_tokens=8)
    assert [completion.finish_reason for completion in found] == ["length", "error", "length"]
    expected = model.generate(["ab", "the red camel"], max_new_tokens=8)
    assert [found[0].tokens, found[2].tokens] == [completion.tokens for completion in expected]
    assert (found[1].tokens, found[1].text) == ([], "")
    with pytest.warns(UserWarning, match="prompt 1"):
        done = called("generate", path, "ab", "aXb", "--max-new-tokens", 8)
    assert done.returncode == 1
    assert done.stdout == f"ab{found[0].text}\naXb\n"
    with pytest.raises(camelid.UserError, match="NaN or infinite: embed"):
        spoilt.generate("X", max_new_tokens=8)


def test_a_row_keeps_what_came_before_its_logits_broke(folder: Path, model: camelid.Model, tmp_path: Path):
    prompts = ["ab", "xyz"]
    whole, other = model.generate(prompts, max_new_tokens=12)
    bad = next(token for token in whole.tokens[2:] if token not in (*other.tokens, *whole.tokens[:2], BOS, *b"abxyz"))
    path = broken(folder, tmp_path / "broken", "model.embed_tokens.weight", np.nan, bad)
    end = whole.tokens.index(bad) + 1
    with pytest.warns(UserWarning, match=f"prompt 0: .* after {end} new tokens"):
        found, same = camelid.load(path).generate(prompts, max_new_tokens=12)
    assert (found.tokens, found.finish_reason) == (whole.tokens[:end], "error")
    assert same == other
    (last, _) = camelid.load(path).generate(prompts, max_new_tokens=end)
    assert (last.tokens, last.finish_reason) == (whole.tokens[:end], "length")  # what follows is not needed


def test_an_overflow_of_float16_says_so(folder: Path, tmp_path: Path):
    path = broken(folder, tmp_path / "broken", "model.layers.1.mlp.down_proj.weight", 3e4)
    with pytest.raises(camelid.UserError, match="all weights are: values above 65,504 overflow float16") as refused:
        camelid.load(path, dtype="float16").generate("ab", max_new_tokens=5)
    assert 'dtype="float32"' in str(refused.value)
    assert "--dtype float32" in refused.value.advice


# What Python users see ----------------------------------------------------------------------------------------------


def test_what_users_print_is_one_short_line(folder: Path, model: camelid.Model):
    for thing in (model, model.params, model.params.layers, model.tokenizer, open_checkpoint(folder)):
        assert "\n" not in repr(thing)
        assert len(repr(thing)) < 250, repr(thing)
    assert "float32 on 1 device" in repr(model)
    assert f"{VOCAB_SIZE} tokens" in repr(model.tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mesh": {"fsdp": 2}},
            "mesh = {'fsdp': 2} is not a mesh\nGive a camelid.MeshConfig, for example MeshConfig(fsdp=2)",
        ),
        ({"mesh": 2}, "mesh = 2 is not a mesh"),
        ({"mesh": Mesh(jax.devices(), "x")}, "the mesh has axes ('x',) but not 'data'"),
        ({"mesh": camelid.MeshConfig(fsdp=16)}, "mesh data 1 x fsdp 16 x tensor 1 needs 16 devices; 8 are available"),
        ({"compute": {"remat": "layer"}}, "compute = {'remat': 'layer'} is not camelid.ComputeConfig"),
        ({"config": {"vocab_size": 3}}, "config = {'vocab_size': 3} is not camelid.ModelConfig"),
        ({"tokenizer": 3}, "tokenizer = 3 is not the path of a folder or file"),
        ({"dtype": "fp16"}, "dtype 'fp16' is unknown"),
        ({"dtype": jnp.bfloat16}, "is unknown\nChoose one of "),
        ({"format": "pytorch"}, "'pytorch'"),
    ],
)
def test_arguments_of_load_that_are_none_are_refused(folder: Path, options, message: str, as_users_call):
    with pytest.raises(camelid.UserError, match=re.escape(message)):
        camelid.load(folder, **options)


def test_advice_is_in_the_words_of_the_interface(model: camelid.Model, folder: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(camelid.UserError) as refused:
        model.save(tmp_path / "out")
    assert "overwrite=True" in str(refused.value)
    assert "--" not in str(refused.value)
    assert_refused(called("convert", folder, tmp_path / "out"))
    assert "add --overwrite" in called("convert", folder, tmp_path / "out").stderr
    with pytest.raises(camelid.UserError, match="tokenizer=") as refused:
        dataclasses.replace(model, tokenizer=None).generate("ab")
    assert "--tokenizer" in refused.value.advice


# Streams and stop strings ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "seed": 5}, {"temperature": 1.5, "stop": ["e", "th"]}])
def test_a_stream_is_the_text_that_generate_returns(model: camelid.Model, options: dict):
    pieces = list(model.stream("Once", max_new_tokens=40, **options))
    (completion,) = model.generate("Once", max_new_tokens=40, **options)
    assert "".join(pieces) == completion.text
    assert all(pieces)


def test_a_completion_ends_before_a_stop_string(model: camelid.Model):
    """Its tokens include the one that completes the stop string; the other rows continue."""
    prompts, how = ["Once", "upon"], {"max_new_tokens": 30, "temperature": 1.5, "seed": 2}
    free = model.generate(prompts, **how)
    stop = free[0].text[7:9]
    stopped = model.generate(prompts, stop=stop, **how)
    for ours, whole in zip(stopped, free, strict=True):
        assert ours.text == whole.text.split(stop)[0]
        assert ours.finish_reason == ("stop" if stop in whole.text else "length")
        assert ours.tokens == whole.tokens[: len(ours.tokens)]
    assert len(stopped[0].tokens) < 30


def test_completions_know_their_prompt(model: camelid.Model):
    completions = model.generate(["Once", "upon"], n=2, temperature=1.0, max_new_tokens=3, top_logprobs=2)
    assert [(each.prompt, each.prompt_index) for each in completions] == [("Once", 0)] * 2 + [("upon", 1)] * 2
    assert [len(top) for top in completions[0].top_logprobs or ()] == [2, 2, 2]
    assert completions[0].logprobs is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model: model.generate("a", top_kk=3),
            "there is no option 'top_kk' of generation\nDid you mean 'top_k'",
        ),
        (lambda model: model.generate("a", {"top_k": 3}), "options = {'top_k': 3} is not a GenerationConfig"),
        (lambda model: model.stream(["a", "b"]), "several prompts cannot be streamed together"),
        (lambda model: model.stream("a", logprobs=True), "a stream is text alone"),
        (lambda model: model.stream("a", n=2, temperature=1.0), "n = 2 completions cannot be streamed"),
        (lambda model: dataclasses.replace(model, tokenizer=None).stream([3]), "there is no text to stream"),
        (lambda model: dataclasses.replace(model, tokenizer=None).generate([[3]], stop="a"), "no stop string can be"),
    ],
)
def test_what_cannot_be_generated_is_refused_at_once(model: camelid.Model, call, message: str, as_users_call):
    with pytest.raises(camelid.UserError, match=re.escape(message)):
        call(model)
