"""Measures the speed of data preparation, compared with the tokenizer alone, and of batch creation.

`python benchmarks/data.py TOKENIZER_JSON TEXT_FILE...` prints one JSON object.

prepare: the text of the files as JSON Lines, repeated to --megabytes, is prepared into a store by two processes,
including their start, reading and writing. For comparison, `tokenizers` encodes the same documents: encode_batch_fast
with two threads, from memory, including the creation of lists of ids. `ratio` is the time of `tokenizers` divided by
that of camelid. Each measurement is a process of its own, the two alternate, and their best times are compared;
`ratios` has one per round.

rows: two processes create batches with rows of 2048 tokens (tokens, targets, weights, positions, segments) from a
store in the page cache, and a third receives them. Documents have a few hundred tokens and loss weights. Tokens per
second, without the start of the processes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

THREADS = 2
DOCUMENT = 2000  # characters
LENGTH = 2048
ROWS = 32  # of a batch
BATCHES = 400
WARM = 40  # batches of the warmup
STORE = 30_000_000  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="a tokenizer.json")
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="folder for temporary files")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        size = write_text(Path(folder) / "text.jsonl", given.texts, given.megabytes * 10**6)
        takes = [
            {part: in_a_process(part, folder, given.tokenizer) for part in ("encode", "prepare")}
            for _ in range(given.rounds)
        ]
        in_a_process("build", folder)
        rows = [
            {
                "packing": packing,
                "tokens_per_s": max(in_a_process("rows", folder, packing) for _ in range(given.rounds)),
            }
            for packing in ("best_fit", "stream")
        ]
    best = {part: min(take[part]["seconds"] for take in takes) for part in ("encode", "prepare")}
    counts = {take[part]["tokens"] for take in takes for part in take}
    assert len(counts) == 1, f"the numbers of tokens differ: {counts}"
    found = {
        "bytes": size,
        "tokens": counts.pop(),
        "tokenizers_s": round(best["encode"], 2),
        "prepare_s": round(best["prepare"], 2),
        "ratio": round(best["encode"] / best["prepare"], 2),
        # CPU times depend less on other work on the machine; they include imports.
        "cpu_ratio": round(
            min(take["encode"]["cpu"] for take in takes) / min(take["prepare"]["cpu"] for take in takes), 2
        ),
        "ratios": [round(take["encode"]["seconds"] / take["prepare"]["seconds"], 2) for take in takes],
    }
    print(json.dumps({"prepare": found, "rows": rows}))


def write_text(path: Path, sources: list[Path], size: int) -> int:
    """Writes documents of a few paragraphs, repeated; a number in each keeps tokenizers from caching entire texts."""
    paragraphs = [part.strip() for source in sources for part in re.split(r"\n\s*\n", source.read_text("utf-8"))]
    text = "\n".join(part for part in paragraphs if part).splitlines()
    written = n = place = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            lines, length = [str(n)], 0
            while length < DOCUMENT:
                lines.append(text[place % len(text)])
                length, place = length + len(lines[-1]), place + 1
            written += file.write(json.dumps({"text": "\n".join(lines)}) + "\n")
            n += 1
    return path.stat().st_size


def in_a_process(part: str, *words: object) -> Any:
    """Runs one of PARTS in a process of its own and returns its result."""
    command = [sys.executable, __file__, part, *map(str, words)]
    environment = os.environ | {"RAYON_NUM_THREADS": str(THREADS)}
    before = os.times()
    found = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)
    after = os.times()
    if isinstance(found, dict):
        found["cpu"] = sum(after[2:4]) - sum(before[2:4])
    return found


# Parts that run in processes of their own -------------------------------------------------


def encode(folder: str, tokenizer: str) -> dict[str, Any]:
    """Measures the tokenizer alone."""
    import tokenizers

    engine = tokenizers.Tokenizer.from_file(tokenizer)
    engine.encode_special_tokens = True
    with Path(folder, "text.jsonl").open() as file:
        documents = [json.loads(line)["text"] for line in file]
    began = time.perf_counter()
    tokens = 0
    for first in range(0, len(documents), 500):
        encoded = engine.encode_batch_fast(documents[first : first + 500], add_special_tokens=False)
        tokens += sum(len(found.ids) for found in encoded)
    return {"seconds": time.perf_counter() - began, "tokens": tokens}


def prepare(folder: str, tokenizer: str) -> dict[str, Any]:
    """Measures the preparation of a store."""
    from camelid.data.config import Source
    from camelid.data.preparation.prepare import prepare
    from camelid.text.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    source = Source(files=(str(Path(folder, "text.jsonl")),), add_bos=False, add_eos=False)
    began = time.perf_counter()
    store = prepare([source], loaded, Path(folder, "prepared"), workers=THREADS)
    seconds = time.perf_counter() - began
    tokens = store.num_tokens
    subprocess.run(["rm", "-r", str(store.folder)], check=True)
    return {"seconds": seconds, "tokens": tokens}


def build(folder: str) -> None:
    """Writes a store of random documents, in which a third of the tokens have no loss."""
    import numpy as np

    from camelid.data.preparation.store import Writer

    chance = np.random.default_rng(0)
    lengths = np.exp(chance.normal(5.5, 1, STORE // 400)).astype(np.int64) + 2
    count = int(lengths.sum())
    with Writer(Path(folder, "store"), 32_000) as writer:
        writer.append(chance.integers(0, 32_000, count), lengths, (chance.random(count) < 2 / 3).astype(np.float32))
        writer.finish({"tokenizer": "none"})


def rows(folder: str, packing: Any) -> float:
    """Returns tokens per second."""
    from types import SimpleNamespace

    import numpy as np

    from camelid.data.config import DataConfig, Source
    from camelid.data.rows.loader import Loader
    from camelid.data.rows.prefetch import prefetched

    source = Source(files=(str(Path(folder, "store")),), kind="tokens")
    config = DataConfig(
        train=(source,), packing=packing, sequence_length=LENGTH, batch_size=ROWS, workers=2, cache=folder
    )
    tokenizer: Any = SimpleNamespace(fingerprint="none", files=("none",), vocab_size=32_000)
    loader = Loader(config, tokenizer)
    loader.packings[0].store.verify()  # loads all of it into the page cache
    began = time.perf_counter()
    for step, batch in enumerate(prefetched(loader, 0, BATCHES + WARM)):
        if step == WARM:
            began = time.perf_counter()
        for array in vars(batch).values():
            np.add.reduce(array.reshape(-1)[:: 4096 // array.itemsize])  # touches every page
    return round((BATCHES - 1) * ROWS * LENGTH / (time.perf_counter() - began))


PARTS = {"encode": encode, "prepare": prepare, "build": build, "rows": rows}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in PARTS:
        print(json.dumps(PARTS[sys.argv[1]](*sys.argv[2:])))
    else:
        main()
