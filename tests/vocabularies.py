"""Tokenizers for tests of GGUF files: real ones in folders, texts that are hard for them, and files that hold them."""

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from camelid.checkpoint.checkpoint import ExportSpec, companions_in
from camelid.checkpoint.registry import write_checkpoint
from camelid.model.params import named
from tiny import tiny_config, tiny_params

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(pattern: str) -> dict:
    """As tokenizer.json files have it: a pattern, then the alphabet of bytes."""
    parts = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [parts, BYTES | {"use_regex": False}]}


# By llama.cpp's name: the pre_tokenizer of a tokenizer.json, and whether it ignores merges.
PRE_TOKENIZERS: Mapping[str, tuple[dict, bool]] = {
    "gpt-2": (BYTES, False),
    "llama-bpe": (split(LLAMA3), True),
    "smaug-bpe": (split(LLAMA3), False),
    "qwen2": (split(QWEN2), False),
    "tekken": (split(TEKKEN), True),
    "smollm": ({"type": "Sequence", "pretokenizers": [DIGITS, BYTES]}, False),
}
SENTENCEPIECE = {
    "llama2": ("llama2/tokenizer.model",),
    "mistral, tokenizer.json": ("mistral-v1/tokenizer.json",),
}


def folder_of(assets: Path, name: str, folder: Path) -> Path:
    """A folder with a real tokenizer, for the byte-level ones with another pre-tokenizer than its own."""
    folder.mkdir()
    for file in SENTENCEPIECE.get(name, ()):
        shutil.copy(assets / "tokenizers" / file, folder)
    if name in SENTENCEPIECE:
        (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        return folder
    phi_2 = assets / "tokenizers" / "phi-2"
    described = json.loads((phi_2 / "tokenizer.json").read_text("utf-8"))
    if name == "phi-2":  # with its runs of spaces as added tokens
        shutil.copy(phi_2 / "tokenizer_config.json", folder)
    else:
        described["added_tokens"] = described["added_tokens"][:1]
        described["pre_tokenizer"], described["model"]["ignore_merges"] = PRE_TOKENIZERS[name]
        config = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "add_bos_token": False}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(described), "utf-8")
    return folder


NAMES = [*SENTENCEPIECE, "phi-2", *PRE_TOKENIZERS]


def write_gguf(path: Path, tokenizer: Path, vocab_size: int, format: str = "gguf") -> tuple[str, ...]:
    """A tiny model of one layer with the tokenizer of a folder; returns what camelid says of it."""
    config = tiny_config(
        num_layers=1, vocab_size=vocab_size, embed_dim=8, mlp_dim=8, head_dim=8, num_heads=1, num_kv_heads=1
    )
    leaves = named(tiny_params(config))
    dtypes = {name: np.dtype(leaf.dtype) for name, leaf in leaves.items()}

    def source(name: str, layer: int | None, index: tuple[slice, ...], dtype: np.dtype) -> np.ndarray:
        leaf = leaves[name] if layer is None else leaves[name][layer]
        return np.ascontiguousarray(np.asarray(leaf)[index], dtype)

    return write_checkpoint(path, ExportSpec(config, dtypes, source, companions_in(tokenizer)), format)


HARD = [
    *(
        "a",
        " a",
        "a ",
        "a  b",
        "  ",
        "Hello, world!",
        "I'll we'd YOU'RE it's THEY'VE",
        "123 1234567 3.14",
        "2024-11-30",
    ),
    *(
        "héllo",
        "你好,世界",
        "こんにちは",
        "🙂🙃 🧑\u200d🚀",
        "👩\u200d👩\u200d👧",
        "مرحبا بالعالم",
        "नमस्ते",
        "СПАСИБО",
        "ａｂｃ①②ﬁ",
    ),
    *("<s>", "</s>", "<|endoftext|>", "a<s>b", "<unk>", "  indented", "x\u200by\u00a0z", "https://x.y/z?q=1&b=2"),
    *("....!!!???", "'''\"\"\"", "▁a▁▁b", "e\u0301", "Ünïcödé", "\ud7ff\ue000\ufffd", "A_b-C+d=e"),
    *("", "\n", "\n\n", "a\nb", "\t", "a\tb\t\tc", "\r\n\r\n", "\x00\x01", "A" * 50, " " * 33),
]
LETTERS = "abc ABC  \n\t0123.,'!?éß你好🙂\u00a0mвS"


def hard_texts(count: int = 200) -> list[str]:
    """The same texts each time: of many scripts, and of random letters, spaces, line ends and digits."""
    draw = random.Random(0)
    texts = list(HARD)
    while len(texts) < count:
        texts.append("".join(draw.choice(LETTERS) for _ in range(draw.randrange(1, 40))))
    return texts
