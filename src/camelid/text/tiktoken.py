"""Meta's tokenizer.model of Llama 3: byte sequences with their ranks, as tiktoken writes them.

A line holds a token's bytes in base64 and its rank, which is its id. tiktoken merges the two neighbors whose bytes
together have the lowest rank. `tokenizers` merges by a list of pairs instead: here these are all pairs of tokens that
together are a token, in the order of its rank, so that both merge alike; a text that is a token as a whole is that
token, even if no merges lead to it (`ignore_merges`).

Sources: llama/tokenizer.py of github.com/meta-llama/llama3, models/llama3/tokenizer.py of llama-models, and the
tokenizer.json files that Meta released beside them.
"""

import base64
import binascii
import re
from pathlib import Path
from typing import TYPE_CHECKING

from camelid.errors import UserError
from camelid.text.backends import byte_alphabet
from camelid.text.classes import Vocabulary, split_bytes
from camelid.text.declared import Declared, read_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS, END_OF_MESSAGE, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"
NUM_SPECIALS = 256
RESERVED = "<|reserved_special_token_{}|>"
# By their places behind the ranks; every other place is reserved, and the reserved ones are counted from 0.
LLAMA3 = {0: BOS, 1: EOS, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: END_OF_TURN}
LLAMA3_1 = LLAMA3 | {4: "<|finetune_right_pad_id|>", 8: END_OF_MESSAGE, 10: "<|python_tag|>"}
"""Also of Llama 3.2 and 3.3."""
LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+")


def is_tiktoken(file: Path) -> bool:
    """Whether a file begins as a list of ranks does."""
    with file.open("rb") as opened:
        return LINE.fullmatch(opened.readline(4096).rstrip()) is not None


def read_ranks(file: Path) -> dict[bytes, int]:
    """The rank of each token; raises UserError that names the line if the file is damaged."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            ranks[token] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{file}:{number} is no token with its rank: {error}", "Download the file again."
            ) from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        what = f"byte {missing[0]} has no token" if missing else f"its ranks are not 0 to {len(ranks) - 1}"
        raise UserError(f"{file} is not whole: {what}", "Download the file again.")
    return ranks


def vocabulary(ranks: dict[bytes, int]) -> Vocabulary:
    """The tokens in GPT-2's spelling of bytes, and the merges that give tiktoken's ids."""
    letters = {byte: letter for letter, byte in byte_alphabet().items()}
    spelled = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    merges = sorted(
        (rank, ranks[token[:at]], ranks[token[at:]], token[:at], token[at:])
        for token, rank in ranks.items()
        for at in range(1, len(token))
        if token[:at] in ranks and token[at:] in ranks
    )
    vocab = {spelled[token]: rank for token, rank in ranks.items()}
    return vocab, [(spelled[left], spelled[right]) for *_, left, right in merges]


def special_tokens(folder: Path) -> list[str]:
    """The names of the 256 special tokens, by the release that params.json in the folder describes.

    Llama 3 and 3.1 give names to the same places where both use them. Without a params.json the names are Llama 3.1's.
    """
    params = read_object(folder / "params.json")
    names = LLAMA3 if params and not params.get("use_scaled_rope") else LLAMA3_1
    reserved = (RESERVED.format(number) for number in range(NUM_SPECIALS))
    return [names[place] if place in names else next(reserved) for place in range(NUM_SPECIALS)]


def build(file: Path, declared: Declared) -> "Tokenizer":
    """The tokenizer of a tokenizer.model of ranks.

    Special tokens are those that tokenizer_config.json declares, or else those of the release.
    """
    from tokenizers import AddedToken

    ranks = read_ranks(file)
    tokenizer = split_bytes(vocabulary(ranks), PATTERN, ignore_merges=True)
    names = [] if any(token >= len(ranks) for token in declared.added) else special_tokens(file.parent)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return tokenizer


def put_in_front(tokenizer: "Tokenizer", bos: str | None) -> None:
    """Makes every text begin with BOS, by the post-processor of the released tokenizer.json files."""
    from tokenizers import processors

    steps: list = [processors.ByteLevel(trim_offsets=False)]
    if bos is not None:
        pair = f"{bos}:0 $A:0 {bos}:1 $B:1"
        named = [(bos, tokenizer.token_to_id(bos))]
        steps.append(processors.TemplateProcessing(single=f"{bos}:0 $A:0", pair=pair, special_tokens=named))
    tokenizer.post_processor = processors.Sequence(steps)
