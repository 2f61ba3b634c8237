"""The main job on an embedded default: the English manual that every CPython carries becomes a corpus and a Llama.

Nothing is downloaded. With a checkpoint of the user's, that is finetuned on the same corpus instead.
"""

import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from camelid.api import load
from camelid.checkpoint.folder import write_json
from camelid.checkpoint.registry import open_checkpoint
from camelid.data.config import DataConfig, Source
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.runs.recipe import Recipe
from camelid.runs.run import Outcome, run
from camelid.train.config import TrainConfig
from camelid.train.loggers import read_metrics
from camelid.train.optimizer import OptimizerConfig

VOCAB = 2048
HELD_OUT = 0.08  # of the topics
PROMPTS = ("The statement", "If the object is a class,", "A list of")
MODEL = ModelConfig(
    vocab_size=VOCAB,
    embed_dim=192,
    mlp_dim=512,
    num_layers=4,
    num_heads=6,
    num_kv_heads=3,
    head_dim=32,
    context_length=512,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    bos_id=0,
    eos_ids=(1,),
)


def main(folder: Path, model: str | None, steps: int, ignore: tuple[str, ...] = ()) -> bool:
    """Corpus, tokenizer, training, measurement, text, saving, opening again; all under `folder`.

    Returns False if a signal stopped the training.
    """
    began = time.perf_counter()
    if model:
        open_checkpoint(model, ignore=ignore)  # what cannot be opened is refused before anything is written
    train, held_out = write_corpus(folder)
    _say(f"corpus     {train.parent}: the manual of Python {sys.version_info.major}.{sys.version_info.minor}")
    data = {"train": (Source(files=(str(train),)),), "validation": (Source(files=(str(held_out),)),)}
    recipe = finetuning(folder, model, ignore, data, steps) if model else from_scratch(folder, train, data, steps)
    outcome = run(recipe)
    if not outcome.finished:
        _say(f"stopped after step {outcome.steps} of {steps}; the same command resumes the run")
        return False
    losses = [row for row in read_metrics(outcome.folder / "metrics.jsonl") if "validation_loss" in row]
    _summarize(outcome, losses[0]["validation_loss"], losses[-1]["validation_loss"], began)
    return True


def _summarize(outcome: Outcome, before: float, after: float, began: float) -> None:
    place = Path(os.path.relpath(outcome.folder))
    saved = place / "model"
    _say("")
    _say(f"held-out text   perplexity {math.exp(before):,.1f} before training, {math.exp(after):,.2f} after")
    for completion in outcome.model.generate(PROMPTS, max_new_tokens=40, temperature=0.7, top_p=0.95):
        _say(f"it writes       {completion.prompt}|{' '.join(completion.text.split())}")
    tokens = np.arange(32)[None] % outcome.model.config.vocab_size
    again = load(saved, dtype=outcome.model.compute.dtype)
    difference = float(np.max(np.abs(np.asarray(again.logits(tokens)) - np.asarray(outcome.model.logits(tokens)))))
    _say(f"opened again    {saved}: logits differ by at most {difference:.1e}")
    _say(f"loss curve      {place / 'loss.png'}")
    _say(f"recipe          {place / 'recipe.toml'}")
    _say(f"took            {time.perf_counter() - began:.0f} s")
    _say("")
    _say("try next")
    here = Path(os.path.relpath(sys.executable)).with_name("camelid")
    camelid = "camelid" if shutil.which("camelid") else here
    _say(f'  {camelid} generate {saved} "The statement" --temperature 0.7')
    _say(f"  {camelid} evaluate perplexity {saved} README.md")
    _say(f"  {camelid} inspect {saved}")
    _say("  make demo MODEL=path/to/a/checkpoint      finetunes one of your own on the same text")


def write_corpus(folder: Path) -> tuple[Path, Path]:
    """The topics of `pydoc_data.topics` as JSON lines, whole topics held out; those contained in others are dropped."""
    from pydoc_data.topics import topics

    texts = sorted({text.strip() for text in topics.values()}, key=len)
    whole = [text for i, text in enumerate(texts) if not any(text in longer for longer in texts[i + 1 :])]
    random.Random(0).shuffle(whole)
    cut = max(1, round(len(whole) * HELD_OUT))
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    files = corpus / "train.jsonl", corpus / "held_out.jsonl"
    for file, part in zip(files, (whole[cut:], whole[:cut]), strict=True):
        content = "".join(json.dumps({"text": text}) + "\n" for text in part)
        if file.exists() and file.read_text("utf-8") != content:
            raise UserError(f"{file} holds something else than the manual of this Python", "Choose another --folder.")
        file.write_text(content, "utf-8")
    return files


def train_tokenizer(folder: Path, corpus: Path) -> Path:
    """A byte-level BPE tokenizer of the corpus, in the files of a Hugging Face checkpoint."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (json.loads(line)["text"] for line in corpus.read_text("utf-8").splitlines())
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    write_json(
        folder / "tokenizer_config.json",
        names | {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"},
    )
    return folder


def from_scratch(folder: Path, corpus: Path, data: dict, steps: int) -> Recipe:
    """A small Llama and its tokenizer, both new."""
    return Recipe(
        run=str(folder / "run"),
        model=MODEL,
        tokenizer=str(train_tokenizer(folder / "tokenizer", corpus)),
        data=DataConfig(**data, sequence_length=256, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        train=TrainConfig(steps=steps, evaluate_every=50, checkpoint_every=100),
    )


def finetuning(folder: Path, checkpoint: str, ignore: tuple[str, ...], data: dict, steps: int) -> Recipe:
    """The user's checkpoint, gently."""
    length = min(256, open_checkpoint(checkpoint, ignore=ignore).config.context_length)
    return Recipe(
        run=str(folder / Path(checkpoint).resolve().name),
        init=checkpoint,
        init_ignore=ignore,
        data=DataConfig(**data, sequence_length=length, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=5, weight_decay=0.0),
        train=TrainConfig(steps=steps, evaluate_every=50, checkpoint_every=100),
    )


def _say(text: str) -> None:
    print(text, flush=True)
