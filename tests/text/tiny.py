"""A tokenizer that needs no assets: one id for every byte, so that a test can tell ids by eye."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

BOS, EOS = 256, 257
VOCAB_SIZE = 258


def save_byte_tokenizer(folder: Path, *, adds_bos: bool = True, config: dict | None = None) -> Path:
    """A folder with a byte-level tokenizer.json: id = byte, then `<s>` and `</s>`."""
    folder.mkdir(parents=True, exist_ok=True)
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte if byte in printable else 0x100 + others.index(byte)): byte for byte in range(256)}
    vocab |= {"<s>": BOS, "</s>": EOS}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>"} if config is None else config
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return folder
