"""The pipelines (normalizer, pre-tokenizer, decoder) of the tokenizer classes of transformers 5.

Some classes use tokenizer.json unchanged. Others take only its vocabulary, merges and post-processor, and have their
own pipeline; these classes are below. Source: transformers 5.23, models/*/tokenization_*.py and
models/auto/tokenization_auto.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camelid.errors import UserError
from camelid.text.added_tokens import CONFIG, read_object
from camelid.text.sentencepiece_model import BPE, SPACE, UNKNOWN, SentencePieceModel

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]
"""Tokens with their ids, and merges in the order of their ranks."""

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
GENERIC = "TokenizersBackend"
"""The class that uses tokenizer.json unchanged."""
BY_MODEL_TYPE = {
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_moe", "qwen2_moe"), "Qwen2Tokenizer"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer"),
    **dict.fromkeys(("gpt2", "phi", "codegen"), "GPT2Tokenizer"),
    **dict.fromkeys(("mistral", "mixtral", "ministral", "phi3"), GENERIC),
}
OVERRULED = ("qwen2", "phi3")
"""Model types whose class takes precedence over tokenizer_config.json."""


@dataclass(frozen=True)
class Pipeline:
    """A tokenizer class of transformers with its own pipeline."""

    build: "Callable[[Vocabulary, Mapping[str, Any]], Tokenizer]"
    """Builds the tokenizer of a vocabulary and the fields of tokenizer_config.json, without added tokens."""
    named: Mapping[str, str | None]
    """Default special tokens."""
    reads_sentencepiece: bool = False
    """Whether the class reads tokenizer.model; the others read vocab.json with merges.txt."""


def class_name(folder: Path, config: Mapping[str, Any], *, byte_level: bool) -> str:
    """The class that AutoTokenizer of transformers uses for a folder; `byte_level` describes its tokenizer.json."""
    model = read_object(folder / "config.json")
    model_type = model.get("model_type")
    declared = config.get("tokenizer_class") or model.get("tokenizer_class")
    if declared is not None and not isinstance(declared, str):
        raise UserError(f"{folder / CONFIG} has tokenizer_class = {declared!r:.60}", "Name a class of transformers.")
    if declared is not None:
        # Since transformers 5 the suffix means nothing, except in PreTrainedTokenizerFast, the generic class.
        declared = declared.removesuffix("Fast")
    known = BY_MODEL_TYPE.get(model_type) if isinstance(model_type, str) else None
    if declared == "LlamaTokenizer" and byte_level and model_type not in OVERRULED:
        return GENERIC
    if declared is None or (known is not None and model_type in OVERRULED):
        return known or GENERIC
    if known == GENERIC:
        return GENERIC
    return declared if declared in PIPELINES else GENERIC


def read_json_vocabulary(file: Path, described: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary and merges of a tokenizer.json; raises UserError if its model is not BPE."""
    model = described.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise UserError(
            f"{file} does not contain a BPE model, which the tokenizer_class of {CONFIG} needs",
            f"Set tokenizer_class in {CONFIG} to PreTrainedTokenizerFast to use the file unchanged.",
        )
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges", [])]
    return model["vocab"], [(left, right) for left, right in pairs]


def read_vocab_and_merges(folder: Path) -> Vocabulary:
    """The vocabulary of vocab.json and the merges of merges.txt."""
    vocab = read_object(folder / "vocab.json")
    file = folder / "merges.txt"
    if odd := [text for text, token in vocab.items() if type(token) is not int]:
        raise UserError(f"{folder / 'vocab.json'} gives {odd[0]!r} the id {vocab[odd[0]]!r}", "Map tokens to ids.")
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {error}", "Copy it to the folder of vocab.json.") from error
    merges = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#version"):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise UserError(
                f"{file}:{number} is {line!r:.60}, not two tokens", "Copy the file from the original checkpoint again."
            )
        merges.append((pair[0], pair[1]))
    return vocab, merges


def _bpe(vocabulary: Vocabulary, **options: Any) -> "Tokenizer":
    import tokenizers

    vocab, merges = vocabulary
    try:
        return tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, **options))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(
            f"the vocabulary and the merges do not match: {error}", "Take both from the same model."
        ) from error


def sentencepiece_pipeline(pieces: SentencePieceModel) -> "Tokenizer":
    """A tokenizer that encodes and decodes as sentencepiece does; the model must satisfy `is_bpe`."""
    from tokenizers import Regex, decoders, normalizers

    unknown = next((pieces.pieces[i].text for i in pieces.ids(UNKNOWN)), None)
    tokenizer = _bpe(vocabulary_of(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    steps = []
    if pieces.remove_extra_whitespaces:
        within = normalizers.Replace(Regex(" {2,}"), " ")
        steps += [within, normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(rf"[ {SPACE}]+\z"), "")]
    if pieces.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if pieces.add_dummy_prefix:
        # sentencepiece strips all leading spaces of a decoded text if it removes them when it encodes.
        decoding.append(decoders.Strip(" ", 1024 if pieces.remove_extra_whitespaces else 1, 0))
    tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def is_bpe(pieces: SentencePieceModel) -> bool:
    """Whether `tokenizers` can encode as this model does: BPE with byte fallback and without character replacements."""
    return pieces.model_type == BPE and pieces.byte_fallback and not pieces.charsmap


def vocabulary_of(pieces: SentencePieceModel) -> Vocabulary:
    """The vocabulary and merges of a sentencepiece model."""
    return {piece.text: i for i, piece in enumerate(pieces.pieces)}, pieces.merges


def _llama(vocabulary: Vocabulary, config: Mapping[str, Any]) -> "Tokenizer":
    from tokenizers import decoders, pre_tokenizers

    tokenizer = _bpe(vocabulary, fuse_unk=True, byte_fallback=True)
    prefixed = config.get("add_prefix_space") is not False
    # With `legacy`, a space is also prepended to the text after each special token.
    scheme = ("always" if config.get("legacy") else "first") if prefixed else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefixed else [])])
    return tokenizer


def _gemma(vocabulary: Vocabulary, config: Mapping[str, Any]) -> "Tokenizer":
    from tokenizers import decoders, normalizers, pre_tokenizers

    unknown = config.get("unk_token") or "<unk>"
    unknown = unknown["content"] if isinstance(unknown, dict) else unknown
    tokenizer = _bpe(vocabulary, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _gpt2(vocabulary: Vocabulary, config: Mapping[str, Any]) -> "Tokenizer":
    from tokenizers import decoders, pre_tokenizers

    tokenizer = _bpe(vocabulary, continuing_subword_prefix="", end_of_word_suffix="")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _qwen2(vocabulary: Vocabulary, config: Mapping[str, Any]) -> "Tokenizer":
    from tokenizers import normalizers

    tokenizer = byte_level_pipeline(vocabulary, QWEN2, bool(config.get("add_prefix_space")))
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def byte_level_pipeline(
    vocabulary: Vocabulary, pattern: str, add_prefix_space: bool = False, **options: Any
) -> "Tokenizer":
    """Byte-level BPE of a text that a regular expression has split."""
    from tokenizers import Regex, decoders, pre_tokenizers

    tokenizer = _bpe(vocabulary, continuing_subword_prefix="", end_of_word_suffix="", **options)
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


_END = "<|endoftext|>"
PIPELINES = {
    "LlamaTokenizer": Pipeline(
        _llama, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, reads_sentencepiece=True
    ),
    "GemmaTokenizer": Pipeline(
        _gemma,
        {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
            "mask_token": "<mask>",
        },
        reads_sentencepiece=True,
    ),
    "GPT2Tokenizer": Pipeline(_gpt2, {"bos_token": _END, "eos_token": _END, "unk_token": _END}),
    "CodeGenTokenizer": Pipeline(_gpt2, {"bos_token": _END, "eos_token": _END, "unk_token": _END}),
    "Qwen2Tokenizer": Pipeline(_qwen2, {"eos_token": _END, "unk_token": _END, "pad_token": _END}),
}
