"""Which text becomes which rows; declared without numpy, so that the command line starts fast."""

import math
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
"""the kinds to which a field of Source has a meaning"""

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
"""the keys by which rows of a kind are recognized, and what a source of such rows sets"""


def better_kind(kind: Kind, keys: Iterable[str]) -> str | None:
    """What to set for a row with these keys, where it cannot be of the given kind and is clearly of another.

    None where the row may be of the kind, or nothing is known of its keys. Rows of `fields` may have any keys, and the
    caller knows that a row of `text` lacks its key.
    """
    has = set(keys)
    own = [needed for known, needed, _ in KEYS if known == kind]
    if kind == "fields" or (kind != "text" and any(needed <= has for needed in own)):
        return None
    return next((advice for known, needed, advice in KEYS if known != kind and needed <= has), None)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where documents come from, and what becomes of them. In a recipe, a plain string is a Source of these files."""

    files: tuple[str, ...]
    """names or globs: .txt, .jsonl, .csv (or .gz, .zst of it), .parquet, .mindrecord, the prefix of Megatron's .bin and
    .idx, a prepared store, a dataset's folder, or hf:NAME of the Hugging Face Hub"""
    kind: Kind = "text"
    """what a row of them is"""
    weight: float | None = None
    """share of the tokens in the mixture; left out, every source is read as often as the others"""
    text_key: str = "text"
    """text: the key of the text in a row"""
    split: str = "file"
    """text: the documents of a .txt file: file, line, blank_line, or marker:STRING"""
    clean: Literal["none", "wikitext"] = "none"
    """text: wikitext takes WikiText's tokenization back"""
    add_bos: bool | None = None
    """whether a document begins with BOS; left out, as the tokenizer does"""
    add_eos: bool = True
    """whether a document ends with EOS"""
    fields: str | None = None
    """fields: what is laid end to end, as in EasyLM: <|bos|>,[instruction+input],output,<|eos|>"""
    fields_from_example: str | None = None
    """fields: instead, the key of a row that holds its fields"""
    prepend_text: str = ""
    """fields: stands before the first field, which must be a text"""
    template: str | None = None
    """chats: the name of a template; left out, the checkpoint's own"""
    loss: Literal["assistant", "all"] = "assistant"
    """chats: whose words are learnt"""
    compat: Literal["none", "mindformers"] = "none"
    """mindformers: records as its llama_preprocess.py makes them, faults included"""
    max_unreadable: float = 0.0
    """the share of rows that may be unreadable; they are counted, and left out"""

    def __post_init__(self):
        object.__setattr__(self, "files", tuple(map(expand_home, self.files)))
        if not self.files:
            raise UserError("a source names no file", "Give files = a name, a glob, or a list of them.")
        for field in fields(self):
            if field.name in ONLY and getattr(self, field.name) != field.default and self.kind not in ONLY[field.name]:
                raise UserError(
                    f"{field.name} = {getattr(self, field.name)!r} has no meaning for kind = {self.kind!r}",
                    f"It is for {', '.join(ONLY[field.name])}.",
                )
        if self.compat == "mindformers" and (self.loss != "assistant" or self.template is not None):
            raise UserError(
                "compat = 'mindformers' has a template and a loss of its own", "Leave loss and template out."
            )
        if self.kind == "fields" and (self.fields is None) == (self.fields_from_example is None):
            raise UserError(
                "kind = 'fields' needs one of fields and fields_from_example", "Write fields = 'text', for example."
            )
        if self.split not in ("file", "line", "blank_line") and not self.split.removeprefix("marker:"):
            raise UserError("split = 'marker:' names no marker", "Write marker:<|endoftext|>, for example.")
        if self.split not in ("file", "line", "blank_line") and not self.split.startswith("marker:"):
            raise UserError(f"split = {self.split!r}", "Choose file, line, blank_line, or marker:STRING.")
        if not 0 <= self.max_unreadable < 1:
            raise UserError(f"max_unreadable = {self.max_unreadable}", "Choose a share from 0 to below 1.")
        if self.weight is not None and not 0 <= self.weight < math.inf:
            raise UserError(f"weight = {self.weight}", "Choose 0 or more; weights need not add up to 1.")

    @property
    def has_prompts(self) -> bool:
        """Whether its documents begin with something to answer, which is no use without the answer."""
        if self.kind == "fields":
            return self.fields_from_example is not None or "[" in (self.fields or "")
        return self.kind in ("instruct", "chat", "gsm8k", "preference")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Weights of the sources from a step on."""

    first_step: int
    weights: tuple[float, ...]
    """one for each source of data.train, in that order"""

    def __post_init__(self):
        _check_weights(self.weights)
        if self.first_step < 1:
            raise UserError(
                f"a stage begins at step {self.first_step}", "The first steps have the sources' own weights."
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text becomes which rows."""

    train: tuple[Source, ...]
    """Where documents come from; a plain string is a source of text."""
    validation: tuple[Source, ...] = ()
    """The same, for validation."""
    validation_fraction: float = 0.0
    """Instead: this share of train's documents, chosen by the seed; of a single document, its end."""
    stages: tuple[Stage, ...] = ()
    """Later weights of the sources."""
    packing: Literal["stream", "best_fit", "none"] | None = None
    """How documents share rows: laid end to end and cut, kept whole and fitted together, or each in rows of its own.

    Left out, it is that of the run's folder where the run goes on, and otherwise `packing_method`.
    """
    overlong: Literal["split", "truncate", "drop"] = "split"
    """What becomes of a document longer than a row where documents are kept whole."""
    cross_documents: bool = False
    """With stream: whether attention, positions and predictions run on from one document of a row to the next."""
    sequence_length: int
    """Tokens in a row."""
    batch_size: int
    """Rows in a step, over all processes."""
    shuffle: bool = True
    """Whether every epoch sees the rows in an order of its own."""
    seed: int = 0
    """Decides the order of the rows and the documents held out."""
    workers: int = 0
    """Processes that make batches; 0 is a thread."""
    prepare_workers: int = 1
    """Processes that tokenize, where a source is not prepared yet."""
    cache: str | None = None
    """Where sources are prepared to; left out, the user's cache folder."""

    def __post_init__(self):
        if self.cache is not None:
            object.__setattr__(self, "cache", expand_home(self.cache))
        if not self.train:
            raise UserError("data.train names no file", "name at least one file")
        if self.validation and self.validation_fraction:
            raise UserError(
                f"both validation files and validation_fraction = {self.validation_fraction} are given",
                "keep one of the two",
            )
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction = {self.validation_fraction}", "choose a share from 0 to below 1")
        for name in ("sequence_length", "batch_size", "prepare_workers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}", f"{name} counts things: choose 1 or more")
        if self.workers < 0:
            raise UserError(f"workers = {self.workers}", "choose 0 or more")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed = {self.seed}", "choose a seed from 0 to 4294967295")
        if self.cross_documents and self.packing_method != "stream":
            raise UserError(f"cross_documents has no meaning for packing = {self.packing!r}", "use packing = 'stream'")
        if self.overlong != "split" and self.packing_method == "stream":
            raise UserError(f"overlong = {self.overlong!r} has no meaning for packing = 'stream'", "leave it out")
        given = [source.weight for source in self.train if source.weight is not None]
        if given and len(given) < len(self.train):
            raise UserError("some sources have a weight and some have none", "give each a weight, or none of them")
        _check_weights(given or [1.0])
        firsts = [stage.first_step for stage in self.stages]
        if firsts != sorted(set(firsts)):
            raise UserError(f"stages begin at steps {firsts}", "list them in order, each step once")
        for stage in self.stages:
            if len(stage.weights) != len(self.train):
                weights, sources = len(stage.weights), len(self.train)
                raise UserError(
                    f"the stage from step {stage.first_step} has {weights} weights for {sources} sources",
                    "give one for each source of data.train",
                )

    @property
    def packing_method(self) -> Literal["stream", "best_fit", "none"]:
        """The packing, with its default.

        The default is best_fit where a source of train has prompts, since a row of a stream may begin in the midst of
        one, and stream otherwise.
        """
        if self.packing is not None:
            return self.packing
        prompts = any(source.has_prompts for source in self.train) and not self.cross_documents
        return "best_fit" if prompts else "stream"


def _check_weights(weights: Sequence[float]) -> None:
    if not all(weight >= 0 for weight in weights) or not 0 < sum(weights) < math.inf:
        raise UserError(f"weights {list(weights)}", "weights are 0 or more, and not all 0; they need not add up to 1")
