"""Encodes the records of a source as documents: tokens, and the loss weight of each."""

import datetime
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from camelid.data.config import Source
from camelid.data.preparation import easylm_template, mindformers
from camelid.data.preparation.easylm_template import Content, text_of, value_of
from camelid.data.readers.records import Record
from camelid.errors import UserError
from camelid.text.chat import ChatTemplate, load_template
from camelid.text.messages import Message, read_chat, read_instruct
from camelid.text.tokenizer import Tokenizer

GSM8K_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response:\n"
)
# Some templates insert today's date, on which a store must not depend; this is the default of Llama 3.1's template.
TODAY = datetime.datetime(2024, 7, 26)
SKIP_IT = "remove it (or set max_unreadable to the fraction of records that may be skipped)"


@dataclass(frozen=True, eq=False)
class Example:
    """One document, tokenized."""

    tokens: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]
    """Weight in the loss of the prediction of each token; the first is predicted only in rows across documents."""


Encoder = Callable[[Sequence[Record]], list[list[Example]]]
"""Returns the documents of each record: usually one; none for a text without tokens; two (chosen, rejected) for a
preference."""

Refuse = Callable[[UserError], None]


def make_encoder(
    source: Source, tokenizer: Tokenizer, *, sequence_length: int | None = None, refuse: Refuse | None = None
) -> Encoder:
    """Returns a function that encodes the records of a source, many at once.

    For a record that does not fit the kind of the source, or has no token with a loss, it raises UserError with the
    location; with `refuse`, it passes the error there instead and returns no document for the record. `sequence_length`
    is the length of MindFormers' records, for compat = "mindformers" only.
    """
    if source.compat == "mindformers":
        converter = _mindformers(source, tokenizer, sequence_length)
    else:
        converter = CONVERTERS[source.kind](source, tokenizer)
    return functools.partial(_encode, converter, refuse or _raise)


@dataclass(frozen=True)
class _Converter:
    """How records of one kind are converted to documents."""

    read: Callable[[Any], list[Any]]
    """Returns the documents in the value of a record, not encoded yet; their form depends on the kind."""
    encode: Callable[[list[Any]], list[Example]]
    """Encodes many such documents at once."""
    needs_loss: bool
    """Whether every document must have a token with a loss."""


def _encode(converter: _Converter, refuse: Refuse, records: Sequence[Record]) -> list[list[Example]]:
    documents = [_tried(converter.read, record.value, record, refuse) for record in records]
    found = _encode_all(converter, refuse, records, documents)
    keep = _with_loss if converter.needs_loss else _not_empty
    return [_tried(keep, group, record, refuse) for group, record in zip(found, records, strict=True)]


def _encode_all(
    converter: _Converter, refuse: Refuse, records: Sequence[Record], documents: Sequence[list[Any]]
) -> list[list[Example]]:
    """The examples of the documents of each record, all encoded at once."""
    try:
        encoded = iter(converter.encode(list(itertools.chain.from_iterable(documents))))
        return [list(itertools.islice(encoded, len(group))) for group in documents]
    except UserError as error:
        if len(records) == 1:
            refuse(_at(records[0].location, error))
            return [[]]
    # Bisect to find the invalid record, so that one among thousands costs little.
    middle = len(records) // 2
    halves = (slice(None, middle), slice(middle, None))
    return [group for half in halves for group in _encode_all(converter, refuse, records[half], documents[half])]


def _tried(make: Callable[[Any], list[Any]], value: Any, record: Record, refuse: Refuse) -> list[Any]:
    try:
        return make(value)
    except UserError as error:
        refuse(_at(record.location, error))
        return []


def _at(location: str, error: UserError) -> UserError:
    return UserError(f"{location}: {error.problem}", error.advice)


def _raise(error: UserError) -> None:
    raise error


def _not_empty(examples: list[Example]) -> list[Example]:
    return [example for example in examples if len(example.tokens)]


def _with_loss(examples: list[Example]) -> list[Example]:
    for example in examples:
        if not example.weights[1:].any():
            raise UserError(
                f"none of the {len(example.tokens)} tokens has a loss, so there is nothing to train on",
                f"Give it an answer (in a chat, a message of the assistant), or {SKIP_IT}.",
            )
    return examples


def _text(source: Source, tokenizer: Tokenizer) -> _Converter:
    head, tail = _frame(source, tokenizer)

    def encode(texts: list[str]) -> list[Example]:
        examples = _concatenate(tokenizer, [[(head, 0.0), (text, 1.0), (tail, 1.0)] for text in texts])
        # A document without text would train the model to predict EOS after BOS.
        bare = len(head) + len(tail)
        return [example if len(example.tokens) > bare else NOTHING for example in examples]

    return _Converter(lambda text: [text], encode, needs_loss=False)


def _fields(source: Source, tokenizer: Tokenizer) -> _Converter:
    head, tail = _frame(source, tokenizer)
    # Each record may have a template, but few of them differ.
    parse = functools.lru_cache(1024)(lambda template: easylm_template.parse(template, tokenizer, source.prepend_text))
    shared = None if source.fields is None else parse(source.fields)

    def read(value: Any) -> list[list[Content]]:
        record = _mapping(value)
        template = shared or parse(text_of(record, source.fields_from_example or ""))
        before: list[Content] = [] if template.has_bos else [(head, 0.0)]
        after: list[Content] = [] if template.has_eos else [(tail, 1.0)]
        return [[*before, *template.contents(record), *after]]

    return _Converter(read, functools.partial(_concatenate, tokenizer), needs_loss=True)


def _gsm8k(source: Source, tokenizer: Tokenizer) -> _Converter:
    """Question and answer as llama-2-jax trains on them: each tokenized by itself, with a loss on the answer."""
    head, tail = _frame(source, tokenizer)

    def read(value: Any) -> list[list[Content]]:
        record = _mapping(value)
        prompt = GSM8K_PROMPT.format(question=text_of(record, "question"))
        answer = text_of(record, "answer").replace("#### ", "Final answer:\n")
        return [[(head, 0.0), (prompt, 0.0), (answer, 1.0), (tail, 1.0)]]

    return _Converter(read, functools.partial(_concatenate, tokenizer), needs_loss=True)


def _template(source: Source, tokenizer: Tokenizer) -> ChatTemplate:
    return replace(load_template(source.template, tokenizer), now=TODAY)


def _instruct(source: Source, tokenizer: Tokenizer) -> _Converter:
    template = _template(source, tokenizer)
    return _chats(source, tokenizer, template, lambda record: [read_instruct(record, template)])


def _chat(source: Source, tokenizer: Tokenizer) -> _Converter:
    return _chats(source, tokenizer, _template(source, tokenizer), lambda record: [read_chat(record)])


def _preference(source: Source, tokenizer: Tokenizer) -> _Converter:
    """Pairs of chats, with a loss on the messages from the first one that differs, not on answers within a prompt."""
    template = _template(source, tokenizer)

    def read(record: Mapping[str, Any]) -> list[list[Message]]:
        pair = [_answered(record, key, template) for key in ("chosen", "rejected")]
        if pair[0] == pair[1]:
            raise UserError("chosen and rejected are equal", f"Make them differ, or {SKIP_IT}.")
        shared = sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], zip(*pair, strict=False)))
        return [[*(replace(message, weight=0.0) for message in chat[:shared]), *chat[shared:]] for chat in pair]

    return _chats(source, tokenizer, template, read)


def _chats(
    source: Source,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    read: Callable[[Mapping[str, Any]], list[list[Message]]],
) -> _Converter:
    def encode(chats: list[list[Message]]) -> list[Example]:
        return [Example(*pair) for pair in template.render_batch(chats, tokenizer, loss=source.loss)]

    return _Converter(lambda value: read(_mapping(value)), encode, needs_loss=True)


def _answered(record: Mapping[str, Any], key: str, template: ChatTemplate) -> list[Message]:
    """The chat of a prompt and one of its answers, each of them a text or a list of messages."""
    answer = value_of(record, key)
    try:
        if isinstance(answer, str) and "prompt" not in record and "instruction" in record:
            return read_instruct({**record, "output": answer}, template)
        if isinstance(answer, list):
            before, after = record.get("prompt", []), answer
        else:
            before, after = value_of(record, "prompt"), [{"role": "assistant", "content": answer}]
        if not isinstance(before, list):
            # Some data sets repeat the prompt as the first message of both answers.
            asked = {"role": "user", "content": before}
            first = answer[0] if isinstance(answer, list) and answer else None
            if isinstance(first, Mapping) and first.get("role") == "user" and first != asked:
                raise UserError("messages[1] is also from the user, and differs from prompt", "Keep one of the two.")
            before = [] if first == asked else [asked]
        return read_chat({**record, "messages": before + after})
    except UserError as error:
        raise _at(key, error) from error


def _tokens(source: Source, tokenizer: Tokenizer) -> _Converter:
    def read(value: Any) -> list[Example]:
        ids, weights = value if isinstance(value, tuple) else (value, None)
        example = _of_ids(ids, tokenizer.vocab_size)
        return [example if weights is None else Example(example.tokens, weights)]

    return _Converter(read, list, needs_loss=False)


def _mindformers(source: Source, tokenizer: Tokenizer, sequence_length: int | None) -> _Converter:
    if sequence_length is None:
        raise UserError(
            "compat = 'mindformers' creates records of sequence_length + 1 tokens, but no sequence_length is given",
            "Use it in a recipe, which has a sequence_length, or give --sequence-length.",
        )
    if source.split != "file" or source.clean != "none":
        raise UserError(
            f"compat = 'mindformers' with split = {source.split!r} and clean = {source.clean!r}",
            "Leave both out: MindFormers cleans and splits files in its own way.",
        )

    def samples(texts: list[str]) -> list[Example]:
        found = mindformers.qa_samples(texts, tokenizer, sequence_length)
        return [Example(sample.tokens, sample.weights) for sample in found]

    if source.kind == "chat":
        return _Converter(lambda value: [mindformers.qa_text(_mapping(value))], samples, needs_loss=False)

    def records(text: str) -> list[Example]:
        found = mindformers.wiki_records(text, tokenizer, sequence_length)
        return [_of_ids(ids, tokenizer.vocab_size) for ids in found]

    return _Converter(records, list, needs_loss=False)


CONVERTERS: dict[str, Callable[[Source, Tokenizer], _Converter]] = {
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
    """The ids before and after every document."""
    return tokenizer.encode("", bos=source.add_bos), tokenizer.encode("", bos=False, eos=source.add_eos)


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{value!r:.40} has no keys", "Use JSON Lines or Parquet, or kind = 'text'.")
    return value


def _concatenate(tokenizer: Tokenizer, documents: Sequence[Sequence[Content]]) -> list[Example]:
    """Concatenates the contents of each document; all texts are tokenized at once."""
    contents = list(itertools.chain.from_iterable(documents))
    encoded = iter(tokenizer.encode_batch((text for text, _ in contents if isinstance(text, str)), bos=False))
    ids = [next(encoded) if isinstance(content, str) else content for content, _ in contents]
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    tokens = np.fromiter(itertools.chain.from_iterable(ids), np.int32, lengths.sum())
    weights = np.repeat(np.fromiter((weight for _, weight in contents), np.float32, len(contents)), lengths)
    content_ends = np.append(0, np.cumsum(lengths))
    ends = content_ends[np.cumsum([0, *map(len, documents)])].tolist()
    return [Example(tokens[start:stop], weights[start:stop]) for start, stop in itertools.pairwise(ends)]


def _of_ids(ids: Any, vocab_size: int) -> Example:
    """A document that is tokenized already."""
    if not isinstance(ids, np.ndarray) or ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UserError(f"{ids!r:.40} is not an array of ids", "Use a source of token ids, or another kind.")
    if len(ids) and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise UserError(
            f"ids from {ids.min()} to {ids.max()} do not fit a vocabulary of {vocab_size} tokens",
            "Use the tokenizer that created these ids.",
        )
    weights = np.ones(len(ids), np.float32)
    weights[:1] = 0
    return Example(ids.astype(np.int32), weights)
