"""From the files of a folder to an engine: the vocabulary, the class that encodes, and the declared tokens."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camelid.errors import UserError
from camelid.inputs import read_text, refuse_stand_in
from camelid.text import tiktoken
from camelid.text.backends import SentencePieceEngine, TokenizersEngine, parsed
from camelid.text.classes import (
    CLASSES,
    GENERIC,
    class_name,
    is_bpe,
    like_sentencepiece,
    read_json_vocabulary,
    read_vocab_and_merges,
    vocabulary_of,
)
from camelid.text.declared import ADDED, CONFIG, SPECIALS, STANDARD, Declared, read_declared, read_object
from camelid.text.pieces import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Pieces, read_pieces

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

JSON, MODEL, VOCAB = "tokenizer.json", "tokenizer.model", "vocab.json"
VOCABULARIES = (JSON, MODEL, VOCAB)
"""The files that hold a vocabulary, the one that transformers prefers first."""


@dataclass(frozen=True)
class Opened:
    """A vocabulary with everything that the files beside it say of it."""

    engine: TokenizersEngine | SentencePieceEngine
    declared: Declared
    bos: str | None
    """The token that is put in front of a text if the caller does not say otherwise."""
    eos_ids: tuple[int, ...] = ()
    """Ids that end a text by the vocabulary's own file."""
    by_file_alone: bool = False
    """Whether the vocabulary's file alone gives the same ids: no file beside it adds tokens or changes the pipeline."""
    notes: tuple[str, ...] = ()


def vocabulary_file(path: Path) -> Path:
    """The file that holds the vocabulary of a folder; `path` itself if it is a file."""
    if path.is_file():
        return path
    found = [path / name for name in VOCABULARIES if (path / name).is_file()]
    if not found:
        raise UserError(
            f"no tokenizer: looked for {', '.join(str(path / name) for name in VOCABULARIES)}",
            "Name a folder or file that has one.",
        )
    if found[0].name == MODEL and found[-1].name == VOCAB and (path / "merges.txt").is_file():
        kind = CLASSES.get(class_name(path, read_object(path / CONFIG), byte_level=False))
        return found[0] if kind is None or kind.reads_sentencepiece else found[-1]
    return found[0]


def open_vocabulary(file: Path) -> Opened:
    """Reads a vocabulary and the files beside it; raises UserError that names what cannot be understood."""
    if file.name == VOCAB:
        return _from_vocab_and_merges(file)
    if file.suffix == ".json":
        return _from_json(file)
    return _from_tiktoken(file) if tiktoken.is_tiktoken(file) else _from_sentencepiece(file)


def _from_json(file: Path) -> Opened:
    """tokenizer.json, as it is or with the pipeline of its class. Its post-processor decides on BOS and EOS."""
    folder = file.parent
    serialized = read_text(file)
    given = parsed(file, serialized)
    declared = read_declared(folder, given.get_added_tokens_decoder())
    name = class_name(folder, declared.config, byte_level='"ByteLevel"' in serialized)
    notes: tuple[str, ...] = ()
    if name == GENERIC:
        tokenizer = given
    else:
        held = json.loads(serialized)
        tokenizer = CLASSES[name].build(read_json_vocabulary(file, held), declared.config)
        if given.post_processor is not None:
            tokenizer.post_processor = given.post_processor
        declared = _with_defaults(declared, CLASSES[name].named)
        notes = _changed(file, name, held, json.loads(tokenizer.to_str()))
    added = _add(tokenizer, declared)
    by_file_alone = not added if tokenizer is given else tokenizer.to_str() == given.to_str()
    if not by_file_alone:
        serialized = tokenizer.to_str()
    bos, eos = _frame(file, tokenizer)
    notes += _switches(declared, bos, eos)
    return Opened(TokenizersEngine(file, serialized), declared, bos, by_file_alone=by_file_alone, notes=notes)


def _from_vocab_and_merges(file: Path) -> Opened:
    """vocab.json with merges.txt, for the classes that read them."""
    folder = file.parent
    declared = read_declared(folder)
    name = class_name(folder, declared.config, byte_level=False)
    kind = CLASSES.get(name)
    if kind is None or kind.reads_sentencepiece:
        known = ", ".join(name for name, kind in CLASSES.items() if not kind.reads_sentencepiece)
        raise UserError(
            f"{file} does not say how a text is split: {folder / CONFIG} names no tokenizer_class that reads it",
            f"Set tokenizer_class to one of {known}, or save the tokenizer as tokenizer.json.",
        )
    tokenizer = kind.build(read_vocab_and_merges(folder), declared.config)
    declared = _with_defaults(declared, kind.named)
    return _with_switches(file, tokenizer, declared, adds_bos=False)


def _from_tiktoken(file: Path) -> Opened:
    """Meta's tokenizer.model of Llama 3."""
    declared = read_declared(file.parent)
    tokenizer = tiktoken.build(file, declared)
    declared = _with_defaults(declared, {"bos_token": tiktoken.BOS, "eos_token": tiktoken.EOS})
    _add(tokenizer, declared)
    bos = declared.named["bos_token"]
    adds_bos = declared.config.get("add_bos_token") in (None, True)  # as Meta's code does
    tiktoken.put_in_front(tokenizer, bos.content if bos is not None and adds_bos else None)
    ends = (tiktoken.EOS, tiktoken.END_OF_MESSAGE, tiktoken.END_OF_TURN)
    eos_ids = tuple(token for token in map(tokenizer.token_to_id, ends) if token is not None)
    engine = TokenizersEngine(file, tokenizer.to_str())
    return Opened(engine, declared, bos.content if bos is not None and adds_bos else None, eos_ids)


def _from_sentencepiece(file: Path) -> Opened:
    """tokenizer.model, which encodes as sentencepiece does, by the pipeline of its class where one is named."""
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except RuntimeError as error:
        refuse_stand_in(file)
        raise UserError(
            f"{file} is neither a sentencepiece model nor a list of tiktoken's ranks", "Download it again."
        ) from error
    pieces = read_pieces(model.serialized_model_proto())
    declared = read_declared(file.parent)
    name = class_name(file.parent, declared.config, byte_level=False)
    kind = CLASSES.get(name)
    if kind is not None and not kind.reads_sentencepiece:
        raise UserError(
            f"{file.parent / CONFIG} has tokenizer_class = {name!r}, which does not read {file.name}",
            "Correct tokenizer_class, or put the vocabulary of that class beside it.",
        )
    own = {
        f"{key}_token": model.id_to_piece(token)
        for key, token in (("bos", model.bos_id()), ("eos", model.eos_id()), ("unk", model.unk_id()))
        if token >= 0
    }
    special_pieces = _special_pieces(pieces)
    declared = _with_defaults(declared, own if kind is None else {**kind.named, **own})
    if declared.extra is None:
        declared = dataclasses.replace(declared, extra=special_pieces)
    if not is_bpe(pieces):
        return _by_sentencepiece(file, model, declared)
    # The classes of transformers do not read how a model treats spaces.
    build = None if kind is None or pieces.remove_extra_whitespaces or not pieces.add_dummy_prefix else kind.build
    tokenizer = like_sentencepiece(pieces) if build is None else build(vocabulary_of(pieces), declared.config)
    opened = _with_switches(file, tokenizer, declared, adds_bos="bos_token" in own)
    # Without the files beside it, these would be the added tokens; all of them are pieces, which have ids already.
    own_tokens = _with_defaults(Declared(file.parent, extra=special_pieces), own).new_tokens(())
    added = tokenizer.get_added_tokens_decoder().values()
    return dataclasses.replace(
        opened,
        by_file_alone=build is None and set(map(repr, added)) == set(map(repr, own_tokens)),
        notes=(*opened.notes, *_unlike_transformers(declared, kind is None, pieces)),
    )


def _by_sentencepiece(file: Path, model: Any, declared: Declared) -> Opened:
    """A model that only sentencepiece itself can encode, to which no token can be added."""
    known = {model.id_to_piece(i) for i in range(len(model))}
    if new := [token.content for token in declared.new_tokens(known) if token.content not in known]:
        raise UserError(
            f"{file} is not a byte-level BPE model of sentencepiece, and {new[0]!r} is to be added to it",
            f"Save the tokenizer as {JSON}, or remove the token from {CONFIG}, {ADDED} and {SPECIALS}.",
        )
    bos = declared.named.get("bos_token")
    adds_bos = declared.config.get("add_bos_token") in (None, True)
    return Opened(SentencePieceEngine(model), declared, bos.content if bos is not None and adds_bos else None)


def _special_pieces(pieces: Pieces) -> "tuple[AddedToken, ...]":
    from tokenizers import AddedToken

    found = ((pieces.pieces[i].text, pieces.pieces[i].type) for i in pieces.ids(UNKNOWN, CONTROL, USER_DEFINED))
    return tuple(AddedToken(text, normalized=False, special=kind != USER_DEFINED) for text, kind in found)


def _with_defaults(declared: Declared, named: Mapping[str, str | None]) -> Declared:
    """The declaration with the special tokens that a class has where no file names them."""
    from tokenizers import AddedToken

    added = {token.content: token for token in declared.added.values()}
    defaults = {key: added.get(text, AddedToken(text, special=True)) for key, text in named.items() if text is not None}
    found = {**defaults, **declared.named}
    return dataclasses.replace(declared, named=dict(sorted(found.items(), key=_standard_first)))


def _standard_first(item: "tuple[str, AddedToken | None]") -> int:
    return STANDARD.index(item[0]) if item[0] in STANDARD else len(STANDARD)


def _add(tokenizer: "Tokenizer", declared: Declared) -> bool:
    """Adds the declared tokens to a tokenizer as transformers does; whether this changes it.

    Raises UserError if a token gets another id than the one that a file declares.
    """
    before = {token: repr(entry) for token, entry in tokenizer.get_added_tokens_decoder().items()}
    present = [entry.content for entry in tokenizer.get_added_tokens_decoder().values()]
    tokenizer.add_tokens(declared.new_tokens(present))
    # The vocabulary's own file may hold a named token as an ordinary added one.
    specials = [token for token in (*declared.named.values(), *(declared.extra or ())) if token is not None]
    names = {token.content for token in specials if token.special}
    held = tokenizer.get_added_tokens_decoder().values()
    tokenizer.add_special_tokens([entry for entry in held if entry.content in names and not entry.special])
    for token, entry in declared.added.items():
        if (found := tokenizer.token_to_id(entry.content)) != token:
            where = CONFIG if declared.config.get("added_tokens_decoder") is not None else ADDED
            raise UserError(
                f"{declared.folder / where} gives {entry.content!r} the id {token}, and its id in the vocabulary is "
                f"{found}",
                "Correct the id: transformers ignores the declared one, and gives tokens that the vocabulary lacks the "
                "ids that follow its last one.",
            )
    return before != {token: repr(entry) for token, entry in tokenizer.get_added_tokens_decoder().items()}


def _frame(file: Path, tokenizer: "Tokenizer") -> tuple[str | None, str | None]:
    """The tokens that the post-processor puts in front of a text and behind it."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    framed = tokenizer.encode("a").ids
    ahead = next((at for at in range(len(framed) + 1) if framed[at : at + len(bare)] == bare), len(framed) + 1)
    head, tail = framed[:ahead], framed[ahead + len(bare) :]
    if ahead > len(framed) or max(len(head), len(tail)) > 1:
        raise UserError(
            f"the post_processor of {file} makes {framed} of {bare}",
            "It may put at most one token in front of a text and one behind it: BOS and EOS.",
        )
    first, last = (tokenizer.id_to_token(ids[0]) if ids else None for ids in (head, tail))
    return first, last


def _with_switches(file: Path, tokenizer: "Tokenizer", declared: Declared, *, adds_bos: bool) -> Opened:
    """A vocabulary without a post-processor, where add_bos_token decides; `adds_bos` is the default."""
    _add(tokenizer, declared)
    said = declared.config.get("add_bos_token")
    bos = declared.named.get("bos_token")
    adds = adds_bos if said is None else bool(said)
    notes = ()
    if declared.config and said is None and adds and bos is not None:
        notes += (
            f"add_bos_token is not set in {CONFIG}: BOS is put in front of a text, as by Llama's own code and "
            "transformers 4; transformers 5 puts none",
        )
    if declared.config.get("add_eos_token"):
        notes += (_appended(f"add_eos_token is true in {CONFIG}"),)
    engine = TokenizersEngine(file, tokenizer.to_str())
    return Opened(engine, declared, bos.content if adds and bos is not None else None, notes=notes)


# Notes.


def _switches(declared: Declared, bos: str | None, eos: str | None) -> tuple[str, ...]:
    """What is said twice about BOS and EOS, where the post-processor of tokenizer.json decides."""
    notes = []
    said = declared.config.get("add_bos_token")
    if said is not None and bool(said) != (bos is not None):
        does = "puts none in front of a text" if bos is None else f"puts {bos!r} in front of a text"
        notes.append(
            f"add_bos_token is {json.dumps(said)} in {CONFIG}, and the post_processor of the tokenizer {does}: as in "
            "transformers 5, the post_processor decides (add_bos of a source and bos= of encode overrule it)"
        )
    named = declared.named.get("bos_token")
    if bos is not None and named is not None and named.content not in ("", bos):
        notes.append(f"bos_token is {named.content!r} in {CONFIG}; texts begin with the post_processor's {bos!r}")
    if eos is not None:
        notes.append(_appended(f"the post_processor of the tokenizer appends {eos!r}"))
    return tuple(notes)


def _appended(why: str) -> str:
    return f"{why}: EOS ends documents by add_eos of their source, and is never appended to a prompt"


def _changed(file: Path, name: str, given: Mapping[str, Any], built: Mapping[str, Any]) -> tuple[str, ...]:
    parts = ("normalizer", "pre_tokenizer")
    if all(given.get(part) == built.get(part) for part in parts):
        return ()
    return (
        f"tokenizer_class is {name}: as in transformers 5, its normalizer and pre_tokenizer replace those of "
        f"{file.name} (PreTrainedTokenizerFast keeps them)",
    )


def _unlike_transformers(declared: Declared, generic: bool, pieces: Pieces) -> tuple[str, ...]:
    """How ids differ from those that transformers 5 gives for a tokenizer.model."""
    if not declared.config:
        return ()
    if generic:
        return (
            "tokenizer.model is encoded as sentencepiece does; transformers 5 leaves out the space in front of a text "
            f"where {CONFIG} does not name LlamaTokenizer",
        )
    scores = [piece.score for piece in pieces.pieces if piece.type == NORMAL]
    if scores != sorted(scores, reverse=True):
        return (
            "tokenizer.model is encoded by its scores, as sentencepiece does; transformers 5 merges by id and gives "
            "other ids for runs of spaces where there is no tokenizer.json",
        )
    return ()
