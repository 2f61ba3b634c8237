"""The tokenizer of a checkpoint, whatever files it consists of."""

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
from camelid.inputs import expand_home
from camelid.text.added_tokens import CONFIG, SPECIALS, DeclaredTokens, read_object
from camelid.text.backends import Encoding, Fragment, SentencePieceBackend, TokenizersBackend
from camelid.text.loading import VOCAB, VOCABULARIES, LoadedVocabulary, load_vocabulary, vocabulary_file
from camelid.text.templates import CHAT_TEMPLATE, read_chat_templates
from camelid.text.tiktoken import is_tiktoken

Backend = TokenizersBackend | SentencePieceBackend

# JSON can contain half of a surrogate pair, which is not a character: it has no UTF-8 and no tokens.
HALF_CHARACTER = re.compile("[\ud800-\udfff]")

GENERATION = "generation_config.json"
# The files that a conversion copies, so that the copy tokenizes, stops and formats chats as the original does.
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
    """Converts between text and token ids; safe to use from several threads."""

    backend: Backend
    vocab_size: int
    """One more than the largest id, added tokens included."""
    bos_id: int | None
    eos_ids: tuple[int, ...]
    """Ids that end a text; some may be defined by the model and be outside the vocabulary."""
    adds_bos: bool
    """Whether `encode` prepends BOS by default, as the checkpoint specifies."""
    files: tuple[Path, ...]
    """The files of the tokenizer, which a conversion copies."""
    vocabulary_hash: str
    """SHA-256 of the file with the vocabulary."""
    fingerprint: str
    """Equal for tokenizers that give equal ids: `vocabulary_hash` if that file alone determines them, otherwise the
    SHA-256 of the vocabulary, the pipeline and all added tokens."""
    chat_templates: dict[str, str]
    """The chat templates of the checkpoint (jinja) by name; the usual one is `default`."""
    named_specials: dict[str, str]
    """Strings of the special tokens by the names that templates use (bos_token, eos_token, ...)."""
    notes: tuple[str, ...] = ()
    """Contradictions between the files, and differences from the ids of transformers."""

    @property
    def eos_id(self) -> int | None:
        """The id that `eos=True` appends: the first of `eos_ids` that is in the vocabulary."""
        return next((token for token in self.eos_ids if token < self.vocab_size), None)

    @property
    def token_ids(self) -> frozenset[int]:
        """The ids that have a token; there may be gaps between them."""
        return self.backend.token_ids

    def __repr__(self) -> str:
        return f"Tokenizer({self.files[0].name}: {len(self.token_ids)} tokens, bos {self.bos_id}, eos {self.eos_ids})"

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_templates)

    def encode(self, text: str, *, bos: bool | None = None, eos: bool = False, specials: bool = False) -> list[int]:
        """The ids of a text, with BOS in front if `bos` is true, or None and the checkpoint specifies it.

        Strings of special tokens such as `</s>` are plain text unless `specials` is set; BOS and EOS are then not
        added to a text that begins or ends with them. Raises UserError if the tokenizer lacks a requested token.
        """
        return self.encode_batch([text], bos=bos, eos=eos, specials=specials)[0]

    def encode_batch(
        self, texts: Iterable[str], *, bos: bool | None = None, eos: bool = False, specials: bool = False
    ) -> list[list[int]]:
        """`encode` for each text, on all cores."""
        head = self._bos(bos)
        tail = self._eos(eos)
        encoded = self.backend.encode(list(map(_checked_text, texts)), specials)
        # If special tokens are not parsed, no text begins or ends with one.
        return [_with_bos_and_eos(ids, head, tail) if specials else [*head, *ids, *tail] for ids in encoded]

    def encode_with_offsets(self, texts: Iterable[Sequence[Fragment]]) -> list[Encoding]:
        """The tokens of texts that are given in fragments, with their spans of characters; adds neither BOS nor EOS.

        Strings of special tokens are parsed in the fragments whose flag is set, and are text elsewhere.
        """
        return self.backend.encode_with_offsets(
            [[(_checked_text(text), specials) for text, specials in fragments] for fragments in texts]
        )

    def decode(self, ids: Iterable[SupportsIndex], *, skip_specials: bool = True) -> str:
        """The text of ids, exactly as the library of the backend decodes it."""
        known = self.checked(ids)
        if skip_specials:
            known = [token for token in known if token not in self.backend.special_ids]
        return self.backend.decode(known)

    def decode_after_text(self, ids: Iterable[SupportsIndex]) -> str:
        """`decode` for ids that follow other text: a leading space is kept."""
        # Decoders strip spaces from the start of a text, so a letter is put in front.
        letter, shown = self._letter
        return self.decode([*letter, *ids])[len(shown) :]

    def checked(self, ids: Iterable[SupportsIndex]) -> list[int]:
        """The ids as plain integers; raises UserError if one is outside the vocabulary."""
        known = [operator.index(token) for token in ids]
        for token in known:
            if not 0 <= token < self.vocab_size:
                raise UserError(
                    f"token id {token} is outside the tokenizer's vocabulary of {self.vocab_size}",
                    "Use the tokenizer that the model was trained with.",
                )
        return known

    @functools.cached_property
    def _letter(self) -> tuple[list[int], str]:
        ids = self.encode("a", bos=False)
        return ids, self.decode(ids)

    def _bos(self, wanted: bool | None) -> list[int]:
        if wanted and self.bos_id is None:
            raise UserError(
                f"{self.files[0]}: BOS was requested, but the tokenizer has none",
                "Do not request BOS, or set bos_token in tokenizer_config.json.",
            )
        wanted = self.adds_bos if wanted is None else wanted
        return [self.bos_id] if wanted and self.bos_id is not None else []

    def _eos(self, wanted: bool) -> list[int]:
        if not wanted:
            return []
        if self.eos_id is None:
            raise UserError(
                f"{self.files[0]}: EOS was requested, but no file in its folder names one that it has",
                "Do not request EOS (add_eos = false in a recipe), or set eos_token in tokenizer_config.json.",
            )
        return [self.eos_id]


def load_tokenizer(folder_or_file: str | Path) -> Tokenizer:
    """Loads the tokenizer of a checkpoint folder, or of one file: tokenizer.json, tokenizer.model, or vocab.json.

    Added and special tokens are those that transformers 5 finds in the files of the folder. Raises UserError that names
    the file and the field if a file is damaged, contradicts another one, or contains something unsupported.
    """
    file = vocabulary_file(Path(expand_home(folder_or_file)))
    folder = file.parent
    loaded = load_vocabulary(file)
    backend, declared = loaded.backend, loaded.declared
    named_bos = declared.named.get("bos_token")
    bos = loaded.bos or (named_bos.content if named_bos is not None else None)
    bos_id = backend.token_id(bos) if bos else None
    listed = [_eos_ids_of(folder / name) for name in (GENERATION, "config.json")]
    eos_ids = _eos_ids(loaded, *listed)
    files = tuple(folder / name for name in TOKENIZER_FILES if (folder / name).is_file())
    vocabulary_hash = hashlib.sha256(file.read_bytes()).hexdigest()
    return Tokenizer(
        backend=backend,
        vocab_size=backend.vocab_size,
        bos_id=bos_id,
        eos_ids=eos_ids,
        adds_bos=loaded.bos is not None and bos_id is not None,
        files=files if file in files else (file, *files),
        vocabulary_hash=vocabulary_hash,
        fingerprint=_fingerprint(loaded, vocabulary_hash),
        chat_templates=read_chat_templates(folder, dict(declared.config)),
        named_specials=_named_specials(backend, declared, bos_id, eos_ids),
        notes=loaded.notes,
    )


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint's folder; None if it has none."""
    found = [name for name in VOCABULARIES if (folder / name).is_file()]
    # A vocab.json may belong to something else.
    has_one = found and (found != [VOCAB] or (folder / "merges.txt").is_file())
    return load_tokenizer(folder) if has_one else None


def vocabulary_notes(tokenizer: Tokenizer, vocab_size: int) -> tuple[str, ...]:
    """A note if a tokenizer has more ids than the model has embeddings, for example an added padding token."""
    if tokenizer.vocab_size <= vocab_size:
        return ()
    return (
        f"{tokenizer.files[0]} has {tokenizer.vocab_size} ids, the model's vocabulary only {vocab_size}: a text that "
        f"needs an id of {vocab_size} or more is refused",
    )


def companions_with(companions: Sequence[Path], tokenizer: Tokenizer) -> list[Path]:
    """The files that go with a model's weights, with those of another tokenizer instead of its own.

    generation_config.json is that of the model, or of the tokenizer if the model has none.
    """
    kept = [file for file in companions if file.name not in TOKENIZER_FILES or file.name == GENERATION]
    names = {file.name for file in kept}
    return [*kept, *(file for file in tokenizer.files if file.name not in names)]


def portable(companions: Sequence[Path], folder: Path, *, keep_ranks: bool = False) -> list[Path]:
    """The files that go with a model's weights, in forms that every reader of the Hugging Face format understands.

    A tokenizer.model with tiktoken's ranks is replaced by tokenizer.json and tokenizer_config.json, unless
    `keep_ranks`; a vocabulary of another name is copied to tokenizer.model. New files are written into `folder`.
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
    assert isinstance(tokenizer.backend, TokenizersBackend)
    config = read_object(model.parent / CONFIG) | tokenizer.named_specials
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
    written = [folder / "tokenizer.json", folder / CONFIG]
    written[0].write_text(tokenizer.backend.serialized, "utf-8")
    written[1].write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", "utf-8")
    return [*(file for file in companions if file is not model and file.name != CONFIG), *written]


def _fingerprint(loaded: LoadedVocabulary, vocabulary_hash: str) -> str:
    # No other file changes how sentencepiece encodes.
    if loaded.determined_by_file or isinstance(loaded.backend, SentencePieceBackend):
        return vocabulary_hash
    return hashlib.sha256(loaded.backend.serialized.encode()).hexdigest()


def _eos_ids(loaded: LoadedVocabulary, generation: Sequence[int], model: Sequence[int]) -> tuple[int, ...]:
    """Every EOS that any file names, those of generation_config.json first: chat models have several."""
    folder, token = loaded.declared.folder, loaded.declared.named.get("eos_token")
    # transformers reads only one of these files; a model may end its turns with the token of either.
    spelled = [_text_of(read_object(folder / name).get("eos_token")) for name in (CONFIG, SPECIALS)]
    spelled += [] if token is None else [token.content]
    by_name = [loaded.backend.token_id(text) for text in spelled if isinstance(text, str) and text]
    found = [*generation, *by_name, *model, *loaded.eos_ids]
    return tuple(dict.fromkeys(token for token in found if token is not None))


def _text_of(token: Any) -> Any:
    """The string of a token, which is given by its string or by an object."""
    return token.get("content") if isinstance(token, dict) else token


def _named_specials(
    backend: Backend, declared: DeclaredTokens, bos_id: int | None, eos_ids: tuple[int, ...]
) -> dict[str, str]:
    """Every `..._token` that the files name, and BOS and EOS if only their ids are known."""
    found = {key: token.content for key, token in declared.named.items() if token is not None and token.content}
    known = {"bos_token": bos_id, "eos_token": next((token for token in eos_ids if token < backend.vocab_size), None)}
    texts = {key: backend.decode([token]) for key, token in known.items() if token is not None}
    return {key: text for key, text in texts.items() if text} | found


def _eos_ids_of(file: Path) -> list[int]:
    """The ids of the field eos_token_id of a file."""
    ids = read_object(file).get("eos_token_id")
    ids = [token for token in (ids if isinstance(ids, list) else [ids]) if token is not None]
    if not all(type(token) is int for token in ids):
        raise UserError(
            f"eos_token_id in {file} is {ids}, not ids",
            "Correct it, or copy the file from the original checkpoint again.",
        )
    # Some files use -1 for none.
    return [token for token in ids if token >= 0]


def _checked_text(text: str) -> str:
    if not text.isascii() and (half := HALF_CHARACTER.search(text)):
        raise UserError(
            f"the text has half a character, {half[0]!r}, at position {half.start()}",
            "Use both halves of the surrogate pair, or neither.",
        )
    return text


def _with_bos_and_eos(ids: list[int], head: list[int], tail: list[int]) -> list[int]:
    """The ids with BOS and EOS added, unless they are there already."""
    if head and ids[:1] != head:
        ids = [*head, *ids]
    return [*ids, *tail] if tail and ids[-1:] != tail else ids
