"""Tokenizes chats: messages -> text of a chat template -> tokens with loss weights.

The ids are those of transformers' apply_chat_template, with one intended difference: the string of a special token in a
message is text, never a special token. Nobody can end a turn or start one by writing `</s>` into a message.

    <s> [INST] hi [/INST] hello </s> <s> [INST] bye [/INST] see you </s>
     0     0   0     0      1    1    0     0    0     0     1   1   1     1: the assistant's text and its end of turn

An answer starts where its generation prompt ends: a space that the prompt lacks is trained on too, because the model
has to generate it. A token has loss if any of its characters has.
"""

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from camelid.errors import UserError
from camelid.text.backends import Encoding
from camelid.text.content_spans import RenderedChat, render_chat
from camelid.text.messages import Message
from camelid.text.messages import read_chat as read_chat  # part of the interface of this module
from camelid.text.templates import NAMED
from camelid.text.tokenizer import Tokenizer

Loss = Literal["assistant", "all"]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template in jinja."""

    text: str
    input_joint: str = "\n\n"
    input_system: str | None = None
    now: datetime.datetime | None = None
    """The date that `strftime_now` formats; None is the current time."""

    def render(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = False,
        loss: Loss = "assistant",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens, int32 (n,), and their loss weights as targets, float32 (n,).

        With loss "assistant", the assistant's text and the end of its turns have weight 1 and all else 0; with "all",
        everything except BOS has weight 1. A message's own weight takes precedence for its text. Raises UserError if
        the template refuses the chat, fails, or changes a content so that it cannot be located in the output.
        """
        return self.render_batch([messages], tokenizer, add_generation_prompt=add_generation_prompt, loss=loss)[0]

    def render_batch(
        self,
        chats: Iterable[Sequence[Message]],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = False,
        loss: Loss = "assistant",
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """`render` for each chat, tokenized on all cores. A UserError does not name the chat."""
        rendered = [render_chat(self.text, self.now, tuple(chat), tokenizer, add_generation_prompt) for chat in chats]
        encodings = tokenizer.encode_with_offsets([chat.fragments for chat in rendered])
        return [
            (encoding.tokens, _weights(chat, encoding, tokenizer, loss))
            for chat, encoding in zip(rendered, encodings, strict=True)
        ]

    def encode_questions(
        self, texts: Iterable[str], tokenizer: Tokenizer, system: str | None = None
    ) -> list[list[int]]:
        """The token ids of chats that are to be answered: each has the message of a user, after that of the system."""
        before = [] if system is None else [Message("system", system)]
        chats = [[*before, Message("user", text)] for text in texts]
        rendered = self.render_batch(chats, tokenizer, add_generation_prompt=True)
        return [tokens.tolist() for tokens, _ in rendered]


def load_template(name: str | None, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of a name: one of `NAMED` or of the checkpoint's own; None is the default of the checkpoint."""
    if name in NAMED:
        named = NAMED[name]
        return ChatTemplate(named.text, named.input_joint, named.input_system)
    if (own := tokenizer.chat_templates.get(name or "default")) is not None:
        return ChatTemplate(own)
    known = ", ".join([*NAMED, *tokenizer.chat_templates])
    if name is None:
        raise UserError(f"{tokenizer.files[0].parent} has no chat template", f"Choose one (template = ...): {known}.")
    raise UserError(f"no chat template is called {name!r}", f"Choose one of {known}.")


def _weights(rendered: RenderedChat, encoding: Encoding, tokenizer: Tokenizer, loss: Loss) -> np.ndarray:
    """The largest weight of the characters of each token; of the next character for a token without any."""
    chars = np.full(len(rendered.text) + 2, loss == "all", np.float32)
    for start, end, index in rendered.weighted:
        message = None if index is None else rendered.messages[index]
        counts = message is None or loss == "all" or message.role == "assistant"
        chars[start:end] = counts if message is None or message.weight is None else message.weight
    spans = np.stack([encoding.starts, np.maximum(encoding.ends, encoding.starts + 1)], axis=1)
    weights = np.maximum.reduceat(chars, spans.ravel())[::2] if len(spans) else np.zeros(0, np.float32)
    # BOS is never predicted; if it is EOS too, only the first token is BOS.
    is_bos = encoding.tokens == tokenizer.bos_id
    if tokenizer.bos_id in tokenizer.eos_ids:
        is_bos[1:] = False
    return np.where(is_bos, np.float32(0), weights)
