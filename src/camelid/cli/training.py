"""Commands for training."""

import os
import shlex
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, Suppress, arg

from camelid.cli.failures import as_user_error
from camelid.cli.shared import Ignore, note
from camelid.interrupts import STOPPED
from camelid.parallel.compilation_cache import keep_compiled

if TYPE_CHECKING:
    from camelid.runs.recipe import Recipe
    from camelid.runs.run import Outcome


def train(
    recipe: Annotated[
        Positional[Path], arg(metavar="RECIPE", help="a .toml file, or a name that `camelid recipes` lists")
    ],
    print_recipe: bool = False,
    dry_run: bool = False,
    from_step: int | None = None,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    detect: bool = False,
    overrides: Suppress[tuple[str, ...]] = (),
) -> None:
    """Train from a recipe; rerun the command to resume.

    camelid train recipe.toml
    camelid train recipe.toml --train.steps 500 --optimizer.learning-rate 1e-4 --run runs/second
    camelid train llama2_7b_alpaca_lora --init ./Llama-2-7b-hf --print-recipe
    camelid train recipe.toml --dry-run

    Any field of the recipe can be overridden by --table.field VALUE; lists and tables are written as in TOML:
    --train.freeze '["embed", "lm_head"]'. On Ctrl-C or SIGTERM, training finishes the current step, saves a checkpoint
    and exits with status 75; a second Ctrl-C exits immediately.

    Args:
        print_recipe: print the recipe with the values of all fields, and exit
        dry_run: open the data and the checkpoint and compile the training step, print the memory, the time and the disk
            space that the run needs, and exit; nothing is trained or written
        from_step: resume from the checkpoint of this step; checkpoints of later steps are moved aside, not deleted
        coordinator: address of process 0, host:port, for training with several processes
        processes: number of processes
        process_id: index of this process, from 0
        detect: take the three options above from the environment of SLURM, MPI or a TPU pod
    """
    from camelid import recipes
    from camelid.runs.recipe import completed, read_recipe, write_recipe
    from camelid.runs.recipe_defaults import with_defaults

    resolved = read_recipe(recipes.find(recipe), overrides)
    if print_recipe:
        kept = None
        if (folder := Path(resolved.run)).is_dir():
            from camelid.runs.run_folder import kept_recipe  # imports JAX, which is not needed for a new run

            kept = kept_recipe(folder)
        text = write_recipe(whole := completed(resolved, kept))
        print(with_defaults(text, tomllib.loads(text), whole), end="")
        return
    keep_compiled()
    from camelid.parallel import hosts

    hosts.start(hosts.Processes(coordinator=coordinator, count=processes, id=process_id, detect=detect))
    (dry_run_recipe if dry_run else train_recipe)(resolved, from_step)


def dry_run_recipe(recipe: "Recipe", from_step: int | None = None) -> None:
    """Prints what a run would do and take."""
    from camelid.parallel import hosts
    from camelid.parallel.failure import fail_together

    with fail_together(lambda error: as_user_error(error, "train")):
        from camelid.runs.dry_run import dry_run
        from camelid.runs.dry_run_report import report_lines

        found = dry_run(recipe, from_step)
        if hosts.is_main():
            for line in report_lines(found):
                print(line)


def train_recipe(recipe: "Recipe", from_step: int | None = None) -> None:
    """Trains by a recipe and prints where the result is; exits with status 75 if a signal stopped the run."""
    from camelid.parallel import hosts
    from camelid.parallel.failure import fail_together

    with fail_together(lambda error: as_user_error(error, "train")):
        from camelid.runs.run import run

        outcome = run(recipe, from_step)
    if hosts.is_main():
        _tell_end(outcome, recipe)
    if not outcome.finished:
        sys.exit(STOPPED)


def _tell_end(outcome: "Outcome", recipe: "Recipe") -> None:
    """Prints where the result of a run is, and commands to try next."""
    if not outcome.finished:
        again = "run the same command again to resume"
        if not (recipe.checkpoint.optimizer or recipe.checkpoint.restart_optimizer):
            again = "to resume with a new state of the optimizer, add --checkpoint.restart-optimizer true"
        note(f"stopped after step {outcome.steps} of {recipe.train.steps}; {again}")
        return
    written = (f"{folder.name} {folder}" for folder in outcome.saved)
    note("   ".join([*written, f"losses {outcome.folder / 'loss.png'}"]))
    if recipe.lora is not None and recipe.lora.base in ("int8", "nf4") and not recipe.lora.merge:
        note(
            f"the base was held in {recipe.lora.base}; generate and convert use it as it is in init. "
            "The same command with --lora.merge true writes the model that was trained"
        )
    for what, command in _next(outcome.folder, recipe):
        note(f"  {what:9} {command}")


def _next(folder: Path, recipe: "Recipe") -> Iterator[tuple[str, str]]:
    """Commands to try after a run, as what they do and how they are written."""
    from camelid.text.templates import CHAT_TEMPLATE

    run = shlex.quote(os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder))
    model = f"{run}/model" if recipe.lora is not None and recipe.lora.merge else run
    chat = "--chat " if (folder / CHAT_TEMPLATE).is_file() else ""
    yield "generate", f'camelid generate {model} {chat}"Hello"'
    if recipe.lora is None:
        yield "convert", f"camelid convert {run} model.gguf"
    elif not recipe.lora.merge:
        yield "merge", f"camelid convert {run} merged"
    examples = any(source.has_prompts for source in recipe.data.train) and recipe.dpo is None
    yield "evaluate", f"camelid evaluate perplexity {run} {'EXAMPLES.jsonl' if examples else 'TEXT.txt'}"


def demo(
    model: str | None = None,
    folder: Path = Path("runs/demo"),
    steps: int = 200,
    ignore_config_field: Ignore = (),
) -> None:
    """Train a tokenizer and a small Llama from scratch, evaluate it, generate text and save it, offline.

    camelid demo
    camelid demo --model ./TinyLlama

    Args:
        model: finetune this checkpoint instead of training from scratch
        folder: folder for everything that is written
        steps: number of training steps
    """
    keep_compiled()
    from camelid.demo import main

    if not main(folder, model, steps, ignore_config_field):
        sys.exit(STOPPED)
