"""Meta's tokenizer.model of Llama 3: a list of byte sequences with ranks, in the format of tiktoken.

Each line contains the bytes of a token in base64, and its rank, which is its id. tiktoken merges the two neighbors
whose concatenation has the lowest rank. `tokenizers` uses a list of merges instead: all pairs of tokens whose
concatenation is a token, ordered by its rank, give the same ids. A text that is itself a token becomes that token, even
if no merges produce it (`ignore_merges`).

Sources: llama/tokenizer.py of github.com/meta-llama/llama3, models/llama3/tokenizer.py of llama-models, and the
tokenizer.json files that Meta released with them.
"""

import base64
import binascii
import re
from pathlib import Path
from typing import TYPE_CHECKING

from camelid.errors import UserError
from camelid.text.added_tokens import DeclaredTokens, read_object
from camelid.text.backends import byte_alphabet
from camelid.text.hf_pipelines import Vocabulary, byte_level_pipeline

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
BOS, EOS, END_OF_MESSAGE, END_OF_TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"
NUM_SPECIALS = 256
RESERVED = "<|reserved_special_token_{}|>"
# By index after the ranks. All other indices are reserved tokens, which are numbered from 0.
LLAMA3 = {0: BOS, 1: EOS, 6: "<|start_header_id|>", 7: "<|end_header_id|>", 9: END_OF_TURN}
LLAMA3_1 = LLAMA3 | {4: "<|finetune_right_pad_id|>", 8: END_OF_MESSAGE, 10: "<|python_tag|>"}
"""Also of Llama 3.2 and 3.3."""
LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+")


def is_tiktoken(file: Path) -> bool:
    """Whether a file starts like a list of ranks."""
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
                f"{file}:{number} is not a token with its rank: {error}", "Download the file again."
            ) from error
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing or sorted(ranks.values()) != list(range(len(ranks))):
        what = f"byte {missing[0]} has no token" if missing else f"its ranks are not 0 to {len(ranks) - 1}"
        raise UserError(f"{file} is damaged: {what}", "Download the file again.")
    return ranks


def vocabulary(ranks: dict[bytes, int]) -> Vocabulary:
    """The tokens in GPT-2's characters for bytes, and the merges that give the ids of tiktoken."""
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
    """The names of the 256 special tokens of the release that params.json in the folder describes.

    The names of Llama 3.1 include those of Llama 3, and are used if there is no params.json.
    """
    params = read_object(folder / "params.json")
    names = LLAMA3 if params and not params.get("use_scaled_rope") else LLAMA3_1
    reserved = (RESERVED.format(number) for number in range(NUM_SPECIALS))
    return [names[place] if place in names else next(reserved) for place in range(NUM_SPECIALS)]


def build(file: Path, declared: DeclaredTokens) -> "Tokenizer":
    """Builds the tokenizer of a list of ranks.

    Special tokens are those that tokenizer_config.json declares, or otherwise those of the release.
    """
    from tokenizers import AddedToken

    ranks = read_ranks(file)
    tokenizer = byte_level_pipeline(vocabulary(ranks), PATTERN, ignore_merges=True)
    names = [] if any(token >= len(ranks) for token in declared.added) else special_tokens(file.parent)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in names])
    return tokenizer


def set_bos(tokenizer: "Tokenizer", bos: str | None) -> None:
    """Sets the post-processor of the released tokenizer.json files, which prepends BOS if `bos` is given."""
    from tokenizers import processors

    steps: list = [processors.ByteLevel(trim_offsets=False)]
    if bos is not None:
        pair = f"{bos}:0 $A:0 {bos}:1 $B:1"
        named = [(bos, tokenizer.token_to_id(bos))]
        steps.append(processors.TemplateProcessing(single=f"{bos}:0 $A:0", pair=pair, special_tokens=named))
    tokenizer.post_processor = processors.Sequence(steps)
