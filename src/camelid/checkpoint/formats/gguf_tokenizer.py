"""Writes a tokenizer into the metadata of a GGUF file, so that llama.cpp and Ollama need no other file.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from camelid.checkpoint.containers.gguf_file import ARRAY, BOOL, FLOAT32, INT32, TEXT, UINT32
from camelid.checkpoint.formats.gguf_bpe import from_byte_fallback, from_byte_level, from_sentencepiece
from camelid.checkpoint.formats.gguf_tokens import ADVICE, UNKNOWN, UNUSED, Vocabulary
from camelid.disk.json_files import read_json
from camelid.errors import UserError
from camelid.interrupts import cleaned_up
from camelid.text.backends import TokenizersBackend
from camelid.text.tokenizer import TOKENIZER_FILES, Tokenizer, find_tokenizer

NO_VOCABULARY: Mapping[str, tuple[int, Any]] = {"tokenizer.ggml.model": (TEXT, "no_vocab")}


def tokenizer_metadata(
    companions: Sequence[Path], vocab_size: int
) -> tuple[dict[str, tuple[int, Any]], Tokenizer | None, tuple[str, ...]]:
    """Returns the metadata of the tokenizer among a model's files, as key to (type, value); the tokenizer; and notes.

    The vocabulary gets the size of the model's: ids without a token are named [PAD0] and so on, as by llama.cpp's
    converter. Raises UserError for a tokenizer whose ids llama.cpp would not reproduce.
    """
    with _loaded(companions) as tokenizer:
        if tokenizer is None:
            note = "the source has no tokenizer, so the GGUF file has none; llama.cpp opens it for token ids alone"
            return dict(NO_VOCABULARY), None, (note,)
        vocabulary = _vocabulary(tokenizer)
        _fit(vocabulary, tokenizer, vocab_size)
        return _metadata(vocabulary, tokenizer, vocab_size), tokenizer, tuple(vocabulary.notes)


@contextlib.contextmanager
def _loaded(companions: Sequence[Path]) -> Iterator[Tokenizer | None]:
    """Yields the tokenizer of these files, None if there is none."""
    files = [file for file in companions if file.name in TOKENIZER_FILES and file.name != "generation_config.json"]
    if len(folders := {file.parent for file in files}) <= 1:
        yield find_tokenizer(folders.pop()) if folders else None
    else:
        with cleaned_up(), tempfile.TemporaryDirectory() as folder:
            for file in files:
                (Path(folder) / file.name).symlink_to(file.absolute())
            yield find_tokenizer(Path(folder))


def _vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    backend, file = tokenizer.backend, _vocabulary_file(tokenizer)
    described = json.loads(backend.serialized) if isinstance(backend, TokenizersBackend) else None
    if file.suffix == ".model" and (processor := _sentencepiece(file)) is not None:
        ids = sorted(backend.special_ids)
        specials = [{"id": token, "content": backend.decode([token]), "special": True} for token in ids]
        return from_sentencepiece(processor, specials if described is None else described["added_tokens"], file)
    assert isinstance(backend, TokenizersBackend)
    assert described is not None
    model = described["model"]
    name = "byte-level BPE" if backend.is_byte_level else "BPE"
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        name = str(model["type"])
    elif backend.is_byte_level and not model.get("byte_fallback"):
        return from_byte_level(backend, described, file)
    elif model.get("byte_fallback"):
        return from_byte_fallback(backend, described, file)
    raise UserError(f"{file} is a {name} tokenizer, which llama.cpp does not support for Llamas", ADVICE)


def _vocabulary_file(tokenizer: Tokenizer) -> Path:
    """Returns the file that contains the vocabulary; tokenizer.json is preferred to tokenizer.model."""
    return next(
        (file for name in ("tokenizer.json", "tokenizer.model") for file in tokenizer.files if file.name == name),
        tokenizer.files[0],
    )


def _sentencepiece(file: Path) -> Any:
    """Returns a SentencePieceProcessor, or None for the ranks of Llama 3, whose file has the same name."""
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    except RuntimeError:
        return None


def _fit(vocabulary: Vocabulary, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Extends or truncates the vocabulary to the model's size, which llama.cpp requires.

    Raises UserError if two tokens have the same text, which llama.cpp refuses.
    """
    texts, types, scores = vocabulary.texts, vocabulary.types, vocabulary.scores
    if beyond := sorted(token for token in texts if token >= vocab_size):
        vocabulary.notes.append(
            f"{tokenizer.files[0]} has {len(beyond)} more tokens than the model's vocabulary of {vocab_size}; "
            f"{texts[beyond[0]]!r} and the following tokens are left out"
        )
        for token in beyond:
            del texts[token], types[token]
    for token in range(vocab_size):
        if token not in texts:
            texts[token], types[token], scores[token] = f"[PAD{token}]", UNUSED, -10000.0
    seen: dict[str, int] = {}
    for token, text in texts.items():
        if (other := seen.setdefault(text, token)) != token:
            raise UserError(
                f"{tokenizer.files[0]} has the token {text!r} twice, as {other} and {token}, which llama.cpp refuses",
                ADVICE,
            )


def _metadata(vocabulary: Vocabulary, tokenizer: Tokenizer, vocab_size: int) -> dict[str, tuple[int, Any]]:
    ids = range(vocab_size)
    metadata: dict[str, tuple[int, Any]] = {
        "model": (TEXT, vocabulary.model),
        "pre": (TEXT, vocabulary.pre),
        "tokens": (ARRAY, (TEXT, [vocabulary.texts[token] for token in ids])),
        "token_type": (ARRAY, (INT32, [vocabulary.types[token] for token in ids])),
    }
    if vocabulary.model == "llama":
        metadata["scores"] = ARRAY, (FLOAT32, [vocabulary.scores[token] for token in ids])
    else:
        metadata["merges"] = ARRAY, (TEXT, vocabulary.merges)
    named = {name: tokenizer.backend.token_id(text) for name, text in tokenizer.named_specials.items()}
    unknown = next((token for token, type_ in vocabulary.types.items() if type_ == UNKNOWN), named.get("unk_token"))
    for name, token in (("unknown", unknown), ("padding", named.get("pad_token"))):
        if token is not None and token < vocab_size:
            metadata[f"{name}_token_id"] = UINT32, token
    flags = {"add_bos_token": tokenizer.adds_bos, "add_eos_token": _adds_eos(tokenizer), **vocabulary.flags}
    metadata |= {name: (BOOL, value) for name, value in flags.items()}
    return {f"tokenizer.ggml.{name}": value for name, value in metadata.items()} | _templates(tokenizer)


def _adds_eos(tokenizer: Tokenizer) -> bool:
    config = next((read_json(file) for file in tokenizer.files if file.name == "tokenizer_config.json"), {})
    return config.get("add_eos_token") is True and tokenizer.eos_id is not None


def _templates(tokenizer: Tokenizer) -> dict[str, tuple[int, Any]]:
    """Returns the chat template, and all other templates by name."""
    others = {name: text for name, text in tokenizer.chat_templates.items() if name != "default"}
    metadata: dict[str, tuple[int, Any]] = {
        f"tokenizer.chat_template.{name}": (TEXT, text) for name, text in others.items()
    }
    if others:
        metadata["tokenizer.chat_templates"] = ARRAY, (TEXT, list(others))
    if "default" in tokenizer.chat_templates:
        metadata["tokenizer.chat_template"] = TEXT, tokenizer.chat_templates["default"]
    return metadata
