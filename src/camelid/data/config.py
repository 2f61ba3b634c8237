"""The data section of a recipe; declared without numpy, so that the command line starts fast."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from camelid.errors import UserError
from camelid.inputs import expand_home

Kind = Literal["text", "fields", "instruct", "chat", "gsm8k", "preference", "tokens"]
ONLY: dict[str, tuple[Kind, ...]] = {
    "text_key": ("text",),
    "split": ("text",),
    "clean": ("text",),
    "fields": ("fields",),
    "fields_from_example": ("fields",),
    "prepend_text": ("fields",),
    "template": ("instruct", "chat", "preference"),
    "loss": ("instruct", "chat"),
    "compat": ("text", "chat"),
    "add_bos": ("text", "fields", "gsm8k"),
    "add_eos": ("text", "fields", "gsm8k"),
}
"""The kinds to which a field of SourceOptions applies; fields that are not listed apply to all."""

KEYS: tuple[tuple[Kind, frozenset[str], str], ...] = (
    ("chat", frozenset({"messages"}), 'kind = "chat"'),
    ("chat", frozenset({"conversations"}), 'kind = "chat"'),
    ("preference", frozenset({"chosen", "rejected"}), 'kind = "preference"'),
    ("instruct", frozenset({"instruction", "output"}), 'kind = "instruct"'),
    ("gsm8k", frozenset({"question", "answer"}), 'kind = "fields" and fields = "[question],answer", or kind = "gsm8k"'),
    ("fields", frozenset({"prompt", "completion"}), 'kind = "fields" and fields = "[prompt],completion"'),
    ("fields", frozenset({"prompt", "response"}), 'kind = "fields" and fields = "[prompt],response"'),
    ("text", frozenset({"text"}), 'kind = "text"'),
)
"""A kind, the keys by which its records are recognized, and the options that a source of such records sets."""


def better_kind(kind: Kind, keys: Iterable[str]) -> str | None:
    """Returns the options to set for a record with these keys if it is clearly of another kind than `kind`.

    None if the record may be of this kind, or if its keys are of no known kind. Records of `fields` may have any keys.
    For `text`, the caller has checked that the record lacks the key of its text.
    """
    present = set(keys)
    own = [needed for known, needed, _ in KEYS if known == kind]
    if kind == "fields" or (kind != "text" and any(needed <= present for needed in own)):
        return None
    return next((options for known, needed, options in KEYS if known != kind and needed <= present), None)


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How the records of the source are read and tokenized."""

    kind: Kind = "text"
    """type of the records; the descriptions of the other options name the types that they apply to"""
    text_key: str = "text"
    """text: name of the key or column that holds the text"""
    split: str = "file"
    """text: how a .txt file is split into documents: file, line, blank_line, or marker:STRING"""
    clean: Literal["none", "wikitext"] = "none"
    """text: wikitext reverses the tokenization of WikiText"""
    add_bos: bool | None = None
    """text, fields, gsm8k: whether documents start with BOS; by default, as the tokenizer does"""
    add_eos: bool = True
    """text, fields, gsm8k: whether documents end with EOS"""
    fields: str | None = None
    """fields: the fields to concatenate, as in EasyLM: <|bos|>,[instruction+input],output,<|eos|>"""
    fields_from_example: str | None = None
    """fields: alternatively, the key under which each record holds its own list of fields"""
    prepend_text: str = ""
    """fields: text before the first field, which must be a text"""
    template: str | None = None
    """instruct, chat, preference: name of the chat template; by default, the template of the checkpoint"""
    loss: Literal["assistant", "all"] = "assistant"
    """instruct, chat: compute the loss on the messages of the assistant, or on all messages"""
    compat: Literal["none", "mindformers"] = "none"
    """text, chat: mindformers reproduces the records of its llama_preprocess.py, including its faults"""
    max_unreadable: float = 0.0
    """maximum fraction of records that may be unreadable; they are counted and skipped"""

    @property
    def has_prompts(self) -> bool:
        """Whether documents start with a prompt, which is useless in a row that lacks the answer."""
        if self.kind == "fields":
            return self.fields_from_example is not None or "[" in (self.fields or "")
        return self.kind in ("instruct", "chat", "gsm8k", "preference")


@dataclass(frozen=True, kw_only=True)
class Source(SourceOptions):
    """Files, and how their records are read and tokenized. In a recipe, a string is a source of text."""

    files: tuple[str, ...]
    """Names or globs: .txt, .jsonl, .csv (each also with .gz or .zst), .parquet, .mindrecord, the prefix of Megatron's
    .bin and .idx, a prepared store, the folder of a dataset, or hf:NAME of the Hugging Face Hub."""
    weight: float | None = None
    """Fraction of the tokens in the mixture; by default, each source is read equally often."""
    name: str | None = None
    """Of validation data, and of a mixture from which documents are held out: the name of the source's own validation
    loss, validation_loss/NAME."""

    def __post_init__(self):
        object.__setattr__(self, "files", tuple(map(expand_home, self.files)))
        if self.name is not None and not re.fullmatch(r"[\w.-]+", self.name):
            raise UserError(f"name = {self.name!r}", "Use letters, digits, dots, hyphens and underscores.")
        if not self.files:
            raise UserError("a source names no file", "Give files = a name, a glob, or a list of them.")
        self._check_options()
        if self.weight is not None and not 0 <= self.weight < math.inf:
            raise UserError(f"weight = {self.weight}", "Choose 0 or more; weights need not add up to 1.")

    def _check_options(self) -> None:
        for field in fields(self):
            if field.name in ONLY and getattr(self, field.name) != field.default and self.kind not in ONLY[field.name]:
                raise UserError(
                    f"{field.name} = {getattr(self, field.name)!r} does not apply to kind = {self.kind!r}",
                    f"It applies to {', '.join(ONLY[field.name])}.",
                )
        if self.compat == "mindformers" and (self.loss != "assistant" or self.template is not None):
            raise UserError(
                "compat = 'mindformers' cannot be combined with template or loss",
                "Leave both out: MindFormers has a fixed template and loss.",
            )
        if self.kind == "fields" and (self.fields is None) == (self.fields_from_example is None):
            raise UserError(
                "kind = 'fields' needs either fields or fields_from_example", "Set fields = 'text', for example."
            )
        if self.split not in ("file", "line", "blank_line") and not self.split.removeprefix("marker:"):
            raise UserError("split = 'marker:' has no marker", "Set split = 'marker:<|endoftext|>', for example.")
        if self.split not in ("file", "line", "blank_line") and not self.split.startswith("marker:"):
            raise UserError(f"split = {self.split!r} is unknown", "Choose file, line, blank_line, or marker:STRING.")
        if not 0 <= self.max_unreadable < 1:
            raise UserError(f"max_unreadable = {self.max_unreadable}", "Choose a fraction from 0 to below 1.")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A change of the mixture weights at a step."""

    first_step: int
    """First step with these weights."""
    weights: tuple[float, ...]
    """One weight for each source of data.train, in that order."""

    def __post_init__(self):
        _check_weights(self.weights)
        if self.first_step < 1:
            raise UserError(
                f"a stage starts at step {self.first_step}",
                "The first steps use the weights of the sources themselves.",
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which data a run is trained on, and how it is packed into rows."""

    train: tuple[Source, ...]
    """Training data: files, or tables with options; a string is a source of text."""
    validation: tuple[Source, ...] = ()
    """Validation data, in the same form."""
    validation_fraction: float = 0.0
    """Alternatively: fraction of training documents to hold out, chosen by the seed; of a single document, its end."""
    max_validation_tokens: int | None = None
    """Maximum number of tokens in the rows that are validated, which are chosen by the seed; by default, all are."""
    stages: tuple[Stage, ...] = ()
    """Scheduled changes of the mixture weights."""
    packing: Literal["stream", "best_fit", "none"] | None = None
    """How documents are packed into rows: concatenated and split (stream), kept intact and combined (best_fit), or one
    document per row (none).

    By default, a resumed run keeps its packing; for other runs see `packing_method`.
    """
    overlong: Literal["split", "truncate", "drop"] = "split"
    """best_fit, none: what to do with a document longer than a row; a pair of a preference is not split but refused."""
    cross_documents: bool = False
    """stream: whether attention, positions and predictions continue across the borders of the documents in a row."""
    sequence_length: int
    """Tokens per row."""
    batch_size: int
    """Rows per step, over all processes."""
    shuffle: bool = True
    """Whether to read the rows of every epoch in a different random order."""
    seed: int = 0
    """Seed of the order of the rows and of the choice of held-out documents."""
    workers: int = 0
    """Number of processes that create batches; 0 uses a thread of the training process."""
    prepare_workers: int = 1
    """Number of processes that tokenize sources that are not prepared yet."""
    cache: str | None = None
    """Folder in which tokenized sources are cached; by default, in the cache folder of the user."""

    def __post_init__(self):
        if self.cache is not None:
            object.__setattr__(self, "cache", expand_home(self.cache))
        if not self.train:
            raise UserError("data.train names no file", "Name at least one file.")
        if self.validation and self.validation_fraction:
            raise UserError(
                f"both validation files and validation_fraction = {self.validation_fraction} are given",
                "Keep one of the two.",
            )
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction = {self.validation_fraction}", "Choose a fraction from 0 to below 1.")
        for name in ("sequence_length", "batch_size", "prepare_workers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}", "Choose 1 or more.")
        if (tokens := self.max_validation_tokens) is not None and tokens < self.sequence_length:
            raise UserError(
                f"max_validation_tokens = {tokens} is less than a row of {self.sequence_length} tokens",
                "Choose a multiple of sequence_length, or leave it out to validate on all rows.",
            )
        if tokens is not None and not (self.validation or self.validation_fraction):
            raise UserError(
                f"max_validation_tokens = {tokens}, and there is no validation data",
                "Set validation or validation_fraction, or leave it out.",
            )
        self._check_names()
        if self.workers < 0:
            raise UserError(f"workers = {self.workers}", "Choose 0 or more.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed = {self.seed}", "Choose a seed from 0 to 4294967295.")
        if self.cross_documents and self.packing_method != "stream":
            raise UserError(f"cross_documents does not apply to packing = {self.packing!r}", "Use packing = 'stream'.")
        if self.overlong != "split" and self.packing_method == "stream":
            raise UserError(f"overlong = {self.overlong!r} does not apply to packing = 'stream'", "Leave it out.")
        given = [source.weight for source in self.train if source.weight is not None]
        if given and len(given) < len(self.train):
            raise UserError("some sources have a weight and others do not", "Give a weight to all of them, or to none.")
        _check_weights(given or [1.0])
        firsts = [stage.first_step for stage in self.stages]
        if firsts != sorted(set(firsts)):
            raise UserError(f"stages start at steps {firsts}", "List them in ascending order, each step once.")
        for stage in self.stages:
            if len(stage.weights) != len(self.train):
                weights, sources = len(stage.weights), len(self.train)
                raise UserError(
                    f"the stage from step {stage.first_step} has {weights} weights for {sources} sources",
                    "Give one weight for each source of data.train.",
                )

    def _check_names(self) -> None:
        """Raises UserError for names of sources that are repeated, or that have no validation loss of their own."""
        for split, sources in (("train", self.train), ("validation", self.validation)):
            names = [source.name for source in sources if source.name is not None]
            if len(set(names)) < len(names):
                raise UserError(f"data.{split} has names {names}", "Give each source a name of its own.")
        mixed = bool(self.stages) or any(source.weight is not None for source in self.train)
        if any(source.name is not None for source in self.train) and not (mixed and self.validation_fraction):
            raise UserError(
                "data.train names a source, and no documents are held out of it alone",
                "Name the sources of data.validation, or set validation_fraction and a weight for each source.",
            )

    @property
    def packing_method(self) -> Literal["stream", "best_fit", "none"]:
        """The packing, or its default if none is set.

        The default is `best_fit` if a training source has prompts, because a row of `stream` may start in the middle of
        a document, after its prompt; otherwise `stream`.
        """
        if self.packing is not None:
            return self.packing
        prompts = any(source.has_prompts for source in self.train) and not self.cross_documents
        return "best_fit" if prompts else "stream"


def _check_weights(weights: Sequence[float]) -> None:
    if not all(weight >= 0 for weight in weights) or not 0 < sum(weights) < math.inf:
        raise UserError(
            f"weights {list(weights)}", "Weights must be 0 or more and not all 0; they need not add up to 1."
        )
