"""Added and special tokens that the files of a tokenizer declare, in the order in which transformers 5 adds them.

A token is declared in up to four files. Where tokenizer_config.json has `added_tokens_decoder`, transformers reads no
other file; otherwise special_tokens_map.json overrides tokenizer_config.json, and the added tokens are those of
added_tokens.json and of tokenizer.json. The flags of a token (lstrip, rstrip, single_word, normalized, special) are
those of `tokenizers.AddedToken`.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from camelid.errors import UserError
from camelid.inputs import refuse_stand_in

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

CONFIG = "tokenizer_config.json"
SPECIALS = "special_tokens_map.json"
ADDED = "added_tokens.json"
STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")


@dataclass(frozen=True)
class DeclaredTokens:
    """The tokens that the files of a folder declare, and the fields of tokenizer_config.json."""

    folder: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    """tokenizer_config.json"""
    named: Mapping[str, "AddedToken | None"] = field(default_factory=dict)
    """Special tokens by name (bos_token, ...); None for a name that a file sets to null."""
    extra: "tuple[AddedToken, ...] | None" = None
    """Special tokens without a name; None if no file has a list of them."""
    added: Mapping[int, "AddedToken"] = field(default_factory=dict)
    """Added tokens by their declared ids."""

    def new_tokens(self, present: Iterable[str]) -> "list[AddedToken]":
        """The tokens that are not among the added tokens `present`, in the order in which they get ids."""
        tokens = [token for _, token in sorted(self.added.items())]
        names = {str(token) for token in self.named.values() if token is not None}
        for token in tokens:
            token.special = token.special or token.content in names
        known = {*present, *(token.content for token in tokens)}
        for token in (*self.named.values(), *(self.extra or ())):
            if token is not None and token.content and token.content not in known:
                known.add(token.content)
                tokens.append(token)
        return tokens


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file. Raises UserError if it is not an object."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        refuse_stand_in(file)
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object", "Correct or remove the file.")
    return content


def read_declared_tokens(folder: Path, in_vocabulary: "Mapping[int, AddedToken] | None" = None) -> DeclaredTokens:
    """Reads the declarations in the files of a folder; `in_vocabulary` are the added tokens of its tokenizer.json.

    Raises UserError that names the file and the field of an invalid declaration.
    """
    config = read_object(folder / CONFIG)
    if config.get("split_special_tokens"):
        raise UserError(
            f"{folder / CONFIG} has split_special_tokens = {config['split_special_tokens']!r}, which is not supported",
            "Set it to false: strings of special tokens in data are always text.",
        )
    named, extra = _special_tokens(folder / CONFIG, config)
    if config.get("added_tokens_decoder") is not None:
        added = _added_by_id(folder / CONFIG, config["added_tokens_decoder"])
    else:
        more, listed = _special_tokens(folder / SPECIALS, read_object(folder / SPECIALS))
        named |= more
        extra = _merged(extra, listed)
        added = _added_by_text(folder / ADDED, named, extra or ()) | dict(in_vocabulary or {})
    by_text = {token.content: token for token in added.values()}
    named = {key: token if token is None else by_text.get(token.content, token) for key, token in named.items()}
    order = [*STANDARD, *(key for key in named if key not in STANDARD)]
    return DeclaredTokens(folder, config, {key: named[key] for key in order if key in named}, extra, added)


def with_defaults(declared: DeclaredTokens, named: Mapping[str, str | None]) -> DeclaredTokens:
    """Adds the default special tokens of a class for those that no file names."""
    from tokenizers import AddedToken

    added = {token.content: token for token in declared.added.values()}
    defaults = {key: added.get(text, AddedToken(text, special=True)) for key, text in named.items() if text is not None}
    found = {**defaults, **declared.named}
    return dataclasses.replace(declared, named=dict(sorted(found.items(), key=_standard_first)))


def _standard_first(item: "tuple[str, AddedToken | None]") -> int:
    return STANDARD.index(item[0]) if item[0] in STANDARD else len(STANDARD)


def add_tokens(tokenizer: "Tokenizer", declared: DeclaredTokens) -> bool:
    """Adds the declared tokens to a tokenizer as transformers does. Returns whether this changes it.

    Raises UserError if a token gets a different id than a file declares.
    """
    before = {token: repr(entry) for token, entry in tokenizer.get_added_tokens_decoder().items()}
    present = [entry.content for entry in tokenizer.get_added_tokens_decoder().values()]
    tokenizer.add_tokens(declared.new_tokens(present))
    # The vocabulary file may contain a named token as an ordinary added token.
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


def _special_tokens(
    file: Path, fields: Mapping[str, Any]
) -> "tuple[dict[str, AddedToken | None], tuple[AddedToken, ...] | None]":
    """The named special tokens of a file, and the list of those without a name."""
    named = {
        key: None if value is None else _token(f"{key} in {file}", value, special=True)
        for key, value in fields.items()
        # add_bos_token and add_eos_token are booleans.
        if key in STANDARD or (key.endswith("_token") and isinstance(value, str | dict))
    }
    key = "extra_special_tokens" if fields.get("extra_special_tokens") else "additional_special_tokens"
    listed = fields.get(key)
    if isinstance(listed, dict):
        named |= {name: _token(f"{key}.{name} in {file}", token, special=True) for name, token in listed.items()}
        listed = fields.get("additional_special_tokens")
    if listed is None:
        return named, None
    if not isinstance(listed, list):
        raise UserError(f"{key} in {file} is {listed!r:.60}", "Make it a list of tokens.")
    return named, tuple(_token(f"{key}[{i}] in {file}", token, special=True) for i, token in enumerate(listed))


def _merged(*lists: "tuple[AddedToken, ...] | None") -> "tuple[AddedToken, ...] | None":
    if all(tokens is None for tokens in lists):
        return None
    return tuple({token.content: token for tokens in lists for token in tokens or ()}.values())


def _token(place: str, value: Any, **flags: bool) -> "AddedToken":
    """A token given by its string, or by an object with its string and flags."""
    from tokenizers import AddedToken

    if isinstance(value, dict):
        # Versions of transformers before 5 wrote the type of the object next to its fields.
        fields = {key: item for key, item in value.items() if key not in ("__type", "id")}
        content = fields.pop("content", None)
        if odd := sorted(key for key, item in fields.items() if key not in FLAGS or not isinstance(item, bool)):
            raise UserError(
                f"{place} has {odd[0]} = {fields[odd[0]]!r}", f"Its flags are {', '.join(FLAGS)}: booleans."
            )
        value, flags = content, fields | flags
    if not isinstance(value, str):
        raise UserError(f"{place} is {value!r:.60}", "Write a token as its string, or as an object with content.")
    return AddedToken(value, **flags)


def _added_by_id(file: Path, decoder: Any) -> "dict[int, AddedToken]":
    if not isinstance(decoder, dict):
        raise UserError(f"added_tokens_decoder in {file} is {decoder!r:.60}", "Map ids to tokens.")
    added = {}
    for key, value in decoder.items():
        place = f"added_tokens_decoder[{key!r}] in {file}"
        if not key.isascii() or not key.isdigit() or not isinstance(value, dict):
            raise UserError(f"{place} is {value!r:.60}", "Map ids to objects with the token's content and flags.")
        added[int(key)] = token = _token(place, value)
        if not token.content:
            raise UserError(f"{place} has no content", "Give the string of the token, or leave the entry out.")
    return added


def _added_by_text(
    file: Path, named: "Mapping[str, AddedToken | None]", extra: "Iterable[AddedToken]"
) -> "dict[int, AddedToken]":
    from tokenizers import AddedToken

    special = {token.content for token in (*named.values(), *extra) if token is not None}
    added = {}
    for text, token in read_object(file).items():
        if not text or type(token) is not int or token < 0:
            raise UserError(
                f"{file} gives {text!r} the id {token!r}", "Map strings to ids of 0 or more, or remove the file."
            )
        is_special = text in special
        added[token] = AddedToken(text, normalized=not is_special, special=is_special)
    return added
