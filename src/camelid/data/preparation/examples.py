"""Rows of a source to documents of tokens, each token with its weight in the loss."""

import datetime
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from camelid.data.config import Source
from camelid.data.preparation import easylm_template as fields
from camelid.data.preparation import mindformers
from camelid.data.preparation.easylm_template import Piece, text_of, value_of
from camelid.data.readers.sources import Record
from camelid.errors import UserError
from camelid.text.chat import ChatTemplate, load_template
from camelid.text.messages import Message, read_chat, read_instruct
from camelid.text.tokenizer import Tokenizer

GSM8K_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response:\n"
)
# Some templates ask for today's date, and a store must not depend on its day; this is what Llama 3.1's falls back on.
TODAY = datetime.datetime(2024, 7, 26)
LEAVE_OUT = "leave it out (max_unreadable is the share of rows that may be left out)"


@dataclass(frozen=True, eq=False)
class Example:
    """One document."""

    tokens: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    """How much each token counts where it is predicted; the first is, only in rows that run across documents."""


Encoder = Callable[[Sequence[Record]], list[list[Example]]]
"""The documents of each record: none of a text without tokens, two of a preference (chosen, rejected), mostly one."""

Refuse = Callable[[UserError], None]


def make_encoder(
    source: Source, tokenizer: Tokenizer, *, sequence_length: int | None = None, refuse: Refuse | None = None
) -> Encoder:
    """What turns a source's records into documents, many at once.

    A record that is none of the source's kind, or that has no token to learn, is an error that names its place; with
    `refuse`, the error is handed over instead and the record gives no documents. `sequence_length` is the length of
    MindFormers' records, for compat = "mindformers" alone.
    """
    if source.compat == "mindformers":
        kind = _mindformers(source, tokenizer, sequence_length)
    else:
        kind = KINDS[source.kind](source, tokenizer)
    return functools.partial(_encode, kind, refuse or _raise)


@dataclass(frozen=True)
class _Kind:
    """How a kind of source becomes documents."""

    read: Callable[[Any], list[Any]]
    """what to encode of a record's value: a list of documents in a form of the kind's own"""
    encode: Callable[[list[Any]], list[Example]]
    """many such documents at once"""
    masks: bool
    """whether the weights are meant to leave something to learn"""


def _encode(kind: _Kind, refuse: Refuse, records: Sequence[Record]) -> list[list[Example]]:
    documents = [_tried(kind.read, record.value, record, refuse) for record in records]
    found = _together(kind, refuse, records, documents)
    keep = _taught if kind.masks else _filled
    return [_tried(keep, group, record, refuse) for group, record in zip(found, records, strict=True)]


def _together(
    kind: _Kind, refuse: Refuse, records: Sequence[Record], documents: Sequence[list[Any]]
) -> list[list[Example]]:
    """The examples of each record's documents, all encoded at once."""
    try:
        encoded = iter(kind.encode(list(itertools.chain.from_iterable(documents))))
        return [list(itertools.islice(encoded, len(group))) for group in documents]
    except UserError as error:
        if len(records) == 1:
            refuse(_at(records[0].place, error))
            return [[]]
    # Whose error it was is found by halves, so that one bad record among thousands costs little.
    middle = len(records) // 2
    halves = (slice(None, middle), slice(middle, None))
    return [group for half in halves for group in _together(kind, refuse, records[half], documents[half])]


def _tried(make: Callable[[Any], list[Any]], value: Any, record: Record, refuse: Refuse) -> list[Any]:
    try:
        return make(value)
    except UserError as error:
        refuse(_at(record.place, error))
        return []


def _at(place: str, error: UserError) -> UserError:
    return UserError(f"{place}: {error.problem}", error.advice)


def _raise(error: UserError) -> None:
    raise error


def _filled(examples: list[Example]) -> list[Example]:
    return [example for example in examples if len(example.tokens)]


def _taught(examples: list[Example]) -> list[Example]:
    for example in examples:
        if not example.weights[1:].any():
            raise UserError(
                f"nothing to learn: the loss counts none of the {len(example.tokens)} tokens",
                f"give it an answer, or {LEAVE_OUT}",
            )
    return examples


def _text(source: Source, tokenizer: Tokenizer) -> _Kind:
    head, tail = _frame(source, tokenizer)

    def encode(texts: list[str]) -> list[Example]:
        examples = _lay(tokenizer, [[(head, 0.0), (text, 1.0), (tail, 1.0)] for text in texts])
        # A document without text would teach that EOS follows BOS.
        bare = len(head) + len(tail)
        return [example if len(example.tokens) > bare else NOTHING for example in examples]

    return _Kind(lambda text: [text], encode, masks=False)


def _fields(source: Source, tokenizer: Tokenizer) -> _Kind:
    head, tail = _frame(source, tokenizer)
    # Rows may each bring a template, but not each a new one.
    parse = functools.lru_cache(1024)(lambda template: fields.parse(template, tokenizer, source.prepend_text))
    shared = None if source.fields is None else parse(source.fields)

    def read(row: Any) -> list[list[Piece]]:
        row = _row(row)
        template = shared or parse(text_of(row, source.fields_from_example or ""))
        before: list[Piece] = [] if template.begins else [(head, 0.0)]
        after: list[Piece] = [] if template.ends else [(tail, 1.0)]
        return [[*before, *template.pieces(row), *after]]

    return _Kind(read, functools.partial(_lay, tokenizer), masks=True)


def _gsm8k(source: Source, tokenizer: Tokenizer) -> _Kind:
    """Question and answer as llama-2-jax trains on them: each tokenized by itself, the answer learnt."""
    head, tail = _frame(source, tokenizer)

    def read(row: Any) -> list[list[Piece]]:
        row = _row(row)
        prompt = GSM8K_PROMPT.format(question=text_of(row, "question"))
        answer = text_of(row, "answer").replace("#### ", "Final answer:\n")
        return [[(head, 0.0), (prompt, 0.0), (answer, 1.0), (tail, 1.0)]]

    return _Kind(read, functools.partial(_lay, tokenizer), masks=True)


def _template(source: Source, tokenizer: Tokenizer) -> ChatTemplate:
    return replace(load_template(source.template, tokenizer), now=TODAY)


def _instruct(source: Source, tokenizer: Tokenizer) -> _Kind:
    template = _template(source, tokenizer)
    return _chats(source, tokenizer, template, lambda row: [read_instruct(row, template)])


def _chat(source: Source, tokenizer: Tokenizer) -> _Kind:
    return _chats(source, tokenizer, _template(source, tokenizer), lambda row: [read_chat(row)])


def _preference(source: Source, tokenizer: Tokenizer) -> _Kind:
    """Pairs of chats; only messages from the first that differs on are learnt, no answers within a prompt."""
    template = _template(source, tokenizer)

    def read(row: Mapping[str, Any]) -> list[list[Message]]:
        pair = [_answered(row, key, template) for key in ("chosen", "rejected")]
        if pair[0] == pair[1]:
            raise UserError("chosen and rejected are equal", f"make them differ, or {LEAVE_OUT}")
        shared = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(*pair, strict=False)))
        return [[*(replace(message, weight=0.0) for message in chat[:shared]), *chat[shared:]] for chat in pair]

    return _chats(source, tokenizer, template, read)


def _chats(
    source: Source,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    read: Callable[[Mapping[str, Any]], list[list[Message]]],
) -> _Kind:
    def encode(chats: list[list[Message]]) -> list[Example]:
        return [Example(*pair) for pair in template.render_batch(chats, tokenizer, loss=source.loss)]

    return _Kind(lambda row: read(_row(row)), encode, masks=True)


def _answered(row: Mapping[str, Any], key: str, template: ChatTemplate) -> list[Message]:
    """A prompt and one of its answers, each of them a text or a list of messages."""
    answer = value_of(row, key)
    try:
        if isinstance(answer, str) and "prompt" not in row and "instruction" in row:
            return read_instruct({**row, "output": answer}, template)
        if isinstance(answer, list):
            before, after = row.get("prompt", []), answer
        else:
            before, after = value_of(row, "prompt"), [{"role": "assistant", "content": answer}]
        if not isinstance(before, list):
            # Some data sets repeat the prompt as the first message of both answers.
            asked = {"role": "user", "content": before}
            first = answer[0] if isinstance(answer, list) and answer else None
            if isinstance(first, Mapping) and first.get("role") == "user" and first != asked:
                raise UserError("messages[1] is the user's too, and differs from prompt", "Keep one of the two.")
            before = [] if first == asked else [asked]
        return read_chat({**row, "messages": before + after})
    except UserError as error:
        raise _at(key, error) from error


def _tokens(source: Source, tokenizer: Tokenizer) -> _Kind:
    def read(value: Any) -> list[Example]:
        ids, weights = value if isinstance(value, tuple) else (value, None)
        example = _of_ids(ids, tokenizer.vocab_size)
        return [example if weights is None else Example(example.tokens, weights)]

    return _Kind(read, list, masks=False)


def _mindformers(source: Source, tokenizer: Tokenizer, sequence_length: int | None) -> _Kind:
    if sequence_length is None:
        raise UserError(
            "compat = 'mindformers' cuts records of sequence_length + 1 tokens, and no sequence_length is given",
            "prepare it for a recipe, which has one, or give --sequence-length",
        )
    if source.split != "file" or source.clean != "none":
        raise UserError(
            f"compat = 'mindformers' with split = {source.split!r} and clean = {source.clean!r}",
            "leave both out: it cleans and splits whole files in its own way",
        )

    def samples(texts: list[str]) -> list[Example]:
        found = mindformers.qa_samples(texts, tokenizer, sequence_length)
        return [Example(sample.tokens, sample.learnt) for sample in found]

    if source.kind == "chat":
        return _Kind(lambda row: [mindformers.qa_text(_row(row))], samples, masks=False)

    def records(text: str) -> list[Example]:
        found = mindformers.wiki_records(text, tokenizer, sequence_length)
        return [_of_ids(ids, tokenizer.vocab_size) for ids in found]

    return _Kind(records, list, masks=False)


KINDS: dict[str, Callable[[Source, Tokenizer], _Kind]] = {
    "text": _text,
    "fields": _fields,
    "instruct": _instruct,
    "chat": _chat,
    "gsm8k": _gsm8k,
    "preference": _preference,
    "tokens": _tokens,
}


NOTHING = Example(np.empty(0, np.int32), np.empty(0, np.float32))


def _frame(source: Source, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What stands before and after every document."""
    return tokenizer.encode("", bos=source.add_bos), tokenizer.encode("", bos=False, eos=source.add_eos)


def _row(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{value!r:.40} is no row with keys", "use JSON lines or Parquet, or kind = 'text'")
    return value


def _lay(tokenizer: Tokenizer, documents: Sequence[Sequence[Piece]]) -> list[Example]:
    """Documents of pieces, all their texts tokenized at once."""
    pieces = list(itertools.chain.from_iterable(documents))
    encoded = iter(tokenizer.encode_batch((text for text, _ in pieces if isinstance(text, str)), bos=False))
    ids = [next(encoded) if isinstance(content, str) else content for content, _ in pieces]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    tokens = np.fromiter(itertools.chain.from_iterable(ids), np.int32, lengths.sum())
    weights = np.repeat(np.fromiter((weight for _, weight in pieces), np.float32, len(pieces)), lengths)
    ends_of_pieces = np.append(0, np.cumsum(lengths))
    ends = ends_of_pieces[np.cumsum([0, *map(len, documents)])].tolist()
    return [Example(tokens[start:stop], weights[start:stop]) for start, stop in itertools.pairwise(ends)]


def _of_ids(ids: Any, vocab_size: int) -> Example:
    """A document whose tokens are there already."""
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UserError(f"{ids!r:.40} is no array of ids", "use a source of tokens, or another kind")
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise UserError(
            f"ids from {ids.min()} to {ids.max()} for a tokenizer's vocabulary of {vocab_size}",
            "use the tokenizer that made these ids",
        )
    weights = np.ones(len(ids), np.float32)
    weights[:1] = 0
    return Example(ids.astype(np.int32), weights)
