"""Location of each message in the text that a chat template renders.

Few templates mark the messages of the assistant. A chat is rendered again with marks instead of its contents; if the
marks, replaced by the contents, give the original text, they are the spans. Templates whose output depends on the
contents are rendered with fewer marks until each span is known, or the chat is refused.
"""

import datetime
import functools
import itertools
import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from camelid.errors import UserError
from camelid.text import rendering
from camelid.text.backends import Fragment
from camelid.text.messages import Message
from camelid.text.tokenizer import Tokenizer

# Digits: changes of case leave them as they are.
MARK = f"{secrets.randbelow(10**20):020}."
MARKS = re.compile(rf"{re.escape(MARK)}(\d+)\.")
# What templates do to the ends of a content; the first that matches is used.
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
class RenderedChat:
    """The output of a template, with the spans of the messages."""

    text: str
    messages: tuple[Message, ...]
    contents: tuple[tuple[int, int, int], ...]
    """Spans (start, end, index of the message) of contents, in order: strings of special tokens in them are text."""
    weighted: tuple[tuple[int, int, int | None], ...]
    """Spans that get the loss weight of a message; for the assistant, they include the end of the turn."""

    @property
    def fragments(self) -> list[Fragment]:
        fragments: list[Fragment] = []
        at = 0
        for start, end, _ in self.contents:
            fragments += [(self.text[at:start], True), (self.text[start:end], False)]
            at = end
        return [*fragments, (self.text[at:], True)]


@dataclass(frozen=True)
class _Renderer:
    """A template with the tokenizer that supplies its other variables."""

    template: str
    now: datetime.datetime | None
    tokenizer: Tokenizer

    @functools.cached_property
    def eos(self) -> re.Pattern[str]:
        # Files of the model may name an EOS that the tokenizer does not have.
        known = [token for token in self.tokenizer.eos_ids if token < self.tokenizer.vocab_size]
        texts = [self.tokenizer.decode([token], skip_specials=False) for token in known]
        return re.compile(rf"\s*(?:{'|'.join(map(re.escape, filter(None, texts))) or '(?!)'})")

    def render(self, messages: Sequence[Message], prompt: bool) -> rendering.Rendered:
        rows = [{"role": message.role, "content": message.content} for message in messages]
        rest = {"tools": None, "documents": None, "add_generation_prompt": prompt}
        values = {**self.tokenizer.named_specials, "messages": rows, **rest}
        return rendering.render(self.template, values, self.now)


@functools.lru_cache(maxsize=64)
def _renderer(template: str, now: datetime.datetime | None, tokenizer: Tokenizer) -> _Renderer:
    return _Renderer(template, now, tokenizer)


def render_chat(
    template: str, now: datetime.datetime | None, messages: tuple[Message, ...], tokenizer: Tokenizer, prompt: bool
) -> RenderedChat:
    """Renders a chat and locates its messages in the output; `prompt` adds the generation prompt.

    Raises UserError if the template fails or a content cannot be located.
    """
    if not messages:
        raise UserError("the chat has no message", "Remove it.")
    renderer = _renderer(template, now, tokenizer)
    rendered = renderer.render(messages, prompt)
    marked = _render_marks(renderer, tuple(message.role for message in messages), prompt)
    contents = _match_marks(rendered.text, marked, messages)
    if contents is None:
        contents = _locate_contents(renderer, messages, prompt, rendered.text, marked)
    if rendered.generated:
        weighted = [span for span in contents if messages[span[2]].role != "assistant"]
        weighted += [(start, end, _message_of(contents, start, end)) for start, end in rendered.generated]
    else:
        weighted = list(_weighted_spans(renderer, messages, contents, rendered.text))
    return RenderedChat(rendered.text, messages, tuple(contents), tuple(weighted))


@functools.lru_cache(maxsize=1024)
def _render_marks(renderer: _Renderer, roles: tuple[str, ...], prompt: bool) -> tuple[str, ...] | None:
    """The output for marks instead of contents: [text, index of a message, text, index, ..., text].

    None if the template fails for marks; it may still accept the real contents.
    """
    try:
        text = renderer.render([Message(role, _mark(index)) for index, role in enumerate(roles)], prompt).text
    except UserError:
        return None
    pieces = tuple(MARKS.split(text))
    return pieces if {int(index) for index in pieces[1::2]} == set(range(len(roles))) else None


def _mark(index: int) -> str:
    return f"{MARK}{index}."


def _match_marks(
    text: str, pieces: tuple[str, ...] | None, messages: Sequence[Message]
) -> list[tuple[int, int, int]] | None:
    """Spans of the contents, if the text equals the output for marks with the contents inserted, perhaps trimmed."""
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


def _locate_contents(
    renderer: _Renderer, messages: tuple[Message, ...], prompt: bool, text: str, pieces: tuple[str, ...] | None
) -> list[tuple[int, int, int]]:
    """Spans of the contents, for a template whose output depends on them."""
    known = _locate_by_end_marks(renderer, messages, prompt, text, pieces)
    spans = [
        known.get(index) or _locate_by_one_mark(renderer, messages, prompt, text, index)
        for index in range(len(messages))
    ]
    for before, span in itertools.pairwise(spans):
        if span[0] < before[1]:
            raise _not_located(span[2], messages)
    return spans


def _locate_by_end_marks(
    renderer: _Renderer, messages: tuple[Message, ...], prompt: bool, text: str, pieces: tuple[str, ...] | None
) -> dict[int, tuple[int, int, int]]:
    """Spans of the contents whose ends are unchanged: found by marks after all of them in one rendering."""
    order = [str(index) for index in range(len(messages))]
    if pieces is None or list(pieces[1::2]) != order:
        return {}
    for trim in (str, str.rstrip):
        marked = [Message(message.role, trim(message.content) + _mark(i)) for i, message in enumerate(messages)]
        try:
            rendered = MARKS.split(renderer.render(marked, prompt).text)
        except UserError:
            continue
        if "".join(rendered[::2]) == text and rendered[1::2] == order:
            found: dict[int, tuple[int, int, int]] = {}
            at = 0
            for i, (head, piece) in enumerate(zip(pieces[:-1:2], rendered[:-1:2], strict=True)):
                if piece.startswith(head) and trim(messages[i].content).endswith(piece[len(head) :]):
                    found[i] = at + len(head), at + len(piece), i
                at += len(piece)
            return found
    return {}


def _locate_by_one_mark(
    renderer: _Renderer, messages: tuple[Message, ...], prompt: bool, text: str, index: int
) -> tuple[int, int, int]:
    """Span of the content of one message, found by a mark instead of it."""
    marked = (*messages[:index], Message(messages[index].role, _mark(index)), *messages[index + 1 :])
    try:
        before, found, after = renderer.render(marked, prompt).text.partition(_mark(index))
    except UserError:
        before, found, after = "", "", ""
    fits = found and text.startswith(before) and text.endswith(after) and _mark(index) not in after
    if fits and len(before) + len(after) <= len(text):
        return len(before), len(text) - len(after), index
    return _locate_by_prefixes(renderer, messages, index, text)


def _locate_by_prefixes(
    renderer: _Renderer, messages: tuple[Message, ...], index: int, text: str
) -> tuple[int, int, int]:
    """Span of an assistant's content: from its generation prompt to the end of the chat so far."""
    if messages[index].role != "assistant":
        raise _not_located(index, messages)
    plain = renderer.render(messages[:index], False).text
    prompted = renderer.render(messages[:index], True).text
    so_far = renderer.render(messages[: index + 1], False).text
    if plain == prompted or not so_far.startswith(prompted) or not text.startswith(so_far):
        raise _not_located(index, messages)
    tail = _turn_end(renderer, messages[0].role == "system")
    end = so_far.rfind(tail) if tail else len(so_far)
    # A special token in it could come from the template or from the message.
    if end < len(prompted) or renderer.tokenizer.backend.has_special(so_far[len(prompted) : end]):
        raise _not_located(index, messages)
    return len(prompted), end, index


def _not_located(index: int, messages: Sequence[Message]) -> UserError:
    return UserError(
        f"the chat template omits message {index} ({messages[index].role}), or changes it so that it cannot be located",
        "Remove the message, add {% generation %} blocks to the template, or choose another template.",
    )


def _weighted_spans(
    renderer: _Renderer, messages: Sequence[Message], contents: Sequence[tuple[int, int, int]], text: str
) -> Iterator[tuple[int, int, int]]:
    system, answers = messages[0].role == "system", any(message.role == "assistant" for message in messages)
    head, tail = (_generation_prompt(renderer, system), _turn_end(renderer, system)) if answers else ("", "")
    before = 0
    for start, end, index in contents:
        first, last = start, end
        if messages[index].role == "assistant":
            first -= _leading_spaces(text[before:start], head)
            found = renderer.eos.match(text, end)
            last = found.end() if found else end + len(tail) * text.startswith(tail, end)
        before = end
        yield first, last, index


def _leading_spaces(between: str, head: str | None) -> int:
    """The number of spaces in front of an answer that belong to it: those that the generation prompt lacks."""
    if head is None or not between.startswith(head):
        return 0
    spaces = between.removeprefix(head)
    return len(spaces) if spaces.isspace() else 0


@functools.lru_cache(maxsize=256)
def _generation_prompt(renderer: _Renderer, system: bool) -> str | None:
    """The generation prompt that follows the content of a user message, such as ` ASSISTANT:`."""
    pieces = _render_marks(renderer, ("system",) * system + ("user",), True)
    return None if pieces is None else pieces[-1]


@functools.lru_cache(maxsize=256)
def _turn_end(renderer: _Renderer, system: bool) -> str:
    """The text that follows every answer, also the last, up to the end of its first tag, such as `<|im_end|>`."""
    pieces = _render_marks(renderer, ("system",) * system + ("user", "assistant") * 2, False)
    if pieces is None:
        return ""
    after = dict(zip(map(int, pieces[1::2]), pieces[2::2], strict=True))
    middle, last = after[system + 1], after[system + 3]
    tag = re.match(r"\s*<[^<>\s]{1,64}>", last)
    end = tag[0] if tag else last.rstrip()
    return end if middle.startswith(end) else ""


def _message_of(contents: Sequence[tuple[int, int, int]], start: int, end: int) -> int | None:
    """The message whose content is in a generation block; None if the block contains text of the template only."""
    return next((index for first, last, index in contents if first < end and last > start), None)
