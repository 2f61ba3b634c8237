"""One tokenizer interface over tokenizer.json and a bare tokenizer.model."""

import functools
import hashlib
import json
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

from camelid.errors import UserError
from camelid.inputs import decode, expand_home, refuse_stand_in
from camelid.text.engines import Part, Placed, SentencePieceEngine, TokenizersEngine

Engine = TokenizersEngine | SentencePieceEngine

# JSON can spell half of a surrogate pair, which is no character: it has no UTF-8 and no tokens.
HALF_CHARACTER = re.compile("[\ud800-\udfff]")

CHAT_TEMPLATE = "chat_template.jinja"
# Everything a conversion must carry along, so that the copy tokenizes, stops and chats as the original does.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    CHAT_TEMPLATE,
    "chat_template.json",
    "generation_config.json",
)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """Strings to ids and back; may be used from several threads at once."""

    engine: Engine
    vocab_size: int
    """Every id is below it; added tokens are counted."""
    bos_id: int | None
    eos_ids: tuple[int, ...]
    """Any of them ends a text; some may be the model's alone."""
    adds_bos: bool
    """Whether the checkpoint itself puts BOS in front of a text."""
    files: tuple[Path, ...]
    """The tokenizer's files beside each other, for a conversion to carry along."""
    fingerprint: str
    """SHA-256 of the file that holds the vocabulary."""
    chat_templates: dict[str, str]
    """The checkpoint's templates, in jinja, by name; the one for chats is `default`."""
    named_specials: dict[str, str]
    """What templates know specials by (bos_token, eos_token, ...), and their strings."""

    @property
    def eos_id(self) -> int | None:
        """The one that `eos=True` appends: the first that the vocabulary has."""
        return next((token for token in self.eos_ids if token < self.vocab_size), None)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_templates)

    def encode(self, text: str, *, bos: bool | None = None, eos: bool = False, specials: bool = False) -> list[int]:
        """The ids of a text, with one BOS if the checkpoint (None) or the caller says so.

        Strings such as `</s>` are plain text unless `specials` is set.
        """
        return self.encode_batch([text], bos=bos, eos=eos, specials=specials)[0]

    def encode_batch(
        self, texts: Iterable[str], *, bos: bool | None = None, eos: bool = False, specials: bool = False
    ) -> list[list[int]]:
        """`encode` of every text, on all cores."""
        head = self._bos(bos)
        tail = self._eos(eos)
        encoded = self.engine.encode(list(map(_unbroken, texts)), specials)
        # A text in which specials are text can neither begin nor end with them by itself.
        return [_framed(ids, head, tail) if specials else [*head, *ids, *tail] for ids in encoded]

    def encode_parts(self, texts: Iterable[Sequence[Part]]) -> list[Placed]:
        """The tokens of texts that come in parts, and where they lie; neither BOS nor EOS is added.

        Special strings are specials where a part says so, text elsewhere.
        """
        return self.engine.encode_parts([[(_unbroken(text), specials) for text, specials in parts] for parts in texts])

    def decode(self, ids: Iterable[SupportsIndex], *, skip_specials: bool = True) -> str:
        """The text of ids, exactly as the library behind the file gives it."""
        known = self.checked(ids)
        if skip_specials:
            known = [token for token in known if token not in self.engine.special_ids]
        return self.engine.decode(known)

    def decode_after_text(self, ids: Iterable[SupportsIndex]) -> str:
        """`decode` of ids that follow other text: a leading space stays."""
        # Decoders strip what begins a text, so an ordinary letter stands in for the text before.
        letter, shown = self._letter
        return self.decode([*letter, *ids])[len(shown) :]

    def checked(self, ids: Iterable[SupportsIndex]) -> list[int]:
        """The ids as plain integers, each of them one of the vocabulary's."""
        known = [operator.index(token) for token in ids]
        for token in known:
            if not 0 <= token < self.vocab_size:
                raise UserError(
                    f"token id {token} is outside the tokenizer's vocabulary of {self.vocab_size}",
                    "use the tokenizer that the model was trained with",
                )
        return known

    @functools.cached_property
    def _letter(self) -> tuple[list[int], str]:
        ids = self.encode("a", bos=False)
        return ids, self.decode(ids)

    def _bos(self, wanted: bool | None) -> list[int]:
        if wanted and self.bos_id is None:
            raise UserError(
                f"{self.files[0]}: BOS is asked for, but the tokenizer has none",
                "leave BOS off, or name bos_token in tokenizer_config.json",
            )
        wanted = self.adds_bos if wanted is None else wanted
        return [self.bos_id] if wanted and self.bos_id is not None else []

    def _eos(self, wanted: bool) -> list[int]:
        if not wanted:
            return []
        if self.eos_id is None:
            raise UserError(
                f"{self.files[0]}: EOS is asked for, but no file beside it names one that it has",
                "leave EOS off (add_eos = false in a recipe), or name eos_token in tokenizer_config.json",
            )
        return [self.eos_id]


def load_tokenizer(folder_or_file: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, or of one tokenizer.json or tokenizer.model."""
    file = _vocabulary_file(Path(expand_home(folder_or_file)))
    folder = file.parent
    config = _read(folder / "tokenizer_config.json")
    named = (config, _read(folder / "special_tokens_map.json"))
    if file.suffix == ".json":
        engine = TokenizersEngine(file, _texts_of_specials(named))
    else:
        engine = SentencePieceEngine(file, _added_tokens(folder / "added_tokens.json"))
    bos_id = _bos_id(engine, named)
    listed = [_listed(folder / name) for name in ("generation_config.json", "config.json")]
    eos_ids = _eos_ids(engine, named, *listed)
    adds_bos = config.get("add_bos_token")
    files = tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    return Tokenizer(
        engine=engine,
        vocab_size=engine.vocab_size,
        bos_id=bos_id,
        eos_ids=eos_ids,
        adds_bos=bos_id is not None and (engine.bos_id is not None if adds_bos is None else adds_bos),
        files=files if file in files else (file, *files),
        fingerprint=hashlib.sha256(file.read_bytes()).hexdigest(),
        chat_templates=_chat_templates(folder, config),
        named_specials=_named_specials(engine, named, bos_id, eos_ids),
    )


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint's folder, where it has one."""
    has = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
    return load_tokenizer(folder) if has else None


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Refuse a tokenizer that knows more ids than the model has embeddings."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{tokenizer.files[0]} has {tokenizer.vocab_size} ids, the model's vocabulary only {vocab_size}",
            f"use the model's own tokenizer, or a model of vocab_size = {tokenizer.vocab_size} or more",
        )


def _vocabulary_file(path: Path) -> Path:
    """The file that holds the vocabulary; tokenizer.json first, because it holds the added tokens too."""
    candidates = [path] if path.is_file() else [path / "tokenizer.json", path / "tokenizer.model"]
    for file in candidates:
        if file.is_file():
            return file
    raise UserError(
        f"no tokenizer: looked for {' and '.join(map(str, candidates))}",
        "name a folder or file that has one; save vocab.json with merges.txt as tokenizer.json first",
    )


def _read(file: Path) -> dict[str, Any]:
    """A JSON object beside the vocabulary; empty where the checkpoint has no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        refuse_stand_in(file)
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON object", "mend or remove the file")
    return content


def _bos_id(engine: Engine, named: Sequence[dict[str, Any]]) -> int | None:
    """BOS as the files name it (null: there is none), else as the vocabulary's own file uses it."""
    for config in named:
        # Early Llama conversions wrote "", which says nothing; null says that there is no BOS.
        if config.get("bos_token", "") != "":
            return _token_id(engine, config, "bos_token")
    return engine.bos_id


def _eos_ids(
    engine: Engine, named: Sequence[dict[str, Any]], generation: Sequence[int], model: Sequence[int]
) -> tuple[int, ...]:
    """Every EOS that any file names, generation_config.json's first: chat models end turns by more than one."""
    by_name = [_token_id(engine, config, "eos_token") for config in named]
    found = [*generation, *by_name, *model, engine.eos_id]
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _texts_of_specials(named: Sequence[dict[str, Any]]) -> set[str]:
    """What the files use as specials, which the vocabulary's own file may take for ordinary added tokens."""
    found = [config.get(key) for config in named for key in ("bos_token", "eos_token")]
    for config in named:
        for key in ("additional_special_tokens", "extra_special_tokens"):
            found += config[key] if isinstance(config.get(key), list) else []
    return {text for text in map(_text_of, found) if isinstance(text, str) and text}


def _text_of(token: Any) -> Any:
    """A token is named by its string, or by an object that holds the string."""
    return token.get("content") if isinstance(token, dict) else token


def _named_specials(
    engine: Engine, named: Sequence[dict[str, Any]], bos_id: int | None, eos_ids: tuple[int, ...]
) -> dict[str, str]:
    """Every `..._token` that the files name, and BOS and EOS however they are known."""
    found: dict[str, str] = {}
    for config in reversed(named):
        for key, token in config.items():
            text = _text_of(token)
            if key.endswith("_token") and isinstance(text, str) and text:
                found[key] = text
    known = {"bos_token": bos_id, "eos_token": next((token for token in eos_ids if token < engine.vocab_size), None)}
    texts = {key: engine.decode([token]) for key, token in known.items() if token is not None}
    return {key: text for key, text in texts.items() if text} | found


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """The templates by name, from the file that transformers believes first."""
    file = folder / CHAT_TEMPLATE
    if file.is_file():
        try:
            own: Any = decode(file.read_bytes())
        except UnicodeError as error:
            raise UserError(f"{file} is not text: {error}", "save it as UTF-8, or remove it") from error
    else:
        file = folder / "tokenizer_config.json"
        own = config.get("chat_template")
        if not own:
            file = folder / "chat_template.json"
            own = _read(file).get("chat_template")
    named = {"default": own} if isinstance(own, str) or not own else _by_name(own)
    if named is None or not all(isinstance(text, str) for text in named.values() if text is not None):
        raise UserError(
            f"chat_template in {file} is neither a text nor a list of objects with name and template",
            "mend it, or take the file from the checkpoint again",
        )
    return {name: text for name, text in named.items() if text}


def _by_name(templates: Any) -> dict[str, Any] | None:
    if isinstance(templates, list) and all(isinstance(entry, dict) for entry in templates):
        return {str(entry.get("name")): entry.get("template", 0) for entry in templates}
    return templates if isinstance(templates, dict) else None


def _listed(file: Path) -> list[int]:
    """The ids of a file's eos_token_id."""
    ids = _read(file).get("eos_token_id")
    ids = [token for token in (ids if isinstance(ids, list) else [ids]) if token is not None]
    if not all(type(token) is int for token in ids):
        raise UserError(
            f"eos_token_id in {file} is {ids}, not ids", "mend it, or take the file from the checkpoint again"
        )
    # Some write -1 for none.
    return [token for token in ids if token >= 0]


def _added_tokens(file: Path) -> dict[str, int]:
    added = _read(file)
    for text, token in added.items():
        if not text or type(token) is not int or token < 0:
            raise UserError(f"{file} gives {text!r} the id {token!r}", "map texts to ids from 0 on, or remove the file")
    return added


def _token_id(engine: Engine, config: dict[str, Any], key: str) -> int | None:
    text = _text_of(config.get(key))
    if not text:
        return None
    found = engine.token_id(text) if isinstance(text, str) else None
    if found is None:
        raise UserError(
            f"{key} is {text!r} in the tokenizer's configuration, but the vocabulary has no such token",
            "take tokenizer_config.json and special_tokens_map.json from the same checkpoint as the vocabulary",
        )
    return found


def _unbroken(text: str) -> str:
    if not text.isascii() and (half := HALF_CHARACTER.search(text)):
        raise UserError(
            f"the text has half a character, {half[0]!r}, at position {half.start()}",
            "give both halves of the surrogate pair, or neither",
        )
    return text


def _framed(ids: list[int], head: list[int], tail: list[int]) -> list[int]:
    """The ids between BOS and EOS, unless the text itself began or ended with them."""
    if head and ids[:1] != head:
        ids = [*head, *ids]
    return [*ids, *tail] if tail and ids[-1:] != tail else ids
