"""One tokenizer interface over every kind of vocabulary file."""

import functools
import hashlib
import json
import operator
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, SupportsIndex

from camelid.errors import UserError
from camelid.inputs import decode, expand_home
from camelid.text.backends import Part, Placed, SentencePieceEngine, TokenizersEngine
from camelid.text.declared import CONFIG, SPECIALS, Declared, read_object
from camelid.text.opening import VOCAB, VOCABULARIES, Opened, open_vocabulary, vocabulary_file
from camelid.text.tiktoken import is_tiktoken

Engine = TokenizersEngine | SentencePieceEngine

# JSON can spell half of a surrogate pair, which is no character: it has no UTF-8 and no tokens.
HALF_CHARACTER = re.compile("[\ud800-\udfff]")

CHAT_TEMPLATE = "chat_template.jinja"
GENERATION = "generation_config.json"
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
    GENERATION,
)


@dataclass(frozen=True, eq=False, repr=False)
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
    vocabulary_hash: str
    """SHA-256 of the file that holds the vocabulary."""
    fingerprint: str
    """Equal for tokenizers of equal ids: `vocabulary_hash` where that file alone decides them, else a SHA-256 of the
    vocabulary, the pipeline and all added tokens."""
    chat_templates: dict[str, str]
    """The checkpoint's templates, in jinja, by name; the one for chats is `default`."""
    named_specials: dict[str, str]
    """What templates know specials by (bos_token, eos_token, ...), and their strings."""
    notes: tuple[str, ...] = ()
    """How the files contradict each other, and how ids differ from those that transformers gives."""

    @property
    def eos_id(self) -> int | None:
        """The one that `eos=True` appends: the first that the vocabulary has."""
        return next((token for token in self.eos_ids if token < self.vocab_size), None)

    @property
    def token_ids(self) -> frozenset[int]:
        """The ids that have a token; between them there may be gaps."""
        return self.engine.token_ids

    def __repr__(self) -> str:
        return f"Tokenizer({self.files[0].name}: {len(self.token_ids)} tokens, bos {self.bos_id}, eos {self.eos_ids})"

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
    """The tokenizer of a checkpoint folder, or of one file: tokenizer.json, tokenizer.model, or vocab.json.

    Added and special tokens are those that transformers 5 finds in the files of the folder. Raises UserError that names
    file and field if a file is damaged, contradicts another one, or says something that is not supported.
    """
    file = vocabulary_file(Path(expand_home(folder_or_file)))
    folder = file.parent
    opened = open_vocabulary(file)
    engine, declared = opened.engine, opened.declared
    named_bos = declared.named.get("bos_token")
    bos = opened.bos or (named_bos.content if named_bos is not None else None)
    bos_id = engine.token_id(bos) if bos else None
    listed = [_listed(folder / name) for name in (GENERATION, "config.json")]
    eos_ids = _eos_ids(opened, *listed)
    files = tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    vocabulary_hash = hashlib.sha256(file.read_bytes()).hexdigest()
    return Tokenizer(
        engine=engine,
        vocab_size=engine.vocab_size,
        bos_id=bos_id,
        eos_ids=eos_ids,
        adds_bos=opened.bos is not None and bos_id is not None,
        files=files if file in files else (file, *files),
        vocabulary_hash=vocabulary_hash,
        fingerprint=_fingerprint(opened, vocabulary_hash),
        chat_templates=_chat_templates(folder, dict(declared.config)),
        named_specials=_named_specials(engine, declared, bos_id, eos_ids),
        notes=opened.notes,
    )


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint's folder, where it has one."""
    found = [name for name in VOCABULARIES if (folder / name).is_file()]
    # Other parts of a model may have a vocab.json too.
    has_one = found and (found != [VOCAB] or (folder / "merges.txt").is_file())
    return load_tokenizer(folder) if has_one else None


def vocabulary_notes(tokenizer: Tokenizer, vocab_size: int) -> tuple[str, ...]:
    """A note if a tokenizer has more ids than the model has embeddings, as one with an added padding token."""
    if tokenizer.vocab_size <= vocab_size:
        return ()
    return (
        f"{tokenizer.files[0]} has {tokenizer.vocab_size} ids, the model's vocabulary only {vocab_size}: a text that "
        f"needs one of the ids from {vocab_size} on is refused",
    )


def companions_with(companions: Sequence[Path], tokenizer: Tokenizer) -> list[Path]:
    """The files beside a model's weights, with those of another tokenizer in the place of its own.

    generation_config.json is the model's, and is the tokenizer's only where the model has none.
    """
    kept = [file for file in companions if file.name not in TOKENIZER_FILES or file.name == GENERATION]
    names = {file.name for file in kept}
    return [*kept, *(file for file in tokenizer.files if file.name not in names)]


def portable(companions: Sequence[Path], folder: Path, *, keep_ranks: bool = False) -> list[Path]:
    """The files beside a model's weights as every reader of Hugging Face's format understands them.

    A tokenizer.model of tiktoken's ranks becomes tokenizer.json and tokenizer_config.json, unless `keep_ranks`; a
    vocabulary under another name becomes tokenizer.model. Such files are written into `folder`.
    """
    by_name = {file.name: file for file in companions}
    model = next((file for file in companions if file.suffix == ".model"), None)
    if model is None or "tokenizer.json" in by_name:
        return list(companions)
    if keep_ranks or not is_tiktoken(model):
        if model.name == "tokenizer.model":
            return list(companions)
        renamed = Path(shutil.copyfile(model, folder / "tokenizer.model"))
        return [renamed if file is model else file for file in companions]
    tokenizer = load_tokenizer(model)
    assert isinstance(tokenizer.engine, TokenizersEngine)
    config = read_object(model.parent / CONFIG) | tokenizer.named_specials
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    written = [folder / "tokenizer.json", folder / CONFIG]
    written[0].write_text(tokenizer.engine.serialized, "utf-8")
    written[1].write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", "utf-8")
    return [*(file for file in companions if file is not model and file.name != CONFIG), *written]


def _fingerprint(opened: Opened, vocabulary_hash: str) -> str:
    # Nothing changes how sentencepiece itself encodes.
    if opened.by_file_alone or isinstance(opened.engine, SentencePieceEngine):
        return vocabulary_hash
    return hashlib.sha256(opened.engine.serialized.encode()).hexdigest()


def _eos_ids(opened: Opened, generation: Sequence[int], model: Sequence[int]) -> tuple[int, ...]:
    """Every EOS that any file names, generation_config.json's first: chat models end turns by more than one."""
    folder, token = opened.declared.folder, opened.declared.named.get("eos_token")
    # transformers reads one of these files; a model may end its turns by the token of either.
    spelled = [_text_of(read_object(folder / name).get("eos_token")) for name in (CONFIG, SPECIALS)]
    spelled += [] if token is None else [token.content]
    by_name = [opened.engine.token_id(text) for text in spelled if isinstance(text, str) and text]
    found = [*generation, *by_name, *model, *opened.eos_ids]
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _text_of(token: Any) -> Any:
    """A token is named by its string, or by an object that holds the string."""
    return token.get("content") if isinstance(token, dict) else token


def _named_specials(engine: Engine, declared: Declared, bos_id: int | None, eos_ids: tuple[int, ...]) -> dict[str, str]:
    """Every `..._token` that the files name, and BOS and EOS however they are known."""
    found = {key: token.content for key, token in declared.named.items() if token is not None and token.content}
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
            own = read_object(file).get("chat_template")
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
    ids = read_object(file).get("eos_token_id")
    ids = [token for token in (ids if isinstance(ids, list) else [ids]) if token is not None]
    if not all(type(token) is int for token in ids):
        raise UserError(
            f"eos_token_id in {file} is {ids}, not ids", "mend it, or take the file from the checkpoint again"
        )
    # Some write -1 for none.
    return [token for token in ids if token >= 0]


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
