"""The two libraries that read vocabularies, in two classes alike: what the vocabulary's file alone can answer.

`encode` adds neither BOS nor EOS. `decode` spells specials out. `token_bytes` gives the bytes of a token that can be
part of a character, and None for one that is text by itself.
"""

import functools
import itertools
import re
from pathlib import Path

from camelid.errors import UserError


class TokenizersEngine:
    """tokenizer.json, read by Hugging Face's `tokenizers`."""

    def __init__(self, file: Path):
        self._file = file
        self._plain = self._load(specials=False)
        self.vocab_size = 1 + max(self._plain.get_vocab(with_added_tokens=True).values())
        added = self._plain.get_added_tokens_decoder()
        self.special_ids = frozenset(token for token, entry in added.items() if entry.special)
        self.bos_id = self._leading_special()
        self.eos_id = None
        decoder = self._plain.decoder
        self.is_byte_level = decoder is not None and decoder.decode(["Ġ"]) == " "

    def encode(self, texts: list[str], specials: bool) -> list[list[int]]:
        engine = self._parsing if specials else self._plain
        return [encoding.ids for encoding in engine.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        return self._plain.decode(ids, skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._plain.token_to_id(token)

    def token_bytes(self, token: int) -> bytes | None:
        text = self._plain.id_to_token(token) or ""
        if self.is_byte_level:
            alphabet = _byte_alphabet()
            return bytes(alphabet[char] for char in text) if alphabet.keys() >= set(text) else text.encode()
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", text)
        return bytes.fromhex(byte[1]) if byte else None

    @functools.cached_property
    def _parsing(self):
        # Parsing specials is a switch of the whole object: a second one keeps threads apart.
        return self._load(specials=True)

    def _load(self, *, specials: bool):
        import tokenizers

        try:
            engine = tokenizers.Tokenizer.from_file(str(self._file))
        except Exception as error:  # the library raises nothing narrower
            raise UserError(
                f"{self._file} is no tokenizer that tokenizers {tokenizers.__version__} can read: {error}",
                "name a tokenizer.json, or update tokenizers",
            ) from error
        # Some files were saved with the last caller's truncation or padding still on.
        engine.no_truncation()
        engine.no_padding()
        engine.encode_special_tokens = not specials
        return engine

    def _leading_special(self) -> int | None:
        """The token that the file's post-processor puts in front of a text."""
        framed = self._plain.encode("a").ids[:1]
        return framed[0] if framed != self._plain.encode("a", add_special_tokens=False).ids[:1] else None


class SentencePieceEngine:
    """tokenizer.model, read by `sentencepiece`; tokens added to it later are all taken for specials."""

    is_byte_level = False

    def __init__(self, file: Path, added: dict[str, int]):
        self._model = _load_sentencepiece(file)
        self._specials = {self._model.id_to_piece(i): i for i in range(len(self._model)) if self._is_special(i)} | added
        self._texts = {token: text for text, token in self._specials.items()}
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._letter = self._model.encode("a")
        self._special = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self.special_ids = frozenset(self._texts)
        self.vocab_size = max(len(self._model), 1 + max(self._texts, default=0))
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.eos_id = self._model.eos_id() if self._model.eos_id() >= 0 else None

    def encode(self, texts: list[str], specials: bool) -> list[list[int]]:
        return [self._parse(text) for text in texts] if specials else self._model.encode(texts)

    def decode(self, ids: list[int]) -> str:
        text = ""
        # An id in a gap below an added token has no piece and no text.
        known = [token for token in ids if token < len(self._model) or token in self._texts]
        for special, run in itertools.groupby(known, key=self._texts.__contains__):
            if special:
                text += "".join(self._texts[token] for token in run)
            else:
                # The first piece of a text loses its leading space; pieces after a special keep theirs.
                before = self._letter if text else []
                text += self._model.decode([*before, *run])[len(before) :]
        return text

    def token_id(self, token: str) -> int | None:
        if token in self._specials:
            return self._specials[token]
        found = self._model.piece_to_id(token)
        return None if found == self._model.unk_id() else found

    def token_bytes(self, token: int) -> bytes | None:
        is_byte = token < len(self._model) and self._model.is_byte(token)
        return bytes.fromhex(self._model.id_to_piece(token)[3:5]) if is_byte else None

    def _is_special(self, token: int) -> bool:
        return self._model.is_control(token) or self._model.is_unknown(token)

    def _parse(self, text: str) -> list[int]:
        parts = self._special.split(text)
        ids = ([self._specials[part]] if part in self._specials else self._model.encode(part) for part in parts)
        return list(itertools.chain.from_iterable(ids))


def _load_sentencepiece(file: Path):
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    except RuntimeError as error:
        raise UserError(
            f"{file} is no sentencepiece model",
            "take tokenizer.json instead, if this is Llama 3's file: Meta gave another format the same name",
        ) from error


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: the printable ones as themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
