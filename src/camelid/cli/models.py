"""Commands that use a model: generate, evaluate perplexity, inspect."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from camelid.cli.shared import (
    Checkpoint,
    Config,
    Dtype,
    Ignore,
    TokenizerPath,
    load,
    model_config,
    note,
    print_json,
    print_pieces,
    print_text,
    progress_bar,
    tell,
)
from camelid.errors import UserError
from camelid.generate.config import GenerationConfig
from camelid.inputs import expand_home, read_text

if TYPE_CHECKING:
    from camelid.completion import Completion
    from camelid.text.tokenizer import Tokenizer

Prompts = Annotated[
    Positional[tuple[str, ...]],
    arg(
        metavar="[PROMPT...]",
        help='texts to continue, "" to begin with BOS alone; if none is given, one is read from standard input',
    ),
]
Texts = Annotated[
    Positional[tuple[str, ...]],
    arg(
        metavar="FILE...",
        help="files of examples (.jsonl, .json, .parquet; also .gz, .zst) or of plain UTF-8 text; or a recipe (.toml) "
        "or the folder of a run",
    ),
]


def generate(
    model: Checkpoint,
    generation: Annotated[GenerationConfig, OmitArgPrefixes, UseAppendAction],
    prompts: Prompts = (),
    chat: bool = False,
    stream: bool = False,
    config: Config = None,
    ignore_config_field: Ignore = (),
    tokenizer: TokenizerPath = None,
    dtype: Dtype = "float32",
    json: bool = False,
) -> None:
    """Generate a continuation of each prompt, or with --chat the answer to it.

    camelid generate ./TinyLlama "Once upon a time" --max-new-tokens 100
    camelid generate ./TinyLlama --chat "Who was Ada Lovelace?"
    camelid generate ./TinyLlama "Hello" "Bonjour" --temperature 0.8 --top-p 0.95 --seed 1 --json
    camelid generate ./TinyLlama "The capital of" --stop . --n 3 --temperature 1
    cat prompt.txt | camelid generate ./TinyLlama

    Options are applied in this order: --logit-bias and excluded tokens, --repetition-penalty, --presence-penalty and
    --frequency-penalty, --no-repeat-ngram-size, --min-new-tokens, --temperature, --top-k, --top-p, --min-p,
    --typical-p.

    --suppress-tokens, --allowed-tokens, --stop and --stop-token-ids take one value, and can be given several times.

    Args:
        chat: each prompt is the message of a user, in the chat template of the checkpoint; only the answer is printed
        stream: print text as it is generated, one prompt after the other; the default for one prompt in a terminal
        json: print the result as one JSON object
    """
    texts = list(prompts) or [_prompt_from_input()]
    if stream and json:
        raise UserError("--stream and --json exclude each other", "Leave one of them out.")
    if stream and generation.n > 1:
        raise UserError(f"--n {generation.n} completions cannot be streamed together", "Leave out --stream or --n.")
    if (generation.logprobs or generation.top_logprobs) and not json:
        raise UserError("--logprobs and --top-logprobs are part of the JSON output alone", "Add --json.")
    loaded = load(model, dtype, config, ignore_config_field, tokenizer)
    if not chat and loaded.tokenizer is not None and loaded.tokenizer.has_chat_template:
        note(
            "note: this model was finetuned for chats, but prompts are used as they are; --chat applies its chat "
            "template"
        )
    filters = ("top_k", "top_p", "min_p", "typical_p")
    if generation.temperature == 0 and (unused := [name for name in filters if getattr(generation, name) is not None]):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        note(f"note: with --temperature 0, {names} has no effect; to sample, set --temperature above 0")
    given = _chats(texts, loaded.tokenizer, model) if chat else texts
    if stream or (
        sys.stdout.isatty() and len(texts) == generation.n == 1 and not json and loaded.tokenizer is not None
    ):
        for number, prompt in enumerate(given):
            seeded = dataclasses.replace(generation, seed=generation.seed + number)
            print_pieces(loaded.stream(prompt, seeded), "" if chat else texts[number])
        return
    completions = loaded.generate(given, generation)
    if json:
        print_json({"completions": [_as_json(completion) for completion in completions]})
    else:
        for completion in completions:
            print_text(completion.text if chat else completion.prompt + completion.text)
    if any(completion.finish_reason == "error" for completion in completions):
        sys.exit(1)


def _as_json(completion: "Completion") -> dict[str, Any]:
    """The fields of a completion; log-probabilities only if they were requested."""
    fields = dataclasses.asdict(completion)
    return {name: value for name, value in fields.items() if value is not None}


def _chats(texts: Sequence[str], tokenizer: "Tokenizer | None", model: str) -> list[list[int]]:
    """The tokens of chats that consist of the message of a user, with the start of the assistant's turn."""
    from camelid.text.chat import load_template

    if tokenizer is None or "default" not in tokenizer.chat_templates:
        raise UserError(
            f"{model} has no chat template",
            "Leave out --chat, and write the prompt as the texts that the model was trained on.",
        )
    return load_template(None, tokenizer).encode_questions(texts, tokenizer)


def _prompt_from_input() -> str:
    if not (text := sys.stdin.read().removesuffix("\n")):
        raise UserError(
            "there is no prompt: standard input is empty",
            'Give a prompt; "" generates a text that begins with BOS alone.',
        )
    return text


def perplexity(
    model: Checkpoint,
    files: Texts,
    sequence_length: int | None = None,
    max_tokens: int | None = None,
    text_key: str | None = None,
    template: str | None = None,
    config: Config = None,
    ignore_config_field: Ignore = (),
    tokenizer: TokenizerPath = None,
    dtype: Dtype = "float32",
    json: bool = False,
) -> None:
    """Compute the perplexity of text or of answers: also loss (nats per token) and bits per byte.

    camelid evaluate perplexity ./TinyLlama test.txt
    camelid evaluate perplexity ./TinyLlama test.txt --sequence-length 256 --max-tokens 100000 --json
    camelid evaluate perplexity ./TinyLlama held_out.jsonl --text-key body
    camelid evaluate perplexity runs/assistant instructions.json
    camelid evaluate perplexity ./TinyLlama runs/assistant

    A text is one example of a .jsonl, .json or .parquet file, as training reads it, or the entire content of any other
    file. The texts are concatenated without BOS and scored in windows; every token except the first is scored once.

    Of chats, instructions and questions with answers, only the answers are scored, as in finetuning. Of a recipe or a
    run, its validation data are scored: the result is the validation loss that a run with this model would report.

    Args:
        sequence_length: tokens per window (default: the context length of the model, at most 2048)
        max_tokens: score only up to this number of tokens of texts
        text_key: name of the field that holds the text of an example (default: text)
        template: chat template of instructions and chats (default: that of the checkpoint)
        json: print the result as one JSON object
    """
    import numpy as np

    from camelid.evaluate.perplexity import perplexity

    what = _to_evaluate(files, text_key)
    for option, value, kinds in (
        ("--max-tokens", max_tokens, ("texts",)),
        ("--template", template, ("answers",)),
        ("--sequence-length", sequence_length, ("texts", "answers")),
    ):
        if value is not None and what not in kinds:
            raise UserError(f"{option} does not apply to {files[0]}", "Leave it out.")
    if what != "texts":
        loaded = load(model, dtype, config, ignore_config_field, tokenizer)
        return _evaluate(loaded, model, files, what, sequence_length, template, json)
    texts = [text for file in files for text in _texts(file, text_key or "text")]
    if not any(texts):
        raise UserError(f"{', '.join(files)}: no text to score", "Give a file that contains text.")
    loaded = load(model, dtype, config, ignore_config_field, tokenizer)
    if loaded.tokenizer is None:
        raise UserError(f"{model} has no tokenizer", "Give one with --tokenizer.")
    ids = [token for row in loaded.tokenizer.encode_batch(texts, bos=False) for token in row]
    size = sum(len(text.encode()) for text in texts)
    if max_tokens is not None and max_tokens < len(ids):
        ids = ids[:max_tokens]
        size = len(loaded.tokenizer.decode(ids).encode())
    length = sequence_length or min(2048, loaded.config.context_length)
    with progress_bar("score") as progress:
        result = perplexity(
            loaded.params, np.array(ids), size, length, loaded.config, loaded.compute, loaded.mesh, progress
        )
    if json:
        # JSON has no infinity, which the exponential of a loss above 709 is.
        shown = result if math.isfinite(result.perplexity) else dataclasses.replace(result, perplexity=None)
        return print_json(dataclasses.asdict(shown))
    print(f"perplexity     {result.perplexity:.4f}")
    print(f"loss           {result.loss:.4f} nats per token")
    print(f"bits per byte  {result.bits_per_byte:.4f}")
    print(f"tokens         {result.tokens:,}")


def _texts(file: str, text_key: str) -> list[str]:
    """The texts of a file's examples, as training reads them; the entire content of a file of any other kind."""
    from camelid.data.config import Source
    from camelid.data.readers.sources import holds_records, read_records

    if not holds_records(path := Path(expand_home(file))):
        return [read_text(path)]
    try:
        return [record.value for record in read_records(Source(files=(file,), text_key=text_key))]
    except UserError as error:
        if "no field" not in error.problem:
            raise
        raise UserError(
            error.problem,
            "Set --text-key to the field that holds the text. The loss of answers is computed of chats, instructions "
            "and questions; for others, give a recipe that has them as data.validation.",
        ) from error


def _to_evaluate(files: Sequence[str], text_key: str | None) -> Literal["texts", "answers", "recipe"]:
    """What files hold: texts; examples, of which the answers are scored; or one recipe with validation data."""
    from camelid.data.detection import detect
    from camelid.data.readers.sources import holds_records

    paths = [Path(expand_home(file)) for file in files]
    recipes = [path for path in paths if path.suffix == ".toml" or (path / "recipe.toml").is_file()]
    if recipes:
        if len(files) > 1 or text_key is not None:
            raise UserError(f"{recipes[0]} is a recipe, and there is more than its validation data", "Give it alone.")
        return "recipe"
    answers = set()
    for file, path in zip(files, paths, strict=True):
        kind = "text"
        if text_key is None and holds_records(path):
            with contextlib.suppress(UserError):  # records of no known kind are texts, whose reader names their fields
                kind = detect(file)["kind"]
        answers.add(kind not in ("text", "tokens"))
    if len(answers) > 1:
        raise UserError("some files hold texts, and others examples with answers", "Evaluate them separately.")
    return "answers" if answers == {True} else "texts"


def _evaluate(
    loaded,
    model: str,
    files: Sequence[str],
    what: str,
    sequence_length: int | None,
    template: str | None,
    json: bool,
) -> None:
    """Prints the loss of a model on the answers in files, or on the validation data of a recipe."""
    from camelid.runs.evaluation import evaluate_examples, evaluate_recipe

    if loaded.tokenizer is None:
        raise UserError(f"{model} has no tokenizer", "Give one with --tokenizer.")
    with progress_bar("score") as progress:
        if what == "recipe":
            result = evaluate_recipe(loaded, Path(expand_home(files[0])), progress)
        else:
            length = sequence_length or min(2048, loaded.config.context_length)
            try:
                result = evaluate_examples(loaded, files, length, template, model, progress)
            except UserError as error:
                if "has a token with a loss" not in error.problem:
                    raise
                raise UserError(
                    f"{', '.join(files)}: no answer has a token with a loss in rows of {length} tokens",
                    "Prompts fill the rows. Increase --sequence-length, up to the context of the model, "
                    f"{loaded.config.context_length} tokens, or shorten the prompts.",
                ) from error
    tell(result.notes)
    perplexity, per_token = result.perplexity, result.perplexity is not None
    if json:
        finite = perplexity is not None and math.isfinite(perplexity)
        tokens = result.weight if per_token else None
        if tokens is not None and tokens.is_integer():
            tokens = int(tokens)
        return print_json(
            {"perplexity": perplexity if finite else None, "loss": result.loss, "tokens": tokens, "rows": result.rows}
        )
    if per_token:
        scored = "validation data" if what == "recipe" else "answers"
        print(f"perplexity     {perplexity:.4f}")
        print(f"loss           {result.loss:.4f} nats per token of the {scored}")
        print(f"tokens         {result.weight:,.0f}")
    else:
        print(f"loss           {result.loss:.4f} nats per token, averaged over rows")
    print(f"rows           {result.rows:,}")
    return None


def inspect(
    model: Annotated[
        Positional[str | None],
        arg(metavar="[MODEL]", help="folder of a checkpoint, repository on the Hugging Face Hub, or preset"),
    ] = None,
    config: Config = None,
    ignore_config_field: Ignore = (),
    presets: bool = False,
    json: bool = False,
) -> None:
    """Show the configuration, parameters, memory and FLOPs of a model.

    camelid inspect ./TinyLlama
    camelid inspect llama2_70b
    camelid inspect --presets

    Args:
        presets: list the presets: configurations of released models, for training from scratch
        json: print the result as one JSON object
    """
    if presets == (model is not None):
        raise UserError("inspect takes either a MODEL or --presets", "camelid inspect --help shows examples.")
    from camelid import describe

    report = (
        describe.presets()
        if model is None
        else describe.report(model, model_config(config, ignore_config_field), ignore_config_field)
    )
    if json:
        return print_json(report)
    tell(report.get("notes", ()))
    return describe.show_presets(report) if model is None else describe.show(report)
