"""Edited tokenizer folders, opened by transformers' AutoTokenizer and by us: equal ids, or a refusal that says why."""

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from camelid.errors import UserError
from camelid.text.tokenizer import load_tokenizer

CONFIG, SPECIALS, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
TEXTS = (
    "One day, Tim saw a big red dog. 12345 it's",
    " leading",
    "a<|im_start|>user\nb<|im_end|> c",
    "<|im_start|> <|im_end|><|im_start|>",
    "x <tool> y z<tool>tool <tool>",
    "<s>a</s> b</s><s>c",
    "é 日本語 😀 naïve",
    "<pad><|endoftext|>a <|eot_id|>\n\nb",
    "tab\tnew\n\nline <MASK> ",
    "foo<new>bar newfoo <new>",
)
SPACES = ("two  spaces   three", "\n    indented  ")


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False} | flags


def special(content: str, **flags: bool) -> dict[str, Any]:
    return token(content, special=True, **flags)


CHATML = [special("<|im_start|>"), special("<|im_end|>")]
SENTENCEPIECE = ("llama2", "mistral-v1")
# Where transformers 5 leaves out the space in front, or BOS, and Llama's own code does not.
BY_SENTENCEPIECE = ("Llama 2, no switch", "Llama 2, no class")


@dataclass(frozen=True)
class Case:
    name: str
    base: str
    config: dict[str, Any] | None = None
    """fields that are added to tokenizer_config.json; None deletes the file"""
    model: dict[str, Any] | None = None
    """config.json"""
    files: dict[str, Any] | None = None
    """more files, as JSON; None deletes one"""
    edit: Callable[[dict[str, Any]], Any] | None = None
    """changes tokenizer.json"""
    refused: str | None = None
    """what our refusal says, where transformers opens the folder"""
    differs: str | None = None
    """the note that says how ids differ from those of transformers"""


def base_folder(assets: Path, base: str, folder: Path) -> None:
    """The files of an asset; large vocabularies are cut, so that transformers opens them fast."""
    folder.mkdir()
    if base == "stories":
        for name in ("tokenizer.json", CONFIG, SPECIALS):
            shutil.copyfile(assets / "models/stories260K/hf" / name, folder / name)
    elif base in ("llama2", "mistral-v1"):
        shutil.copyfile(assets / "tokenizers" / base / "tokenizer.model", folder / "tokenizer.model")
    elif base == "mistral.json":
        held = json.loads((assets / "tokenizers/mistral-v1/tokenizer.json").read_text("utf-8"))
        (folder / "tokenizer.json").write_text(json.dumps(cut(held, 3000)))
    elif base == "phi-2":
        held = json.loads((assets / "tokenizers/phi-2/tokenizer.json").read_text("utf-8"))
        (folder / "tokenizer.json").write_text(json.dumps(cut(held, 3000)))
        config = json.loads((assets / "tokenizers/phi-2" / CONFIG).read_text("utf-8"))
        by_text = {entry["content"]: str(entry["id"]) for entry in cut(held, 3000)["added_tokens"]}
        config["added_tokens_decoder"] = {by_text[e["content"]]: e for e in config["added_tokens_decoder"].values()}
        (folder / CONFIG).write_text(json.dumps(config))
    elif base == "gpt2":
        merges = (assets / "tokenizers/gpt2/merges.txt").read_text("utf-8").splitlines()[:2000]
        vocab = json.loads((assets / "tokenizers/gpt2/vocab.json").read_text("utf-8"))
        kept = [text for text, token in vocab.items() if token < 256] + ["".join(m.split()) for m in merges[1:]]
        kept.append("<|endoftext|>")
        (folder / "vocab.json").write_text(json.dumps({text: i for i, text in enumerate(kept)}))
        (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    elif base == "tiktoken":
        shutil.copyfile(assets / "tokenizers/tiny-tiktoken/tiktoken_small.model", folder / "tokenizer.model")


def cut(held: dict[str, Any], size: int) -> dict[str, Any]:
    """A tokenizer.json with the first `size` tokens; added tokens behind them follow."""
    vocab = {text: token for text, token in held["model"]["vocab"].items() if token < size}
    merges = [m.split(" ") if isinstance(m, str) else m for m in held["model"]["merges"]]
    merges = [[a, b] for a, b in merges if a in vocab and b in vocab and a + b in vocab]
    added = [entry for entry in held["added_tokens"] if entry["content"] in vocab]
    behind = [entry for entry in held["added_tokens"] if entry["content"] not in vocab]
    added += [entry | {"id": size + i} for i, entry in enumerate(behind)]
    model = held["model"] | {"vocab": vocab, "merges": merges}
    return held | {"model": model, "added_tokens": added}


def save(case: Case, assets: Path, folder: Path) -> None:
    base_folder(assets, case.base, folder)
    config = folder / CONFIG
    if case.config is None:
        config.unlink(missing_ok=True)
    else:
        held = json.loads(config.read_text("utf-8")) if config.exists() else {}
        config.write_text(json.dumps(held | case.config))
    if case.model is not None:
        (folder / "config.json").write_text(json.dumps(case.model))
    for name, content in (case.files or {}).items():
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    if case.edit is not None:
        held = json.loads((folder / "tokenizer.json").read_text("utf-8"))
        held = case.edit(held) or held
        (folder / "tokenizer.json").write_text(json.dumps(held))


def by_id(first: int, *tokens: dict[str, Any]) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(first + i): token for i, token in enumerate(tokens)}}


def without_post_processor(held: dict[str, Any]) -> None:
    held["post_processor"] = None


def with_eos_behind(held: dict[str, Any]) -> None:
    held["post_processor"]["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
    held["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}


def with_added(*tokens: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    def edit(held: dict[str, Any]) -> None:
        first = 1 + max([*held["model"]["vocab"].values(), *(entry["id"] for entry in held["added_tokens"])])
        held["added_tokens"] += [entry | {"id": first + i} for i, entry in enumerate(tokens)]

    return edit


FLAGGED = [
    token("<tool>", lstrip=True, special=False),
    token("<new>", rstrip=True, special=False),
    token("tool", single_word=True, normalized=True, special=False),
]
LLAMA = {"tokenizer_class": "LlamaTokenizer"}
CASES = [
    # tokenizer.json as it is.
    Case("as it is", "stories", {}),
    Case("no config", "stories", None),
    Case("nothing beside it", "stories", None, files={SPECIALS: None}),
    Case("added_tokens_decoder", "stories", by_id(512, *CHATML)),
    Case("added_tokens_decoder as eos", "stories", by_id(512, *CHATML) | {"eos_token": "<|im_end|>"}),
    Case("ordinary added tokens", "stories", by_id(512, *FLAGGED)),
    Case("flags of specials", "stories", by_id(512, special("<tool>", lstrip=True, rstrip=True), CHATML[0])),
    Case("ids out of order", "stories", {"added_tokens_decoder": {"513": CHATML[1], "512": CHATML[0]}}),
    Case("eos that no file has", "stories", {"eos_token": "<|im_end|>"}, files={SPECIALS: None}),
    Case("pad and mask", "stories", {"pad_token": "<pad>", "mask_token": "<MASK>"}),
    Case("pad as an object", "stories", {"pad_token": token("<pad>", lstrip=True) | {"__type": "AddedToken"}}),
    Case("a token by a name of its own", "stories", {"tool_token": "<tool>"}),
    Case("additional_special_tokens", "stories", {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}),
    Case("extra_special_tokens", "stories", {"extra_special_tokens": ["<|im_end|>", "<tool>"]}),
    Case("extra_special_tokens by name", "stories", {"extra_special_tokens": {"image_token": "<tool>"}}),
    Case("both lists", "stories", {"extra_special_tokens": ["<tool>"], "additional_special_tokens": ["<new>"]}),
    Case("specials map", "stories", {}, files={SPECIALS: {"eos_token": "</s>", "pad_token": token("<pad>")}}),
    Case("map and list", "stories", {}, files={SPECIALS: {"additional_special_tokens": ["<|im_end|>", "<new>"]}}),
    Case("map overrides config", "stories", {"pad_token": "<pad>"}, files={SPECIALS: {"pad_token": "<MASK>"}}),
    Case("map beside a decoder", "stories", by_id(512, CHATML[0]), files={SPECIALS: {"pad_token": "<pad>"}}),
    Case("added_tokens.json", "stories", {}, files={ADDED: {"<|im_start|>": 512, "<tool>": 513}}),
    Case("added and special", "stories", {"pad_token": "<tool>"}, files={ADDED: {"<new>": 512, "<tool>": 513}}),
    Case("added beside a decoder", "stories", by_id(512, CHATML[0]), files={ADDED: {"<tool>": 512}}),
    Case(
        "an empty decoder", "stories", {"added_tokens_decoder": {}, "pad_token": "<pad>"}, files={ADDED: {"<tool>": 9}}
    ),
    Case("tokens of its own", "stories", {}, edit=with_added(*CHATML, *FLAGGED)),
    Case("its own tokens, declared again", "stories", by_id(512, *CHATML), edit=with_added(*CHATML)),
    Case(
        "its own tokens, other flags",
        "stories",
        by_id(512, FLAGGED[0] | {"lstrip": False}),
        edit=with_added(FLAGGED[0]),
    ),
    Case("its own token as eos", "stories", {"eos_token": "<new>"}, edit=with_added(FLAGGED[1])),
    Case("no such id", "stories", by_id(600, *CHATML), refused="gives '<|im_start|>' the id 600, .* is 512"),
    Case(
        "a gap", "stories", {"added_tokens_decoder": {"512": CHATML[0], "514": CHATML[1]}}, refused="id 514, .* is 513"
    ),
    Case("an id of another token", "stories", by_id(7, CHATML[0]), refused="id 7, .* is 512"),
    Case(
        "a flag that is no flag", "stories", by_id(512, special("<tool>") | {"strip": True}), refused="has strip = True"
    ),
    Case("a flag of another kind", "stories", by_id(512, special("<tool>") | {"lstrip": "yes"})),
    Case("split_special_tokens", "stories", {"split_special_tokens": True}, refused="split_special_tokens = True"),
    # BOS and EOS of tokenizer.json.
    Case(
        "add_bos_token false", "stories", {"add_bos_token": False}, differs="add_bos_token is false .* takes precedence"
    ),
    Case("add_bos_token true", "stories", {"add_bos_token": True}),
    Case(
        "no post-processor",
        "stories",
        {"add_bos_token": True},
        edit=without_post_processor,
        differs="add_bos_token is true",
    ),
    Case("bos null", "stories", {"bos_token": None}, files={SPECIALS: None}),
    Case(
        "another bos",
        "stories",
        {"bos_token": "<|im_start|>"},
        files={SPECIALS: None},
        differs="bos_token is '<.im_start",
    ),
    Case("eos behind", "stories", {}, edit=with_eos_behind, differs="appends '</s>'"),
    # Classes that bring a pipeline of their own.
    Case("class Llama", "mistral.json", LLAMA, differs="tokenizer_class is LlamaTokenizer"),
    Case("class LlamaFast, legacy", "mistral.json", {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}),
    Case("class Llama, no prefix", "mistral.json", LLAMA | {"add_prefix_space": False}),
    Case("class Llama, chat", "mistral.json", LLAMA | {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}),
    Case("class Llama in a Mistral", "mistral.json", LLAMA, {"model_type": "mistral"}),
    Case("class of config.json", "mistral.json", {}, {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}),
    Case("class generic", "mistral.json", {"tokenizer_class": "PreTrainedTokenizerFast"}, {"model_type": "llama"}),
    Case("class unknown", "mistral.json", {"tokenizer_class": "NoSuchTokenizer"}),
    Case("class Llama, byte-level file", "phi-2", LLAMA),
    Case("class Gemma", "mistral.json", {"tokenizer_class": "GemmaTokenizer"}),
    Case("Llama on another model", "stories", LLAMA, {"model_type": "qwen2"}),
    Case("phi-2", "phi-2", {}),
    Case("phi-2, a space in front", "phi-2", {"add_prefix_space": True}),
    Case("phi-2 as Qwen2", "phi-2", {"tokenizer_class": "Qwen2Tokenizer"}),
    # vocab.json and merges.txt.
    Case("GPT2", "gpt2", {"tokenizer_class": "GPT2Tokenizer"}),
    Case(
        "GPT2, BOS and more",
        "gpt2",
        {"tokenizer_class": "GPT2TokenizerFast", "add_bos_token": True, "pad_token": "<pad>"},
    ),
    Case("CodeGen", "gpt2", {"tokenizer_class": "CodeGenTokenizer", "add_prefix_space": True}),
    Case("Qwen2", "gpt2", {"tokenizer_class": "Qwen2Tokenizer"} | by_id(2255 + 1, *CHATML)),
    Case("Qwen2 by its model", "gpt2", {}, {"model_type": "qwen2"}),
    Case("no class", "gpt2", {}),
    Case("Llama of vocab.json", "gpt2", LLAMA, refused="sets no tokenizer_class that reads it"),
    # tokenizer.model.
    Case("Llama 2", "llama2", LLAMA | {"add_bos_token": True}, differs="other ids for runs of spaces"),
    Case("Llama 2, legacy", "llama2", LLAMA | {"add_bos_token": False, "legacy": True}),
    Case("Llama 2, chat", "llama2", LLAMA | by_id(32000, *CHATML, FLAGGED[0]) | {"add_bos_token": True}),
    Case(
        "Llama 2, added_tokens.json",
        "llama2",
        LLAMA | {"add_bos_token": True},
        files={ADDED: {"<pad>": 32000, "<tool>": 32001}},
    ),
    Case(
        "Mistral, EOS",
        "mistral-v1",
        LLAMA | {"add_bos_token": True, "add_eos_token": True},
        differs="add_eos_token is true",
    ),
    Case("Llama 2, no switch", "llama2", LLAMA, differs="add_bos_token is not set"),
    Case("Llama 2, no class", "llama2", {"pad_token": "<pad>"}, differs="omits the space in front"),
    Case(
        "GPT2 of tokenizer.model",
        "llama2",
        {"tokenizer_class": "GPT2Tokenizer"},
        refused="which does not read tokenizer.model",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_edited_folder_gives_the_ids_of_transformers(case: Case, assets: Path, tmp_path: Path):
    import transformers

    folder = tmp_path / "folder"
    save(case, assets, folder)
    if case.refused is not None:
        with pytest.raises(UserError, match=case.refused) as refused:
            load_tokenizer(folder)
        assert str(folder) in str(refused.value)
        return
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
    except Exception:
        with pytest.raises(UserError, match=re.escape(str(folder))):
            load_tokenizer(folder)
        return
    ours = load_tokenizer(folder)
    assert [note for note in ours.notes if re.search(case.differs or "^tokenizer_class is", note)] or not case.differs
    for text in TEXTS if case.base in SENTENCEPIECE else TEXTS + SPACES:
        ids = ours.encode(text, bos=False, specials=True)
        if case.name not in BY_SENTENCEPIECE:
            assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        # The text of specials stays text in data.
        assert not ours.backend.special_ids.intersection(ours.encode(text, bos=False)), text
    bare, framed = (theirs("a", add_special_tokens=more)["input_ids"] for more in (False, True))
    if case.name not in BY_SENTENCEPIECE:
        assert ours.encode("a") == framed[: len(framed) - (framed[-1] != bare[-1])]
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.base in SENTENCEPIECE and case.refused is None],
    ids=lambda case: case.name,
)
def test_tokenizer_model_gives_the_ids_of_sentencepiece(case: Case, assets: Path, tmp_path: Path):
    """Also for runs of spaces, where transformers 5 gives others."""
    folder = tmp_path / "folder"
    save(case, assets, folder)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = load_tokenizer(folder)
    texts = [TEXTS[0], "é 日本語 😀 naïve", "tab\tnew\n\nline ", *SPACES]
    chance = random.Random(0)
    texts += [f"a{' ' * n}b" for n in range(100)]
    texts += ["x" + "".join(" " * chance.randrange(20) + chance.choice("a-b\n") for _ in range(9)) for _ in range(99)]
    assert ours.encode_batch(texts, bos=False) == model.encode(texts)
