"""Tokenizers inside GGUF files, against the gguf package of llama.cpp's authors, sentencepiece and transformers.

llama.cpp's own ids are in test_llama_cpp.py.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
import tokenizers
import transformers
from gguf.vocab import SentencePieceVocab

import camelid
from camelid.checkpoint.checkpoint import companions_in
from camelid.checkpoint.convert import convert
from camelid.checkpoint.formats.gguf_tokenizer import tokenizer_metadata
from camelid.checkpoint.formats.gguf_vocabulary import tokenizer_files
from camelid.checkpoint.registry import open_checkpoint
from camelid.errors import UserError
from camelid.text.tokenizer import load_tokenizer
from text.tiny import save_byte_tokenizer
from tiny import tiny_config
from vocabularies import CHATML, NAMES, folder_of, hard_texts, write_gguf

TYPES = gguf.TokenType


def fields_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def write_theirs(path: Path, set_vocabulary: Callable[[gguf.GGUFWriter], None], count: int) -> Path:
    """A model's file by llama.cpp's own writer, with numbers that are all zero."""
    import numpy as np

    config = tiny_config(
        num_layers=1, vocab_size=count, embed_dim=8, mlp_dim=8, head_dim=8, num_heads=1, num_kv_heads=1
    )
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    set_vocabulary(writer)
    layer = {"attn_norm": 1, "attn_q": 2, "attn_k": 2, "attn_v": 2, "attn_output": 2, "ffn_norm": 1}
    layer |= {"ffn_gate": 2, "ffn_up": 2, "ffn_down": 2}
    for name, rank in layer.items():
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((8,) * rank, np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((count, 8), np.float32))
    writer.add_tensor("output_norm.weight", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_sentencepiece(path: Path, folder: Path, **settings: Any) -> Path:
    """Of a folder with tokenizer.model, as llama.cpp's converter does."""
    texts, scores, types = zip(*SentencePieceVocab(folder).all_tokens(), strict=True)

    def set_vocabulary(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(list(settings.get("texts", texts)))
        writer.add_token_scores(settings.get("scores", scores))
        writer.add_token_types(settings.get("types", types))
        for name, value in settings.get("special", {}).items():
            getattr(writer, f"add_{name}")(value)

    return write_theirs(path, set_vocabulary, len(texts))


def write_byte_level(path: Path, folder: Path, pre: str | None, merges: list[str] | None = None) -> Path:
    """Of a folder with tokenizer.json, as llama.cpp's converter does."""
    described = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    texts = {token: text for text, token in described["model"]["vocab"].items()}
    types = dict.fromkeys(texts, TYPES.NORMAL)
    for token in described["added_tokens"]:
        texts[token["id"]] = token["content"]
        types[token["id"]] = TYPES.CONTROL if token["special"] else TYPES.USER_DEFINED
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=len(texts))
    special.merges = special.merges if merges is None else merges

    def set_vocabulary(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list([texts[token] for token in range(len(texts))])
        writer.add_token_types([types[token] for token in range(len(texts))])
        special.add_to_gguf(writer, quiet=True)

    return write_theirs(path, set_vocabulary, len(texts))


def tokenizer_of(path: Path):
    return load_tokenizer(open_checkpoint(path).tokenizer_folder)


@pytest.fixture(scope="module")
def llama2(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(assets, "llama2", tmp_path_factory.mktemp("tokenizers") / "llama2")


@pytest.fixture(scope="module")
def phi_2(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(assets, "phi-2", tmp_path_factory.mktemp("tokenizers") / "phi-2")


# Writing --------------------------------------------------------------------------------


def test_sentencepieces_tokens_scores_and_types_are_those_of_the_gguf_package(llama2: Path, tmp_path: Path):
    assert write_gguf(tmp_path / "a.gguf", llama2, 32_003) == ()
    found = fields_of(tmp_path / "a.gguf")
    texts, scores, types = zip(*SentencePieceVocab(llama2).all_tokens(), strict=True)
    padding = [f"[PAD{token}]" for token in range(32_000, 32_003)]
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.pre"] == "default"
    assert found["tokenizer.ggml.tokens"] == [text.decode() for text in texts] + padding
    assert found["tokenizer.ggml.scores"][:32_000] == list(scores)
    assert found["tokenizer.ggml.token_type"] == [*types, *[TYPES.UNUSED] * 3]
    ids = {"bos": 1, "eos": 2, "unknown": 0}
    assert {name: found[f"tokenizer.ggml.{name}_token_id"] for name in ids} == ids
    flags = {"add_bos_token": True, "add_eos_token": False, "add_space_prefix": True}
    assert {name: found[f"tokenizer.ggml.{name}"] for name in flags} == flags


def test_byte_level_tokens_types_and_merges_are_those_of_the_gguf_package(phi_2: Path, tmp_path: Path):
    assert write_gguf(tmp_path / "a.gguf", phi_2, 50_300) == ()
    found, theirs = fields_of(tmp_path / "a.gguf"), fields_of(write_byte_level(tmp_path / "b.gguf", phi_2, "gpt-2"))
    assert found["tokenizer.ggml.tokens"][:50_295] == theirs["tokenizer.ggml.tokens"]
    assert found["tokenizer.ggml.tokens"][50_295:] == [f"[PAD{token}]" for token in range(50_295, 50_300)]
    assert found["tokenizer.ggml.token_type"] == theirs["tokenizer.ggml.token_type"] + [TYPES.UNUSED] * 5
    for name in ("merges", "model", "pre", "bos_token_id", "eos_token_id"):
        assert found[f"tokenizer.ggml.{name}"] == theirs[f"tokenizer.ggml.{name}"], name
    assert not found["tokenizer.ggml.add_bos_token"]


@pytest.mark.parametrize("name", NAMES)
def test_the_pre_tokenizer_is_named_by_its_pattern(assets: Path, name: str, tmp_path: Path):
    folder = folder_of(assets, name, tmp_path / "tokenizer")
    described, _, notes = tokenizer_metadata(companions_in(folder), load_tokenizer(folder).vocab_size)
    assert notes == ()
    expected = {"llama2": "default", "mistral, tokenizer.json": "default", "phi-2": "gpt-2"}.get(name, name)
    assert described["tokenizer.ggml.pre"] == (8, expected)


def edited(folder: Path, change: Callable[[dict], Any], into: Path) -> Path:
    shutil.copytree(folder, into)
    described = json.loads((into / "tokenizer.json").read_text("utf-8"))
    change(described)
    (into / "tokenizer.json").write_text(json.dumps(described), "utf-8")
    config = json.loads((into / "tokenizer_config.json").read_text("utf-8"))
    # Of this class, and not of one that builds the tokenizer anew.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (into / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return into


UNKNOWN: dict[str, tuple[Callable[[dict], Any], str]] = {
    "another pattern": (
        lambda d: d.update(
            pre_tokenizer={"type": "Split", "pattern": {"Regex": r"\p{L}+"}, "behavior": "Isolated", "invert": False}
        ),
        r"the pre-tokenizer of .*\\\\p\{L\}\+",
    ),
    "words apart": (lambda d: d.update(pre_tokenizer={"type": "WhitespaceSplit"}), "pre-tokenizer of .*Whitespace"),
    "a space in front": (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
    "no merging of whole words": (lambda d: d["model"].update(ignore_merges=True), "with ignore_merges"),
    "a token twice": (
        lambda d: d["added_tokens"].append({**d["added_tokens"][0], "id": 50_300, "content": "[PAD50299]"}),
        r"the token '\[PAD50299\]' twice, as 50300 and 50299",
    ),
}


@pytest.mark.parametrize(("change", "about"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_tokenizer_that_llama_cpp_would_compute_otherwise_is_refused(
    phi_2: Path, tmp_path: Path, change: Callable[[dict], Any], about: str
):
    folder = edited(phi_2, change, tmp_path / "tokenizer")
    with pytest.raises(UserError, match=f"{about}(.|\n)*--without-tokenizer"):
        write_gguf(tmp_path / "a.gguf", folder, 50_400)
    assert not (tmp_path / "a.gguf").exists()


def test_a_bpe_that_does_not_merge_what_llama_cpp_would_is_refused(assets: Path, tmp_path: Path):
    mistral = folder_of(assets, "mistral, tokenizer.json", tmp_path / "mistral")
    folder = edited(mistral, lambda d: d["model"]["merges"].pop(1000), tmp_path / "tokenizer")
    with pytest.raises(UserError, match=r"does not merge '.*' and '.*', although '.*' is a token; llama.cpp does"):
        write_gguf(tmp_path / "a.gguf", folder, 32_000)


def test_other_kinds_of_tokenizers_are_refused_by_name(tmp_path: Path):
    (tmp_path / "words").mkdir()
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, "a")).save(f"{tmp_path}/words/tokenizer.json")
    with pytest.raises(UserError, match=r"is a WordLevel tokenizer, which llama\.cpp does not support for Llamas"):
        write_gguf(tmp_path / "a.gguf", tmp_path / "words", 5)
    text, model = tmp_path / "text.txt", tmp_path / "unigram" / "tokenizer"
    text.write_text("\n".join(hard_texts()).replace("\0", ""), "utf-8", errors="replace")
    model.parent.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(model), vocab_size=150, model_type="unigram", minloglevel=2
    )
    with pytest.raises(UserError, match="is a unigram model"):
        write_gguf(tmp_path / "a.gguf", model.parent, 150)


def test_pieces_that_users_defined_are_found_in_texts_as_such(tmp_path: Path):
    text, model = tmp_path / "text.txt", tmp_path / "bpe" / "tokenizer"
    text.write_text("\n".join(["the cat sat on the mat, and so did the dog"] * 50))
    model.parent.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(model),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<tool>"],
        control_symbols=["<turn>"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    own = sentencepiece.SentencePieceProcessor(model_file=f"{model}.model")
    write_gguf(tmp_path / "a.gguf", model.parent, len(own))
    found = fields_of(tmp_path / "a.gguf")
    kinds = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"], strict=True))
    expected = {"<tool>": 4, "<turn>": 3, "<s>": 3, "<unk>": 2, "<0x41>": 6, "▁the": 1}
    assert {text: kinds[text] for text in expected} == expected
    back = tokenizer_of(tmp_path / "a.gguf")
    tool = own.piece_to_id("<tool>")
    assert back.encode("<tool>the", bos=False)[-2:] == [tool, own.piece_to_id("▁the")]  # llama.cpp adds a space there
    assert tool in own.encode("a<tool>b")


def test_what_the_model_has_no_row_for_is_left_out_and_told(phi_2: Path, tmp_path: Path):
    [note] = write_gguf(tmp_path / "a.gguf", phi_2, 50_257)
    assert "has 38 more tokens than the model's vocabulary of 50257" in note
    assert len(fields_of(tmp_path / "a.gguf")["tokenizer.ggml.tokens"]) == 50_257


NORMALIZERS = {
    "NFC": ({"type": "NFC"}, "letters with combining accents"),
    "lower case": ({"type": "Lowercase"}, "capital letters"),
}


@pytest.mark.parametrize(("normalizer", "what"), NORMALIZERS.values(), ids=NORMALIZERS)
def test_normalization_that_llama_cpp_does_not_do_is_told(phi_2: Path, tmp_path: Path, normalizer: dict, what: str):
    folder = edited(phi_2, lambda d: d.update(normalizer=normalizer), tmp_path / "tokenizer")
    [note] = write_gguf(tmp_path / "a.gguf", folder, 50_300)
    assert note.endswith(f"ids differ for {what}")


def test_a_model_without_a_tokenizer_says_so_and_without_it_is_an_option(stories: Path, tmp_path: Path):
    notes = convert(stories, tmp_path / "a.gguf", to="gguf", with_tokenizer=False)
    assert any("the GGUF file has none" in note for note in notes)
    found = fields_of(tmp_path / "a.gguf")
    assert found["tokenizer.ggml.model"] == "no_vocab"
    assert "tokenizer.ggml.tokens" not in found
    assert camelid.load(tmp_path / "a.gguf").tokenizer is None
    convert(stories, tmp_path / "hf", with_tokenizer=False)
    assert not list((tmp_path / "hf").glob("tokenizer*"))
    assert (tmp_path / "hf" / "generation_config.json").is_file()


# Reading --------------------------------------------------------------------------------


def test_a_sentencepiece_vocabulary_of_llama_cpps_writer_has_sentencepieces_ids(llama2: Path, tmp_path: Path):
    path = write_sentencepiece(tmp_path / "a.gguf", llama2)
    tokenizer, own = tokenizer_of(path), load_tokenizer(llama2)
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.eos_ids) == (1, True, (2,))
    hf = transformers.AutoTokenizer.from_pretrained(open_checkpoint(path).tokenizer_folder)
    for text in hard_texts():
        assert tokenizer.encode(text) == own.encode(text), text
        assert tokenizer.encode(text, specials=True)[:1] == [1]
        assert hf.encode(text, add_special_tokens=False) == own.encode(text, bos=False, specials=True), text
        ids = own.encode(text, bos=False)
        assert tokenizer.decode(ids) == own.decode(ids), text


def test_a_byte_level_vocabulary_of_llama_cpps_writer_has_the_librarys_ids(phi_2: Path, tmp_path: Path):
    tokenizer = tokenizer_of(write_byte_level(tmp_path / "a.gguf", phi_2, "phi-2"))
    own = tokenizers.Tokenizer.from_file(str(phi_2 / "tokenizer.json"))
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.eos_ids) == (50_256, False, (50_256,))
    for text in hard_texts():
        expected = own.encode(text).ids
        assert tokenizer.encode(text, specials=True) == expected, text
        assert tokenizer.decode(expected, skip_specials=False) == own.decode(expected, skip_special_tokens=False), text


def test_flags_and_special_tokens_of_the_file_are_followed(llama2: Path, tmp_path: Path):
    special = {"add_bos_token": False, "add_space_prefix": False, "bos_token_id": 5, "eos_token_id": 6}
    special |= {"eot_token_id": 7, "pad_token_id": 0}
    tokenizer = tokenizer_of(write_sentencepiece(tmp_path / "a.gguf", llama2, special=special))
    assert (tokenizer.bos_id, tokenizer.adds_bos, tokenizer.eos_ids) == (5, False, (6, 7))
    assert tokenizer.named_specials["pad_token"] == "<unk>"
    assert tokenizer.encode("a") == [load_tokenizer(llama2).backend.token_id("a")]
    assert tokenizer.decode(tokenizer.encode(" a")) == " a"


def test_ends_that_only_their_names_tell_are_ends(llama2: Path, tmp_path: Path):
    texts = [text.decode() for text, *_ in SentencePieceVocab(llama2).all_tokens()]
    texts[31_999] = "<|im_end|>"
    tokenizer = tokenizer_of(write_sentencepiece(tmp_path / "a.gguf", llama2, texts=texts))
    assert tokenizer.eos_ids == (2, 31_999)
    assert tokenizer.encode("<|im_end|>", bos=False, specials=True) == [31_999]
    assert 31_999 not in tokenizer.encode("<|im_end|>", bos=False)


def test_a_conversion_takes_the_tokenizer_and_its_templates_along(llama2: Path, tmp_path: Path):
    templates = [{"name": "default", "template": CHATML}, {"name": "rag", "template": "{{ messages }}"}]
    source = tmp_path / "source"
    shutil.copytree(llama2, source)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": templates}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    write_gguf(tmp_path / "a.gguf", source, 32_000)
    first = fields_of(tmp_path / "a.gguf")
    assert first["tokenizer.chat_template"] == CHATML
    convert(tmp_path / "a.gguf", tmp_path / "hf")
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in (tmp_path / "hf").iterdir()}
    found = load_tokenizer(tmp_path / "hf")
    assert found.chat_templates == {"default": CHATML, "rag": "{{ messages }}"}
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    chat = [{"role": "user", "content": "Who are  you?\n"}]
    text = hf.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nWho are  you?\n<|im_end|>\n<|im_start|>assistant\n"
    own = load_tokenizer(source)
    assert hf.encode(text) == found.encode(text, specials=True) == own.encode(text, specials=True)
    convert(tmp_path / "hf", tmp_path / "again.gguf", to="gguf")  # now from tokenizer.json
    again = fields_of(tmp_path / "again.gguf")
    assert again["tokenizer.chat_template.rag"] == "{{ messages }}"
    for name in ("tokens", "token_type", "bos_token_id", "eos_token_id", "add_bos_token", "add_space_prefix"):
        assert again[f"tokenizer.ggml.{name}"] == first[f"tokenizer.ggml.{name}"], name
    third = tokenizer_of(tmp_path / "again.gguf")
    assert all(third.encode(text) == own.encode(text) for text in hard_texts())


def test_a_file_has_its_own_tokenizer_and_a_folder_the_one_beside(llama2: Path, tmp_path: Path):
    path = write_sentencepiece(tmp_path / "a.gguf", llama2)
    save_byte_tokenizer(tmp_path)  # another model's
    (tmp_path / "chat_template.jinja").write_text("another model's")
    model = camelid.load(path)
    assert model.tokenizer is not None
    assert model.tokenizer.encode("Hello") == load_tokenizer(llama2).encode("Hello")
    assert not model.tokenizer.chat_templates
    model.save(tmp_path / "hf")
    assert not (tmp_path / "hf" / "chat_template.jinja").exists()
    assert load_tokenizer(tmp_path / "hf").encode("Hello") == load_tokenizer(llama2).encode("Hello")
    convert(path, tmp_path / "converted")
    assert not (tmp_path / "converted" / "chat_template.jinja").exists()
    assert load_tokenizer(tmp_path / "converted").encode("Hello") == load_tokenizer(llama2).encode("Hello")
    beside = camelid.load(tmp_path).tokenizer
    assert beside is not None
    assert beside.encode("Hi") == [256, *b"Hi"]


def test_quantized_files_have_the_tokenizer_too(stories: Path, tmp_path: Path):
    convert(stories, tmp_path / "a.gguf", to="gguf-q8_0")
    assert tokenizer_of(tmp_path / "a.gguf").encode("Once upon a time") == [1, 403, 407, 261, 378]


BAD: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "all scores equal": (
        lambda path, folder: write_sentencepiece(path, folder, scores=[-1000.0] * 32_000),
        "has the same score for all tokens",
    ),
    "too few scores": (
        lambda path, folder: write_sentencepiece(path, folder, scores=[0.0, 1.0]),
        "2 scores for 32000 tokens",
    ),
    "too few types": (
        lambda path, folder: write_sentencepiece(path, folder, types=[1, 1]),
        "2 token types for 32000 tokens",
    ),
    "unknown types": (
        lambda path, folder: write_sentencepiece(path, folder, types=[9] * 32_000),
        "or types that are unknown",
    ),
    "the same text twice": (
        lambda path, folder: write_sentencepiece(path, folder, texts=["a"] * 32_000),
        "several tokens with the same text",
    ),
}


@pytest.mark.parametrize(("write", "about"), BAD.values(), ids=BAD)
def test_a_sentencepiece_vocabulary_that_is_unclear_is_refused(
    llama2: Path, tmp_path: Path, write: Callable[[Path, Path], Path], about: str
):
    path = write(tmp_path / "a.gguf", llama2)
    with pytest.raises(UserError, match=f"a.gguf .*{about}"):
        camelid.load(path)
    with pytest.raises(UserError, match=f"a.gguf .*{about}(.|\n)*--without-tokenizer"):
        convert(path, tmp_path / "hf")
    convert(path, tmp_path / "hf", with_tokenizer=False)
    assert camelid.load(path, tokenizer=llama2).tokenizer is not None  # the ways out
    shutil.copy(llama2 / "tokenizer.model", tmp_path)
    assert camelid.load(tmp_path).tokenizer is not None


@pytest.mark.parametrize(
    ("pre", "merges", "about"),
    [
        ("gpt-5", None, r"tokenizer\.ggml\.pre = 'gpt-5'; camelid supports llama-bpe, "),
        (None, None, r"tokenizer\.ggml\.pre = None"),
        ("default", None, r"tokenizer\.ggml\.pre = 'default'"),
        ("gpt-2", ["Ġ zzzzzz"], "merges 'Ġ' and 'zzzzzz', which are not all in the vocabulary"),
        ("gpt-2", [], r"tokenizer\.ggml\.merges = None"),
    ],
)
def test_a_byte_level_vocabulary_that_is_unclear_is_refused(
    phi_2: Path, tmp_path: Path, pre: str | None, merges: list[str] | None, about: str
):
    path = write_byte_level(tmp_path / "a.gguf", phi_2, pre, merges)
    with pytest.raises(UserError, match=f"a.gguf .*{about}"):
        camelid.load(path)


def test_other_models_of_tokenizers_are_refused_by_name():
    with pytest.raises(UserError, match=r"a\.gguf has tokenizer\.ggml\.model = 't5'; camelid supports llama and gpt2"):
        tokenizer_files(Path("a.gguf"), {"tokenizer.ggml.model": "t5"})


def test_a_cache_that_cannot_be_written_is_named(llama2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_sentencepiece(tmp_path / "a.gguf", llama2)
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("CAMELID_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"cannot be unpacked: (.|\n)*CAMELID_CACHE"):
        camelid.load(path)


def test_opening_for_the_numbers_unpacks_nothing(llama2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CAMELID_CACHE", str(tmp_path / "cache"))
    path = write_sentencepiece(tmp_path / "a.gguf", llama2)
    assert open_checkpoint(path).config.vocab_size == 32_000
    assert not (tmp_path / "cache").exists()
    tokenizer_of(path)
    assert (tmp_path / "cache").exists()
