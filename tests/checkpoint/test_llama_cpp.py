"""llama.cpp itself opens what camelid writes, and its ids, stories and answers are the same.

llama-cpp-python is built from C++ and is an extra of its own: `pip install camelid[llama-cpp]`.
"""

import json
from pathlib import Path

import numpy as np
import pytest

import camelid
from camelid.checkpoint.convert import convert
from camelid.checkpoint.registry import open_checkpoint
from camelid.text.chat import Message, load_template
from camelid.text.tokenizer import load_tokenizer
from vocabularies import NAMES, folder_of, hard_texts, write_gguf

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (the extra llama-cpp)")


def opened(path: Path, **how):
    return llama_cpp.Llama(str(path), verbose=False, **how)


def ids_of(llama, text: str, specials: bool) -> list[int]:
    return llama.tokenize(text.encode(), add_bos=False, special=specials)


@pytest.mark.parametrize("name", NAMES)
def test_llama_cpp_has_the_ids_of_the_tokenizer_and_so_has_camelid_from_the_file(
    assets: Path, name: str, tmp_path: Path
):
    tokenizer = load_tokenizer(folder_of(assets, name, tmp_path / "tokenizer"))
    path = tmp_path / "a.gguf"
    assert write_gguf(path, tmp_path / "tokenizer", tokenizer.vocab_size + 3) == ()
    llama = opened(path, vocab_only=True)
    back = load_tokenizer(open_checkpoint(path).tokenizer_folder)
    assert llama.n_vocab() == tokenizer.vocab_size + 3
    assert (back.bos_id, back.adds_bos, back.eos_ids) == (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.eos_ids)
    for text in hard_texts():
        for specials in (False, True):
            theirs = ids_of(llama, text, specials)
            assert tokenizer.encode(text, bos=False, specials=specials) == theirs, (text, specials)
            assert back.encode(text, bos=False, specials=specials) == theirs, (text, specials)
        assert llama.tokenize(text.encode(), special=False) == tokenizer.encode(text), text


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_where_llama_cpp_keeps_spaces_that_a_tokenizer_drops_the_user_is_told(stories: Path, tmp_path: Path, file: str):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / file).symlink_to(stories / file)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    [note] = write_gguf(tmp_path / "a.gguf", tmp_path / "tokenizer", 512)
    assert "ids differ for repeated spaces, a space at the beginning and a space at the end" in note
    llama = opened(tmp_path / "a.gguf", vocab_only=True)
    back = load_tokenizer(open_checkpoint(tmp_path / "a.gguf").tokenizer_folder)
    same = 0
    for text in hard_texts():
        ours = tokenizer.encode(text, bos=False)
        assert back.encode(text, bos=False) == ours, text
        if " ".join(filter(None, text.split(" "))) == text and "▁" not in text:
            assert ids_of(llama, text, False) == ours, text
            same += 1
    assert same > 80


def test_llama_cpp_tells_the_same_greedy_story(stories: Path, tmp_path: Path):
    reference = json.loads((stories.parent / "reference.json").read_text())["long_greedy"]
    convert(stories, tmp_path / "s.gguf", to="gguf")
    llama = opened(tmp_path / "s.gguf", n_ctx=512)
    told = llama.create_completion(reference["prompt"], max_tokens=len(reference["ids"]) - 5, temperature=0.0)
    assert reference["prompt"] + told["choices"][0]["text"] == reference["text"]


def test_llama_cpp_answers_a_chat_by_the_template_in_the_file(stories: Path, tmp_path: Path):
    source = tmp_path / "source"
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}"
    )
    template += "{% endif %}{% endfor %}"
    convert(stories, source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    convert(source, tmp_path / "s.gguf", to="gguf")
    text = "Once upon a time, Lily and Ben"
    messages = [{"role": "user", "content": text}]
    llama = opened(tmp_path / "s.gguf", n_ctx=512)
    assert llama.metadata["tokenizer.chat_template"] == template
    answer = llama.create_chat_completion(messages, max_tokens=40, temperature=0.0)["choices"][0]["message"]["content"]
    model = camelid.load(tmp_path / "s.gguf")
    assert model.tokenizer is not None
    template = load_template(None, model.tokenizer)
    prompt, _ = template.render([Message("user", text)], model.tokenizer, add_generation_prompt=True)
    [ours] = model.generate([prompt.tolist()], max_new_tokens=40)
    assert answer.strip() == ours.text.strip()
    assert len(answer) > 60


def test_llama_cpp_computes_the_same_logits(stories: Path, tmp_path: Path):
    convert(stories, tmp_path / "s.gguf", to="gguf")
    tokens = [1, 403, 407, 261, 378, 67, 393, 280]
    llama = opened(tmp_path / "s.gguf", n_ctx=512, logits_all=True)
    llama.eval(tokens)
    theirs = np.array(llama.scores[: len(tokens)])
    ours = np.asarray(camelid.load(tmp_path / "s.gguf").logits(np.array([tokens], np.int32)))[0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-2)  # its attention keeps keys and values in float16
    assert (ours.argmax(1) == theirs.argmax(1)).all()
