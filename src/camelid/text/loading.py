"""Loading of a vocabulary with the files in its folder: the tokenizer class, added tokens, BOS and EOS."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camelid.errors import UserError
from camelid.inputs import read_text, refuse_stand_in
from camelid.text import tiktoken
from camelid.text.added_tokens import (
    ADDED,
    CONFIG,
    SPECIALS,
    DeclaredTokens,
    add_tokens,
    read_declared_tokens,
    read_object,
    with_defaults,
)
from camelid.text.backends import SentencePieceBackend, TokenizersBackend, parse_tokenizer_json
from camelid.text.hf_pipelines import (
    GENERIC,
    PIPELINES,
    class_name,
    is_bpe,
    read_json_vocabulary,
    read_vocab_and_merges,
    sentencepiece_pipeline,
    vocabulary_of,
)
from camelid.text.sentencepiece_model import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePieceModel,
    read_sentencepiece_model,
)

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

JSON, MODEL, VOCAB = "tokenizer.json", "tokenizer.model", "vocab.json"
VOCABULARIES = (JSON, MODEL, VOCAB)
"""Names of vocabulary files, in the order of preference of transformers."""


@dataclass(frozen=True)
class LoadedVocabulary:
    """A vocabulary with what the other files of its folder specify."""

    backend: TokenizersBackend | SentencePieceBackend
    declared: DeclaredTokens
    bos: str | None
    """The token that is prepended to a text by default."""
    eos_ids: tuple[int, ...] = ()
    """End-of-text ids that the file of the vocabulary defines."""
    determined_by_file: bool = False
    """Whether the vocabulary file alone gives the same ids: no other file adds tokens or changes the pipeline."""
    notes: tuple[str, ...] = ()


def vocabulary_file(path: Path) -> Path:
    """The vocabulary file of a folder; `path` itself if it is a file."""
    if path.is_file():
        return path
    found = [path / name for name in VOCABULARIES if (path / name).is_file()]
    if not found:
        raise UserError(
            f"no tokenizer: looked for {', '.join(str(path / name) for name in VOCABULARIES)}",
            "Give a folder or file of a tokenizer.",
        )
    if found[0].name == MODEL and found[-1].name == VOCAB and (path / "merges.txt").is_file():
        kind = PIPELINES.get(class_name(path, read_object(path / CONFIG), byte_level=False))
        return found[0] if kind is None or kind.reads_sentencepiece else found[-1]
    return found[0]


def load_vocabulary(file: Path) -> LoadedVocabulary:
    """Loads a vocabulary and the other files of its folder; raises UserError that names what is not supported."""
    if file.name == VOCAB:
        return _from_vocab_and_merges(file)
    if file.suffix == ".json":
        return _from_json(file)
    return _from_tiktoken(file) if tiktoken.is_tiktoken(file) else _from_sentencepiece(file)


def _from_json(file: Path) -> LoadedVocabulary:
    """Loads tokenizer.json, unchanged or with the pipeline of its class. Its post-processor determines BOS and EOS."""
    folder = file.parent
    serialized = read_text(file)
    given = parse_tokenizer_json(file, serialized)
    declared = read_declared_tokens(folder, given.get_added_tokens_decoder())
    name = class_name(folder, declared.config, byte_level='"ByteLevel"' in serialized)
    notes: tuple[str, ...] = ()
    if name == GENERIC:
        tokenizer = given
    else:
        held = json.loads(serialized)
        tokenizer = PIPELINES[name].build(read_json_vocabulary(file, held), declared.config)
        if given.post_processor is not None:
            tokenizer.post_processor = given.post_processor
        declared = with_defaults(declared, PIPELINES[name].named)
        notes = _changed(file, name, held, json.loads(tokenizer.to_str()))
    added = add_tokens(tokenizer, declared)
    determined_by_file = not added if tokenizer is given else tokenizer.to_str() == given.to_str()
    if not determined_by_file:
        serialized = tokenizer.to_str()
    bos, eos = _frame(file, tokenizer)
    notes += _switches(declared, bos, eos)
    return LoadedVocabulary(
        TokenizersBackend(file, serialized), declared, bos, determined_by_file=determined_by_file, notes=notes
    )


def _from_vocab_and_merges(file: Path) -> LoadedVocabulary:
    """Loads vocab.json with merges.txt, for the classes that read them."""
    folder = file.parent
    declared = read_declared_tokens(folder)
    name = class_name(folder, declared.config, byte_level=False)
    kind = PIPELINES.get(name)
    if kind is None or kind.reads_sentencepiece:
        known = ", ".join(name for name, kind in PIPELINES.items() if not kind.reads_sentencepiece)
        raise UserError(
            f"{file} does not define how a text is split, and {folder / CONFIG} sets no tokenizer_class that reads it",
            f"Set tokenizer_class to one of {known}, or save the tokenizer as tokenizer.json.",
        )
    tokenizer = kind.build(read_vocab_and_merges(folder), declared.config)
    declared = with_defaults(declared, kind.named)
    return _with_switches(file, tokenizer, declared, adds_bos=False)


def _from_tiktoken(file: Path) -> LoadedVocabulary:
    """Loads Meta's tokenizer.model of Llama 3."""
    declared = read_declared_tokens(file.parent)
    tokenizer = tiktoken.build(file, declared)
    declared = with_defaults(declared, {"bos_token": tiktoken.BOS, "eos_token": tiktoken.EOS})
    add_tokens(tokenizer, declared)
    bos = declared.named["bos_token"]
    adds_bos = declared.config.get("add_bos_token") in (None, True)  # the default of Meta's code
    tiktoken.set_bos(tokenizer, bos.content if bos is not None and adds_bos else None)
    ends = (tiktoken.EOS, tiktoken.END_OF_MESSAGE, tiktoken.END_OF_TURN)
    eos_ids = tuple(token for token in map(tokenizer.token_to_id, ends) if token is not None)
    backend = TokenizersBackend(file, tokenizer.to_str())
    return LoadedVocabulary(backend, declared, bos.content if bos is not None and adds_bos else None, eos_ids)


def _from_sentencepiece(file: Path) -> LoadedVocabulary:
    """Loads a tokenizer.model of sentencepiece, with the pipeline of its class if tokenizer_config.json sets one."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except RuntimeError as error:
        refuse_stand_in(file)
        raise UserError(
            f"{file} is neither a sentencepiece model nor a list of tiktoken ranks", "Download it again."
        ) from error
    pieces = read_sentencepiece_model(model.serialized_model_proto())
    declared = read_declared_tokens(file.parent)
    name = class_name(file.parent, declared.config, byte_level=False)
    kind = PIPELINES.get(name)
    if kind is not None and not kind.reads_sentencepiece:
        raise UserError(
            f"{file.parent / CONFIG} has tokenizer_class = {name!r}, which does not read {file.name}",
            "Correct tokenizer_class, or add the vocabulary of that class to the folder.",
        )
    own = {
        f"{key}_token": model.id_to_piece(token)
        for key, token in (("bos", model.bos_id()), ("eos", model.eos_id()), ("unk", model.unk_id()))
        if token >= 0
    }
    special_pieces = _special_pieces(pieces)
    declared = with_defaults(declared, own if kind is None else {**kind.named, **own})
    if declared.extra is None:
        declared = dataclasses.replace(declared, extra=special_pieces)
    if not is_bpe(pieces):
        return _by_sentencepiece(file, model, declared)
    # The classes of transformers ignore how the model treats spaces.
    build = None if kind is None or pieces.remove_extra_whitespaces or not pieces.add_dummy_prefix else kind.build
    tokenizer = sentencepiece_pipeline(pieces) if build is None else build(vocabulary_of(pieces), declared.config)
    loaded = _with_switches(file, tokenizer, declared, adds_bos="bos_token" in own)
    # The added tokens if there were no other files; all of them are pieces, which have ids already.
    own_tokens = with_defaults(DeclaredTokens(file.parent, extra=special_pieces), own).new_tokens(())
    added = tokenizer.get_added_tokens_decoder().values()
    return dataclasses.replace(
        loaded,
        determined_by_file=build is None and set(map(repr, added)) == set(map(repr, own_tokens)),
        notes=(*loaded.notes, *_unlike_transformers(declared, kind is None, pieces)),
    )


def _by_sentencepiece(file: Path, model: Any, declared: DeclaredTokens) -> LoadedVocabulary:
    """Loads a model that only sentencepiece itself can encode, to which no token can be added."""
    known = {model.id_to_piece(i) for i in range(len(model))}
    if new := [token.content for token in declared.new_tokens(known) if token.content not in known]:
        raise UserError(
            f"{file} is not a byte-level BPE model of sentencepiece, and the files add {new[0]!r} to it",
            f"Save the tokenizer as {JSON}, or remove the token from {CONFIG}, {ADDED} and {SPECIALS}.",
        )
    bos = declared.named.get("bos_token")
    adds_bos = declared.config.get("add_bos_token") in (None, True)
    return LoadedVocabulary(
        SentencePieceBackend(model), declared, bos.content if bos is not None and adds_bos else None
    )


def _special_pieces(pieces: SentencePieceModel) -> "tuple[AddedToken, ...]":
    from tokenizers import AddedToken

    found = ((pieces.pieces[i].text, pieces.pieces[i].type) for i in pieces.ids(UNKNOWN, CONTROL, USER_DEFINED))
    return tuple(AddedToken(text, normalized=False, special=kind != USER_DEFINED) for text, kind in found)


def _frame(file: Path, tokenizer: "Tokenizer") -> tuple[str | None, str | None]:
    """The tokens that the post-processor prepends and appends to a text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a").ids
    ahead = next((at for at in range(len(framed) + 1) if framed[at : at + len(bare)] == bare), len(framed) + 1)
    head, tail = framed[:ahead], framed[ahead + len(bare) :]
    if ahead > len(framed) or max(len(head), len(tail)) > 1:
        raise UserError(
            f"the post_processor of {file} turns {bare} into {framed}",
            "It may prepend and append at most one token each: BOS and EOS.",
        )
    first, last = (tokenizer.id_to_token(ids[0]) if ids else None for ids in (head, tail))
    return first, last


def _with_switches(file: Path, tokenizer: "Tokenizer", declared: DeclaredTokens, *, adds_bos: bool) -> LoadedVocabulary:
    """Loads a vocabulary without a post-processor: add_bos_token determines BOS, by default `adds_bos`."""
    add_tokens(tokenizer, declared)
    said = declared.config.get("add_bos_token")
    bos = declared.named.get("bos_token")
    adds = adds_bos if said is None else bool(said)
    notes = ()
    if declared.config and said is None and adds and bos is not None:
        notes += (
            f"add_bos_token is not set in {CONFIG}: BOS is prepended to a text, as in Llama's own code and in "
            "transformers 4; transformers 5 prepends none",
        )
    if declared.config.get("add_eos_token"):
        notes += (_appended(f"add_eos_token is true in {CONFIG}"),)
    backend = TokenizersBackend(file, tokenizer.to_str())
    return LoadedVocabulary(backend, declared, bos.content if adds and bos is not None else None, notes=notes)


# Notes.


def _switches(declared: DeclaredTokens, bos: str | None, eos: str | None) -> tuple[str, ...]:
    """Notes on settings of BOS and EOS that contradict the post-processor of tokenizer.json, which takes precedence."""
    notes = []
    said = declared.config.get("add_bos_token")
    if said is not None and bool(said) != (bos is not None):
        does = "prepends none" if bos is None else f"prepends {bos!r}"
        notes.append(
            f"add_bos_token is {json.dumps(said)} in {CONFIG}, and the post_processor of the tokenizer {does}: as in "
            "transformers 5, the post_processor takes precedence (add_bos of a source and bos= of encode override it)"
        )
    named = declared.named.get("bos_token")
    if bos is not None and named is not None and named.content not in ("", bos):
        notes.append(f"bos_token is {named.content!r} in {CONFIG}; texts begin with the post_processor's {bos!r}")
    if eos is not None:
        notes.append(_appended(f"the post_processor of the tokenizer appends {eos!r}"))
    return tuple(notes)


def _appended(why: str) -> str:
    return f"{why}: EOS is appended to documents by add_eos of their source, and never to a prompt"


def _changed(file: Path, name: str, given: Mapping[str, Any], built: Mapping[str, Any]) -> tuple[str, ...]:
    parts = ("normalizer", "pre_tokenizer")
    if all(given.get(part) == built.get(part) for part in parts):
        return ()
    return (
        f"tokenizer_class is {name}: as in transformers 5, its normalizer and pre_tokenizer replace those of "
        f"{file.name} (PreTrainedTokenizerFast keeps them)",
    )


def _unlike_transformers(declared: DeclaredTokens, generic: bool, pieces: SentencePieceModel) -> tuple[str, ...]:
    """Notes on differences from the ids of transformers 5 for a tokenizer.model."""
    if not declared.config:
        return ()
    if generic:
        return (
            "tokenizer.model is encoded as sentencepiece does; transformers 5 omits the space in front of a text "
            f"if {CONFIG} does not name LlamaTokenizer",
        )
    scores = [piece.score for piece in pieces.pieces if piece.type == NORMAL]
    if scores != sorted(scores, reverse=True):
        return (
            "tokenizer.model is encoded by its scores, as sentencepiece does; transformers 5 merges by id and gives "
            "other ids for runs of spaces if there is no tokenizer.json",
        )
    return ()
