"""`camelid demo`: trains a tokenizer and a small Llama on the Python manual that is part of CPython, and uses them.

Nothing is downloaded. Given a checkpoint, it finetunes that instead.
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
from camelid.checkpoint.registry import open_checkpoint
from camelid.checkpoint.state.saved_state import steps_in
from camelid.data.config import DataConfig, Source
from camelid.disk.json_files import write_hf_json
from camelid.errors import UserError
from camelid.model.config import ModelConfig
from camelid.runs.file_names import STEPS
from camelid.runs.recipe import Recipe
from camelid.runs.run import Outcome, run
from camelid.train.config import TrainConfig
from camelid.train.loggers import read_metrics
from camelid.train.optimizer_config import OptimizerConfig

VOCAB = 2048
HELD_OUT = 0.08  # fraction of the topics used for validation
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
    """Runs the demo and prints its results. Everything is written to `folder`.

    Args:
      folder: Folder for the corpus, the tokenizer and the run.
      model: Checkpoint to finetune. None: a new model is trained from scratch.
      steps: Number of training steps.
      ignore: Fields of the checkpoint's config.json to treat as absent.

    Returns:
      False if training was stopped by a signal.
    """
    start = time.perf_counter()
    if model:
        open_checkpoint(model, ignore=ignore)  # raises UserError before anything is written
    train, held_out = write_corpus(folder)
    _say(f"corpus          {train.parent}: the manual of Python {sys.version_info.major}.{sys.version_info.minor}")
    data = {"train": (Source(files=(str(train),)),), "validation": (Source(files=(str(held_out),)),)}
    recipe = finetuning(folder, model, ignore, data, steps) if model else from_scratch(folder, train, data, steps)
    if (made := max(steps_in(Path(recipe.run) / STEPS), default=0)) > steps:
        raise UserError(
            f"{folder} has a run of {made} steps, and --steps is {steps}",
            f"Choose another --folder, or --steps {made} or more.",
        )
    outcome = run(recipe)
    if not outcome.finished:
        _say(f"stopped after step {outcome.steps} of {steps}; run the same command again to resume")
        return False
    losses = [row for row in read_metrics(outcome.folder / "metrics.jsonl") if "validation_loss" in row]
    _summarize(outcome, held_out, losses[0]["validation_loss"], losses[-1]["validation_loss"], start)
    return True


def _summarize(outcome: Outcome, held_out: Path, before: float, after: float, start: float) -> None:
    folder = Path(os.path.relpath(outcome.folder))
    saved = folder / "model"
    _say("")
    _say(f"validation      perplexity {math.exp(before):,.1f} before training, {math.exp(after):,.2f} after")
    for completion in outcome.model.generate(PROMPTS, max_new_tokens=40, temperature=0.7, top_p=0.95):
        _say(f"generated       {completion.prompt}|{' '.join(completion.text.split())}")
    tokens = np.arange(32)[None] % outcome.model.config.vocab_size
    loaded = load(saved, dtype=outcome.model.compute.dtype)
    difference = float(np.max(np.abs(np.asarray(loaded.logits(tokens)) - np.asarray(outcome.model.logits(tokens)))))
    _say(f"saved           {saved}; logits after loading it differ by at most {difference:.1e}")
    _say(f"loss curve      {folder / 'loss.png'}")
    _say(f"recipe          {folder / 'recipe.toml'}")
    _say(f"time            {time.perf_counter() - start:.0f} s")
    _say("")
    _say("next steps")
    own = Path(os.path.relpath(sys.executable)).with_name("camelid")
    camelid = "camelid" if shutil.which("camelid") else own
    _say(f'  {camelid} generate {saved} "The statement" --temperature 0.7')
    _say(f"  {camelid} evaluate perplexity {saved} {Path(os.path.relpath(held_out))}")
    _say(f"  {camelid} inspect {saved}")
    _say(f"  {camelid} demo --model path/to/a/checkpoint      # finetune a checkpoint of yours on the same text")


def write_corpus(folder: Path) -> tuple[Path, Path]:
    """Writes the topics of `pydoc_data.topics` as JSON lines, and returns the files for training and for validation.

    A topic is in one of the two files; topics that are contained in others are left out.

    Raises:
      UserError: If a file exists with other contents, for example of another version of Python.
    """
    from pydoc_data.topics import topics as manual

    texts = sorted({text.strip() for text in manual.values()}, key=len)
    topics = [text for i, text in enumerate(texts) if not any(text in longer for longer in texts[i + 1 :])]
    random.Random(0).shuffle(topics)
    count = max(1, round(len(topics) * HELD_OUT))
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    files = corpus / "train.jsonl", corpus / "held_out.jsonl"
    for file, split in zip(files, (topics[count:], topics[:count]), strict=True):
        content = "".join(json.dumps({"text": text}) + "\n" for text in split)
        if file.exists() and file.read_text("utf-8") != content:
            raise UserError(f"{file} exists and does not contain the manual of this Python", "Choose another --folder.")
        file.write_text(content, "utf-8")
    return files


def train_tokenizer(folder: Path, corpus: Path) -> Path:
    """Trains a byte-level BPE tokenizer on the corpus and saves it in Hugging Face format; returns `folder`."""
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
    write_hf_json(
        folder / "tokenizer_config.json",
        names | {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "PreTrainedTokenizerFast"},
    )
    return folder


def from_scratch(folder: Path, corpus: Path, data: dict, steps: int) -> Recipe:
    """The recipe of a small new Llama, whose tokenizer is trained here."""
    return Recipe(
        run=str(folder / "run"),
        model=MODEL,
        tokenizer=str(train_tokenizer(folder / "tokenizer", corpus)),
        data=DataConfig(**data, sequence_length=256, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
        train=TrainConfig(steps=steps, evaluate_every=50, checkpoint_every=100),
    )


def finetuning(folder: Path, checkpoint: str, ignore: tuple[str, ...], data: dict, steps: int) -> Recipe:
    """The recipe that finetunes `checkpoint` with a small learning rate."""
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
