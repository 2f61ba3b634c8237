"""Which text becomes which rows; declared without numpy, so that the command line starts fast."""

from dataclasses import dataclass

from camelid.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text becomes which rows."""

    train: tuple[str, ...]
    """Files or globs: .txt (the whole file is one document), .jsonl or .jsonl.gz (one document a line)."""
    validation: tuple[str, ...] = ()
    """The same, for validation."""
    validation_fraction: float = 0.0
    """Instead: this share of train's documents, chosen by the seed; of a single document, the rows at its end."""
    text_key: str = "text"
    """The field of a JSON line that holds the text."""
    add_bos: bool | None = None
    """Whether a document begins with BOS; left out, as the tokenizer does."""
    add_eos: bool = True
    """Whether a document ends with EOS."""
    sequence_length: int
    """Tokens in a row."""
    batch_size: int
    """Rows in a step, over all processes."""
    shuffle: bool = True
    """Whether every epoch sees the rows in an order of its own."""
    seed: int = 0
    """Decides the order of the rows and the documents held out."""

    def __post_init__(self):
        if not self.train:
            raise UserError("data.train names no file", "name at least one .txt, .jsonl or .jsonl.gz file")
        if self.validation and self.validation_fraction:
            raise UserError(
                f"both validation files and validation_fraction = {self.validation_fraction} are given",
                "keep one of the two",
            )
        if not 0 <= self.validation_fraction < 1:
            raise UserError(f"validation_fraction = {self.validation_fraction}", "choose a share from 0 up to 1")
        for name in ("sequence_length", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}", f"{name} counts things: choose 1 or more")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed = {self.seed}", "choose a seed from 0 to 4294967295")
