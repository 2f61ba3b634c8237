import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers

import camelid
from camelid.errors import UserError
from camelid.text.stream import TextStream
from camelid.text.tokenizer import Tokenizer, load_tokenizer, vocabulary_notes
from text.tiny import BOS, EOS, VOCAB_SIZE, save_byte_tokenizer

STORIES = "models/stories260K/hf"
MISTRAL = "tokenizers/mistral-v1"
LLAMA2 = "tokenizers/llama2"
PHI2 = "tokenizers/phi-2"
TRICKY = (
    "",
    " ",
    "  two  spaces ",
    "tab\tnew\nline\r\n\n\n",
    "café Straße 😀👩‍👩‍👧 日本語 한국어 नमस्ते",
    "a <unk> b</s><s> <|endoftext|>",
    "▁ <0x0A>",
    "\x00\x07\ufeff\ufffd",
)


@pytest.fixture(scope="module")
def lines(assets: Path) -> list[str]:
    text = (assets / "data/wikitext-2/valid.txt").read_text(encoding="utf-8")
    assert "<unk>" in text
    return [*text.split("\n"), *TRICKY]


@pytest.fixture
def bytewise(tmp_path: Path) -> Tokenizer:
    return load_tokenizer(save_byte_tokenizer(tmp_path))


@pytest.mark.parametrize(
    "file",
    [
        f"{STORIES}/tokenizer.json",
        f"{STORIES}/tokenizer.model",
        f"{MISTRAL}/tokenizer.json",
        f"{MISTRAL}/tokenizer.model",
        f"{LLAMA2}/tokenizer.model",
    ],
)
def test_ids_and_texts_equal_those_of_sentencepiece(assets: Path, lines: list[str], file: str):
    reference = sentencepiece.SentencePieceProcessor(model_file=str((assets / file).with_name("tokenizer.model")))
    tokenizer = load_tokenizer(assets / file)
    ids = reference.encode(lines)
    assert tokenizer.encode_batch(lines) == [[1, *line] for line in ids]
    assert [tokenizer.decode([1, *line, 2]) for line in ids] == reference.decode(ids)


@pytest.mark.parametrize("name", [STORIES, MISTRAL, PHI2])
def test_ids_and_texts_equal_those_of_transformers(assets: Path, lines: list[str], name: str):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(assets / name)
    ours = load_tokenizer(assets / name)
    lines = [*lines[::8], *TRICKY]
    parsed = ours.encode_batch(lines, specials=True)
    assert parsed == [theirs.encode(line, verbose=False) for line in lines]
    chance = random.Random(0)
    noise = [[chance.randrange(chance.choice([300, ours.vocab_size])) for _ in range(12)] for _ in range(500)]
    for skip in (True, False):
        for ids in (*parsed, *noise):
            assert ours.decode(ids, skip_specials=skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", [STORIES, MISTRAL])
def test_specials_are_the_same_in_both_files_of_a_checkpoint(assets: Path, name: str):
    json_file = load_tokenizer(assets / name / "tokenizer.json")
    model_file = load_tokenizer(assets / name / "tokenizer.model")
    for text in (*TRICKY, "<s> a</s>", "<s><s>x </s> </s>", "<unk>"):
        ids = json_file.encode(text, specials=True)
        assert model_file.encode(text, specials=True) == ids
        for skip in (True, False):
            assert model_file.decode(ids, skip_specials=skip) == json_file.decode(ids, skip_specials=skip)


def test_the_stories_tokenizer_agrees_with_its_reference(assets: Path):
    cases = json.loads((assets / "models/stories260K/reference.json").read_text())["tokenizer_cases"]
    tokenizer = load_tokenizer(assets / STORIES)
    for case in cases:
        assert tokenizer.encode(case["text"], bos=False) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["decoded"]


@pytest.mark.parametrize("name", [MISTRAL, LLAMA2, PHI2])
def test_decoding_gives_the_text_back(assets: Path, lines: list[str], name: str):
    tokenizer = load_tokenizer(assets / name)
    lines = [line for line in lines if "▁" not in line]  # sentencepiece's own letter for a blank
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(lines)] == lines


def test_gpt2s_own_files_make_the_same_ids_as_a_tokenizer_json(assets: Path, lines: list[str], tmp_path: Path):
    parts = [str(assets / "tokenizers/gpt2" / name) for name in ("vocab.json", "merges.txt")]
    gpt2 = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(*parts))
    gpt2.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2.decoder = tokenizers.decoders.ByteLevel()
    gpt2.save(str(tmp_path / "tokenizer.json"))
    phi2 = load_tokenizer(assets / PHI2)
    single_spaced = [line for line in lines if "  " not in line]  # phi-2 added tokens for runs of blanks
    assert load_tokenizer(tmp_path).encode_batch(single_spaced) == phi2.encode_batch(single_spaced)


def test_special_strings_are_text_unless_asked_for(bytewise: Tokenizer):
    assert bytewise.encode("</s>x", bos=False) == list(b"</s>x")
    assert bytewise.encode("</s>x", bos=False, specials=True) == [EOS, ord("x")]


@pytest.mark.parametrize("config", [{"eos_token": "<|end|>"}, {"additional_special_tokens": [{"content": "<|end|>"}]}])
def test_a_special_of_the_configuration_is_one_whatever_the_vocabulary_says(tmp_path: Path, config: dict):
    import transformers

    folder = save_byte_tokenizer(tmp_path, config={"bos_token": "<s>", **config})
    changed = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    changed.add_tokens([tokenizers.AddedToken("<|end|>", rstrip=True)])
    changed.save(str(folder / "tokenizer.json"))
    ours = load_tokenizer(folder)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|end|>")
    assert ours.encode("a<|end|> b", bos=False) == list(b"a<|end|> b")
    ids = ours.encode("a<|end|> b", bos=False, specials=True)
    assert ids == theirs.encode("a<|end|> b", add_special_tokens=False) == [ord("a"), VOCAB_SIZE, ord("b")]
    assert ours.decode(ids) == "ab"
    assert ours.decode(ids, skip_specials=False) == "a<|end|>b"


@pytest.mark.parametrize("file", [f"{STORIES}/tokenizer.json", f"{STORIES}/tokenizer.model"])
def test_a_pickled_tokenizer_is_the_same(assets: Path, file: str):
    tokenizer = load_tokenizer(assets / file)
    again = pickle.loads(pickle.dumps(tokenizer))
    for specials in (False, True):
        text = "One </s> <s>day"
        assert again.encode(text, specials=specials) == tokenizer.encode(text, specials=specials)


def test_one_thread_may_parse_specials_while_another_does_not(bytewise: Tokenizer):
    text = "</s>" * 500
    plain, parsed = bytewise.encode(text), bytewise.encode(text, specials=True)
    assert len(plain) > len(parsed)
    with ThreadPoolExecutor(4) as threads:
        wanted = [bool(n % 2) for n in range(2000)]
        ids = list(threads.map(lambda specials: bytewise.encode(text, specials=specials), wanted))
    assert ids == [parsed if specials else plain for specials in wanted]


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"add_bos_token": False},
        {"add_bos_token": True, "bos_token": "<s>"},
        {"add_bos_token": None},
        {"bos_token": None},
        {"bos_token": ""},
    ],
)
def test_bos_follows_the_post_processor_as_in_transformers(tmp_path: Path, adds_bos: bool, config: dict):
    import transformers

    folder = save_byte_tokenizer(tmp_path, adds_bos=adds_bos, config=config)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.adds_bos is adds_bos
    assert tokenizer.encode("x") == transformers.AutoTokenizer.from_pretrained(folder).encode("x")
    said = config.get("add_bos_token")
    assert bool(tokenizer.notes) == (said is not None and said is not adds_bos)


def test_bos_is_put_once_and_the_caller_may_overrule_the_checkpoint(bytewise: Tokenizer):
    assert bytewise.encode("<s>x", specials=True) == [BOS, ord("x")]
    assert bytewise.encode("x", bos=False, eos=True) == [ord("x"), EOS]
    assert bytewise.encode("x</s>", eos=True, specials=True) == [BOS, ord("x"), EOS]
    assert bytewise.encode_batch(["", "y"], bos=True, eos=True) == [[BOS, EOS], [BOS, ord("y"), EOS]]


def test_a_bare_llama_model_adds_bos_and_knows_its_specials(assets: Path):
    tokenizer = load_tokenizer(assets / LLAMA2)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.adds_bos) == (1, (2,), True)
    assert tokenizer.vocab_size == 32000


def test_every_file_that_names_an_eos_is_heard(tmp_path: Path):
    folder = save_byte_tokenizer(tmp_path, config={"eos_token": {"content": "</s>", "special": True}})
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": "!"}')
    (folder / "config.json").write_text('{"eos_token_id": 8}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_ids == (7, 8, EOS, ord("!"))
    assert tokenizer.encode("x", eos=True)[-1] == 7
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert load_tokenizer(folder).eos_ids == (9, EOS, ord("!"), 8)
    (folder / "generation_config.json").write_text('{"eos_token_id": [null, -1]}')
    assert load_tokenizer(folder).eos_ids == (EOS, ord("!"), 8)


def test_an_eos_of_the_model_alone_ends_no_text(tmp_path: Path):
    folder = save_byte_tokenizer(tmp_path)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [{VOCAB_SIZE}, {EOS}]}}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_ids == (VOCAB_SIZE, EOS)
    assert tokenizer.encode("x", eos=True) == [BOS, ord("x"), EOS]
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {VOCAB_SIZE}}}')
    with pytest.raises(UserError, match="no file in its folder names one that it has"):
        load_tokenizer(folder).encode("x", eos=True)


def test_an_ordinary_token_that_is_also_eos_ends_a_text_once_more(tmp_path: Path):
    folder = save_byte_tokenizer(tmp_path, adds_bos=False, config={"bos_token": "#", "eos_token": "!"})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("#x!", bos=True, eos=True) == list(b"##x!!")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("generation_config.json", '{"eos_token_id": "x"}', r"eos_token_id in .*generation_config\.json is \['x'\]"),
        ("config.json", '{"eos_token_id": [1, 2.5]}', r"eos_token_id in .*config\.json is \[1, 2\.5\]"),
        ("tokenizer_config.json", '{"eos_token": 2}', r"eos_token in .*tokenizer_config\.json is 2"),
        ("tokenizer_config.json", '{"bos_token": ["<s>"]}', r"bos_token in .*tokenizer_config\.json is \['<s>'\]"),
    ],
)
def test_a_special_of_another_shape_is_named(tmp_path: Path, name: str, content: str, message: str):
    folder = save_byte_tokenizer(tmp_path)
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(folder)


def test_truncation_and_padding_saved_in_the_file_are_ignored(tmp_path: Path):
    folder = save_byte_tokenizer(tmp_path)
    saved = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    saved.enable_truncation(4)
    saved.enable_padding(length=16)
    saved.save(str(folder / "tokenizer.json"))
    for specials in (False, True):
        assert load_tokenizer(folder).encode("123456", specials=specials) == [BOS, *b"123456"]


def test_tokens_added_to_a_bare_model_are_counted_parsed_and_spelled(assets: Path, tmp_path: Path):
    shutil.copy(assets / LLAMA2 / "tokenizer.model", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<|im|>", "<|im|>x"]}')
    (tmp_path / "added_tokens.json").write_text('{"<|im|>": 32000, "<|im|>x": 32001}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 32002
    ids = tokenizer.encode("<|im|>x<|im|>", specials=True)
    assert ids == [1, 32001, 32000]
    assert tokenizer.decode(ids, skip_specials=False) == "<s><|im|>x<|im|>"
    assert TextStream(tokenizer).push(32000) == ""
    assert 32000 not in tokenizer.encode("<|im|>")


def test_an_id_that_transformers_would_not_give_is_named(assets: Path, tmp_path: Path):
    shutil.copy(assets / LLAMA2 / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|im|>": 32001}')
    with pytest.raises(UserError, match=r"added_tokens\.json gives '<\|im\|>' the id 32001, and .* is 32000"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("added", ['{"x": "y"}', '{"x": -1}', '{"x": 3.5}', '{"": 32000}'])
def test_an_added_token_without_text_or_id_is_named(assets: Path, tmp_path: Path, added: str):
    shutil.copy(assets / LLAMA2 / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(added)
    with pytest.raises(UserError, match=r"added_tokens\.json gives '\w?' the id "):
        load_tokenizer(tmp_path)


def test_files_and_fingerprint_are_those_of_the_folder(assets: Path, tmp_path: Path):
    folder = shutil.copytree(assets / STORIES, tmp_path / "copy")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    tokenizer = load_tokenizer(folder)
    names = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"]
    assert [file.name for file in tokenizer.files] == [*names, "chat_template.jinja", "generation_config.json"]
    assert all(file.parent == folder for file in tokenizer.files)
    assert tokenizer.fingerprint == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert tokenizer.has_chat_template
    assert not load_tokenizer(assets / STORIES).has_chat_template


@pytest.fixture(scope="module")
def plain_tokenizers(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Vocabularies alone in a folder, without any file that could add to them."""
    loaded = {}
    for vocabulary in (f"{STORIES}/tokenizer.json", f"{LLAMA2}/tokenizer.model"):
        loaded[vocabulary] = load_tokenizer(shutil.copy(assets / vocabulary, tmp_path_factory.mktemp("plain")))
    return loaded


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"additional_special_tokens": ["<|im_start|>"]}),
        ("tokenizer_config.json", {"pad_token": "<pad>"}),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
        ("special_tokens_map.json", {"additional_special_tokens": ["<tool>"]}),
        ("config.json", {"model_type": "gemma"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("vocabulary", [f"{STORIES}/tokenizer.json", f"{LLAMA2}/tokenizer.model"])
def test_whatever_changes_ids_changes_the_fingerprint(
    vocabulary: str, name: str, content: dict, plain_tokenizers: dict[str, Tokenizer], assets: Path, tmp_path: Path
):
    file = tmp_path / Path(vocabulary).name
    shutil.copy(assets / vocabulary, file)
    (tmp_path / name).write_text(json.dumps(content))
    plain, changed = plain_tokenizers[vocabulary], load_tokenizer(tmp_path)
    assert plain.fingerprint == plain.vocabulary_hash == hashlib.sha256(file.read_bytes()).hexdigest()
    assert changed.vocabulary_hash == plain.vocabulary_hash
    assert changed.fingerprint != plain.fingerprint
    if vocabulary.startswith(STORIES):  # loading the larger one takes seconds, and the path is not part of the hash
        assert load_tokenizer(shutil.copytree(tmp_path, tmp_path / "copy")).fingerprint == changed.fingerprint


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_what_leaves_ids_as_they_are_leaves_the_fingerprint(name: str, assets: Path, tmp_path: Path):
    vocabulary = {"tokenizer.json": "hf/tokenizer.json", "tokenizer.model": "tok512.model"}[name]
    shutil.copy(assets / "models/stories260K" / vocabulary, tmp_path / name)
    plain = load_tokenizer(tmp_path)
    named = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": "x"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    assert load_tokenizer(tmp_path).fingerprint == plain.fingerprint


def test_the_fingerprint_is_the_same_in_every_process(assets: Path, tmp_path: Path):
    folder = shutil.copytree(assets / STORIES, tmp_path / "copy")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "pad_token": "<pad>"}')
    code = "import sys; from camelid.text.tokenizer import load_tokenizer as l; print(l(sys.argv[1]).fingerprint)"
    found = subprocess.run(
        [sys.executable, "-c", code, folder],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(camelid.__file__).parents[1])},
    )
    assert found.stdout.strip() == load_tokenizer(folder).fingerprint


def test_a_vocabulary_under_another_name_is_carried_along(assets: Path):
    file = assets / "models/stories260K/tok512.model"
    assert load_tokenizer(file).files == (file,)
    assert load_tokenizer(str(file)).encode("Once upon a time") == [1, 403, 407, 261, 378]


def test_a_template_in_the_configuration_counts(tmp_path: Path):
    for template in ("x", [{"name": "default", "template": "x"}], None):
        folder = save_byte_tokenizer(tmp_path, config={"chat_template": template})
        assert load_tokenizer(folder).has_chat_template is (template is not None)


@pytest.mark.parametrize("token", [-1, VOCAB_SIZE])
def test_ids_outside_the_vocabulary_are_refused(bytewise: Tokenizer, token: int):
    with pytest.raises(UserError, match=f"{token} is outside .* {VOCAB_SIZE}"):
        bytewise.decode([65, token])


def test_ids_may_be_numpy(bytewise: Tokenizer):
    assert bytewise.decode(np.array([104, 105], np.uint16)) == "hi"


def test_half_a_character_is_refused_by_place(bytewise: Tokenizer):
    with pytest.raises(UserError, match=r"half a character, '\\ud83d', at position 2"):
        bytewise.encode("ab\ud83d")


def test_a_tokenizer_larger_than_the_model_is_noted_with_both_sizes(bytewise: Tokenizer):
    assert vocabulary_notes(bytewise, VOCAB_SIZE) == ()
    (note,) = vocabulary_notes(bytewise, 257)
    assert f"{VOCAB_SIZE} ids, the model's vocabulary only 257" in note


def test_a_folder_without_a_tokenizer_says_what_was_looked_for(tmp_path: Path):
    with pytest.raises(UserError, match=r"looked for .*tokenizer\.json, .*tokenizer\.model, .*vocab\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", r"tokenizer\.json is not a tokenizer"),
        (
            "tokenizer.model",
            "no model",
            r"tokenizer\.model is neither a sentencepiece model nor a list of tiktoken ranks",
        ),
        ("tokenizer.model", "IQ== 0\nIg== 1\n", r"tokenizer\.model is damaged: byte 0 has no token"),
        ("tokenizer.model", "IQ== 0\nIg= 1\n", r"tokenizer\.model:2 is not a token with its rank"),
    ],
)
def test_a_vocabulary_of_another_kind_is_named(tmp_path: Path, name: str, content: str, message: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_a_broken_file_beside_the_vocabulary_is_named(tmp_path: Path):
    folder = save_byte_tokenizer(tmp_path)
    for content in ("{", "[1]"):
        (folder / "generation_config.json").write_text(content)
        with pytest.raises(UserError, match=r"generation_config\.json holds no JSON object"):
            load_tokenizer(folder)


def test_a_named_special_that_the_vocabulary_lacks_follows_its_last_id(tmp_path: Path):
    import transformers

    folder = save_byte_tokenizer(tmp_path, config={"eos_token": "<end>"})
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.eos_ids == (theirs.eos_token_id,) == (VOCAB_SIZE,)
    assert ours.encode("a<end>", specials=True) == theirs.encode("a<end>")


def test_a_unigram_model_is_encoded_by_sentencepiece_and_takes_no_tokens(assets: Path, tmp_path: Path):
    sentencepiece.SentencePieceTrainer.train(
        input=str(assets / "data/tinystories/tinystories_sample.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="unigram",
        vocab_size=200,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<unk>"}')
    texts = ["Once upon  a time", "ﬁsh </s> x", ""]
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_batch(texts, bos=False) == theirs.encode(texts)
    assert tokenizer.encode("a</s>b", specials=True) == [1, *theirs.encode("a"), 2, *theirs.encode("b")]
    assert pickle.loads(pickle.dumps(tokenizer)).encode_batch(texts) == tokenizer.encode_batch(texts)
    (tmp_path / "added_tokens.json").write_text('{"<tool>": 200}')
    with pytest.raises(UserError, match="the files add '<tool>' to it"):
        load_tokenizer(tmp_path)


def test_bos_or_eos_that_does_not_exist_is_refused(tmp_path: Path):
    tokenizer = load_tokenizer(save_byte_tokenizer(tmp_path, adds_bos=False, config={}))
    with pytest.raises(UserError, match="BOS was requested"):
        tokenizer.encode("x", bos=True)
    with pytest.raises(UserError, match="EOS was requested"):
        tokenizer.encode("x", eos=True)


def test_importing_loads_neither_library():
    code = "import sys, camelid.text.tokenizer; sys.exit(bool({'tokenizers', 'sentencepiece'} & sys.modules.keys()))"
    source = str(Path(__file__).parents[2] / "src")
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": source}, check=False).returncode == 0
