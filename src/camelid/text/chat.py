"""Chats to tokens, and how much each token counts: messages -> a template's text -> tokens and weights.

The ids are those of transformers' apply_chat_template, with one difference that is meant: a special token's string in
a message is text, never a special. Nobody can end a turn or open one by writing `</s>` into a message.

    <s> [INST] hi [/INST] hello </s> <s> [INST] bye [/INST] see you </s>
     0     0   0     0      1    1    0     0    0     0     1   1   1     the assistant's words, and what ends them

An answer begins where the prompt for it ends: a blank that the prompt lacks is learnt too, or it would never be said.
A token counts if any of its characters does: the assistant cannot be heard without it.
"""

import datetime
import functools
import itertools
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from camelid.errors import UserError
from camelid.text import rendering
from camelid.text.backends import Encoding, Fragment
from camelid.text.messages import Message
from camelid.text.messages import read_chat as read_chat  # users import it from here
from camelid.text.templates import NAMED
from camelid.text.tokenizer import Tokenizer

Loss = Literal["assistant", "all"]
# Digits, because they are the same in capitals and between other letters.
MARK = f"{secrets.randbelow(10**20):020}."
MARKS = re.compile(rf"{re.escape(MARK)}(\d+)\.")
# What templates do to the ends of a content; the first that fits is taken.
TRIMS = (
    str,
    lambda text: text.rstrip("\n"),
    lambda text: text.lstrip("\n"),
    lambda text: text.strip("\n"),
    str.rstrip,
    str.lstrip,
    str.strip,
)


@dataclass(frozen=True)
class ChatTemplate:
    """A jinja template for chats."""

    text: str
    input_joint: str = "\n\n"
    input_system: str | None = None
    now: datetime.datetime | None = None
    """what the template is told when it asks for the date; left out, the clock says"""

    def render(
        self,
        messages: Sequence[Message],
        tokenizer: Tokenizer,
        *,
        add_generation_prompt: bool = False,
        loss: Loss = "assistant",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, int32 (n,), and weights, float32 (n,): how much each token counts when it is predicted.

        With loss "assistant" the assistant's words and what ends its turns count 1, all else 0; with "all", everything
        but BOS counts 1. A message's own weight overrules both for its words. UserError if the template refuses the
        chat, goes too far, or does not let see what of its text is the assistant's.
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
        """`render` of every chat, on all cores. Its UserErrors do not say which chat: `render` them one by one then."""
        laid = [_laid_out(self, tuple(chat), tokenizer, add_generation_prompt) for chat in chats]
        placed = tokenizer.encode_with_offsets([text.parts for text in laid])
        return [
            (tokens.tokens, _weights(text, tokens, tokenizer, loss)) for text, tokens in zip(laid, placed, strict=True)
        ]


def load_template(name: str | None, tokenizer: Tokenizer) -> ChatTemplate:
    """The template of that name: one of `NAMED`, or of the checkpoint's own; None is the checkpoint's default."""
    if name in NAMED:
        named = NAMED[name]
        return ChatTemplate(named.text, named.input_joint, named.input_system)
    if (own := tokenizer.chat_templates.get(name or "default")) is not None:
        return ChatTemplate(own)
    known = ", ".join([*NAMED, *tokenizer.chat_templates])
    if name is None:
        raise UserError(f"{tokenizer.files[0].parent} has no chat template", f"name one (template = ...): {known}")
    raise UserError(f"no chat template is called {name!r}", f"choose one of {known}")


# Messages to text, in which every character has its message.


@dataclass(frozen=True)
class _Laid:
    """A chat as its template writes it."""

    text: str
    messages: tuple[Message, ...]
    contents: tuple[tuple[int, int, int], ...]
    """spans of the text that are a message's own, in order, with its index: special strings in them are text"""
    said: tuple[tuple[int, int, int | None], ...]
    """spans that count as a message's words; the assistant's have what ends their turn"""

    @property
    def parts(self) -> list[Fragment]:
        parts: list[Fragment] = []
        at = 0
        for start, end, _ in self.contents:
            parts += [(self.text[at:start], True), (self.text[start:end], False)]
            at = end
        return [*parts, (self.text[at:], True)]


@dataclass(frozen=True)
class _Writer:
    """A template with what it is given besides messages."""

    template: ChatTemplate
    tokenizer: Tokenizer

    @functools.cached_property
    def eos(self) -> re.Pattern[str]:
        # Other files may name an EOS that this tokenizer does not have.
        known = [token for token in self.tokenizer.eos_ids if token < self.tokenizer.vocab_size]
        texts = [self.tokenizer.decode([token], skip_specials=False) for token in known]
        return re.compile(rf"\s*(?:{'|'.join(map(re.escape, filter(None, texts))) or '(?!)'})")

    def write(self, messages: Sequence[Message], prompt: bool) -> rendering.Rendered:
        rows = [{"role": message.role, "content": message.content} for message in messages]
        rest = {"tools": None, "documents": None, "add_generation_prompt": prompt}
        values = {**self.tokenizer.named_specials, "messages": rows, **rest}
        return rendering.render(self.template.text, values, self.template.now)


@functools.lru_cache(maxsize=64)
def _writer(template: ChatTemplate, tokenizer: Tokenizer) -> _Writer:
    return _Writer(template, tokenizer)


def _laid_out(template: ChatTemplate, messages: tuple[Message, ...], tokenizer: Tokenizer, prompt: bool) -> _Laid:
    if not messages:
        raise UserError("the chat has no message", "leave it out")
    writer = _writer(template, tokenizer)
    written = writer.write(messages, prompt)
    marked = _marked_pieces(writer, tuple(message.role for message in messages), prompt)
    contents = _fitted(written.text, marked, messages)
    if contents is None:
        contents = _one_by_one(writer, messages, prompt, written.text, marked)
    if written.generated:
        said = [span for span in contents if messages[span[2]].role != "assistant"]
        said += [(start, end, _speaker(contents, start, end)) for start, end in written.generated]
    else:
        said = list(_spans_said(writer, messages, contents, written.text))
    return _Laid(written.text, messages, tuple(contents), tuple(said))


@functools.lru_cache(maxsize=1024)
def _marked_pieces(writer: _Writer, roles: tuple[str, ...], prompt: bool) -> tuple[str, ...] | None:
    """The template's text around marks in place of contents: text, index of a message, text, index, ..., text.

    None if it writes no such chat, which the real contents may still make it do.
    """
    try:
        text = writer.write([Message(role, _mark(index)) for index, role in enumerate(roles)], prompt).text
    except UserError:
        return None
    pieces = tuple(MARKS.split(text))
    return pieces if {int(index) for index in pieces[1::2]} == set(range(len(roles))) else None


def _mark(index: int) -> str:
    return f"{MARK}{index}."


def _fitted(
    text: str, pieces: tuple[str, ...] | None, messages: Sequence[Message]
) -> list[tuple[int, int, int]] | None:
    """Where the contents lie, if the text is what the marks promise, with contents as they are or trimmed."""
    if pieces is None or not text.startswith(pieces[0]):
        return None
    spans: list[tuple[int, int, int]] = []
    at = len(pieces[0])
    for index, after in zip(map(int, pieces[1::2]), pieces[2::2], strict=True):
        for trim in TRIMS:
            content = trim(messages[index].content)
            if text.startswith(content, at) and text.startswith(after, at + len(content)):
                spans.append((at, at + len(content), index))
                at += len(content) + len(after)
                break
        else:
            return None
    return spans if at == len(text) else None


def _one_by_one(
    writer: _Writer, messages: tuple[Message, ...], prompt: bool, text: str, pieces: tuple[str, ...] | None
) -> list[tuple[int, int, int]]:
    """Where the contents lie, for a template that looks at their words."""
    known = _by_ends(writer, messages, prompt, text, pieces)
    spans = [known.get(index) or _alone(writer, messages, prompt, text, index) for index in range(len(messages))]
    for before, span in itertools.pairwise(spans):
        if span[0] < before[1]:
            raise _hidden(span[2], messages)
    return spans


def _by_ends(
    writer: _Writer, messages: tuple[Message, ...], prompt: bool, text: str, pieces: tuple[str, ...] | None
) -> dict[int, tuple[int, int, int]]:
    """Where those contents lie that keep their ends: marks behind all of them tell at once where these are."""
    order = [str(index) for index in range(len(messages))]
    if pieces is None or list(pieces[1::2]) != order:
        return {}
    for trim in (str, str.rstrip):
        marked = [Message(message.role, trim(message.content) + _mark(i)) for i, message in enumerate(messages)]
        try:
            written = MARKS.split(writer.write(marked, prompt).text)
        except UserError:
            continue
        if "".join(written[::2]) == text and written[1::2] == order:
            found: dict[int, tuple[int, int, int]] = {}
            at = 0
            for i, (head, piece) in enumerate(zip(pieces[:-1:2], written[:-1:2], strict=True)):
                if piece.startswith(head) and trim(messages[i].content).endswith(piece[len(head) :]):
                    found[i] = at + len(head), at + len(piece), i
                at += len(piece)
            return found
    return {}


def _alone(writer: _Writer, messages: tuple[Message, ...], prompt: bool, text: str, index: int) -> tuple[int, int, int]:
    """Where a message's content lies, by a mark in its place alone."""
    marked = (*messages[:index], Message(messages[index].role, _mark(index)), *messages[index + 1 :])
    try:
        before, found, after = writer.write(marked, prompt).text.partition(_mark(index))
    except UserError:
        before, found, after = "", "", ""
    fits = found and text.startswith(before) and text.endswith(after) and _mark(index) not in after
    if fits and len(before) + len(after) <= len(text):
        return len(before), len(text) - len(after), index
    return _by_prefixes(writer, messages, index, text)


def _by_prefixes(writer: _Writer, messages: tuple[Message, ...], index: int, text: str) -> tuple[int, int, int]:
    """Where an assistant's words lie: behind the prompt for them, up to where the chat so far ends."""
    if messages[index].role != "assistant":
        raise _hidden(index, messages)
    plain = writer.write(messages[:index], False).text
    prompted = writer.write(messages[:index], True).text
    so_far = writer.write(messages[: index + 1], False).text
    if plain == prompted or not so_far.startswith(prompted) or not text.startswith(so_far):
        raise _hidden(index, messages)
    tail = _turn_end(writer, messages[0].role == "system")
    end = so_far.rfind(tail) if tail else len(so_far)
    # A special in there may be the template's or the message's own: nobody can tell.
    if end < len(prompted) or writer.tokenizer.backend.has_special(so_far[len(prompted) : end]):
        raise _hidden(index, messages)
    return len(prompted), end, index


def _hidden(index: int, messages: Sequence[Message]) -> UserError:
    return UserError(
        f"the chat template leaves out message {index}, the {messages[index].role}'s, or changes it beyond recognition",
        "leave the message out, put {% generation %} blocks into the template, or name another template",
    )


def _spans_said(
    writer: _Writer, messages: Sequence[Message], contents: Sequence[tuple[int, int, int]], text: str
) -> Iterator[tuple[int, int, int]]:
    system, answers = messages[0].role == "system", any(message.role == "assistant" for message in messages)
    head, tail = (_turn_start(writer, system), _turn_end(writer, system)) if answers else ("", "")
    before = 0
    for start, end, index in contents:
        first, last = start, end
        if messages[index].role == "assistant":
            first -= _own_blanks(text[before:start], head)
            found = writer.eos.match(text, end)
            last = found.end() if found else end + len(tail) * text.startswith(tail, end)
        before = end
        yield first, last, index


def _own_blanks(between: str, head: str | None) -> int:
    """How many blanks of what stands before an answer are its own: those that the prompt for it leaves to the model."""
    if head is None or not between.startswith(head):
        return 0
    blanks = between.removeprefix(head)
    return len(blanks) if blanks.isspace() else 0


@functools.lru_cache(maxsize=256)
def _turn_start(writer: _Writer, system: bool) -> str | None:
    """What the template writes behind a user's words to let the assistant speak: ` ASSISTANT:`, with no blank."""
    pieces = _marked_pieces(writer, ("system",) * system + ("user",), True)
    return None if pieces is None else pieces[-1]


@functools.lru_cache(maxsize=256)
def _turn_end(writer: _Writer, system: bool) -> str:
    """What the template writes behind every answer, the last one too, up to the end of its first tag: `<|im_end|>`."""
    pieces = _marked_pieces(writer, ("system",) * system + ("user", "assistant") * 2, False)
    if pieces is None:
        return ""
    after = dict(zip(map(int, pieces[1::2]), pieces[2::2], strict=True))
    middle, last = after[system + 1], after[system + 3]
    tag = re.match(r"\s*<[^<>\s]{1,64}>", last)
    end = tag[0] if tag else last.rstrip()
    return end if middle.startswith(end) else ""


def _speaker(contents: Sequence[tuple[int, int, int]], start: int, end: int) -> int | None:
    """The message whose words lie in a generation block; None where the block holds only the template's own."""
    return next((index for first, last, index in contents if first < end and last > start), None)


def _weights(laid: _Laid, placed: Encoding, tokenizer: Tokenizer, loss: Loss) -> np.ndarray:
    """The largest weight among a token's characters; that of the next one, if it stands for none."""
    chars = np.full(len(laid.text) + 2, loss == "all", np.float32)
    for start, end, index in laid.said:
        message = None if index is None else laid.messages[index]
        counts = message is None or loss == "all" or message.role == "assistant"
        chars[start:end] = counts if message is None or message.weight is None else message.weight
    spans = np.stack([placed.starts, np.maximum(placed.ends, placed.starts + 1)], axis=1)
    weights = np.maximum.reduceat(chars, spans.ravel())[::2] if len(spans) else np.zeros(0, np.float32)
    # BOS is given, never said; where it is EOS too, only the first token is BOS.
    is_bos = placed.tokens == tokenizer.bos_id
    if tokenizer.bos_id in tokenizer.eos_ids:
        is_bos[1:] = False
    return np.where(is_bos, np.float32(0), weights)
