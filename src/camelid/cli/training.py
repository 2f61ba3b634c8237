"""Commands that train."""

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, Suppress, arg

from camelid.cli.shared import Ignore, note
from camelid.parallel.compiled import keep_compiled


def train(
    recipe: Annotated[Positional[Path], arg(metavar="RECIPE.toml", help="docs/recipes.md lists its fields")],
    print_recipe: bool = False,
    from_step: int | None = None,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    detect: bool = False,
    overrides: Suppress[tuple[str, ...]] = (),
) -> None:
    """Train as a recipe says; the same command goes on where a stopped run was.

    camelid train recipes/finetune.toml
    camelid train recipes/finetune.toml --train.steps 500 --optimizer.learning-rate 1e-4 --run runs/second
    camelid train recipes/finetune.toml --print-recipe

    Any field of the recipe may follow as --table.field VALUE.

    Args:
        print_recipe: print the recipe with every field resolved, and end
        from_step: go on from this older checkpoint; those of later steps are moved aside, not deleted
        coordinator: host:port of process 0, where several processes train together
        processes: how many they are
        process_id: which of them this is, from 0
        detect: join the processes that SLURM, MPI or a TPU pod tells of
    """
    from camelid.recipe import read_recipe, write_recipe

    resolved = read_recipe(recipe, overrides)
    if print_recipe:
        return print(write_recipe(resolved), end="")
    keep_compiled()
    from camelid.parallel import hosts

    hosts.start(hosts.Processes(coordinator=coordinator, count=processes, id=process_id, detect=detect))
    from camelid.run import run

    outcome = run(resolved, from_step)
    if not hosts.is_main():
        return None
    if not outcome.finished:
        note(f"stopped after step {outcome.steps} of {resolved.train.steps}; the same command goes on from there")
        return None
    note(f"model {outcome.folder / 'model'}   losses {outcome.folder / 'loss.png'}")
    return None


def demo(
    model: str | None = None,
    folder: Path = Path("runs/demo"),
    steps: int = 200,
    ignore_config_field: Ignore = (),
) -> None:
    """Train a tokenizer and a small Llama from scratch, measure it, write with it, save it: offline, in minutes.

    camelid demo
    camelid demo --model ./TinyLlama

    Args:
        model: finetune this checkpoint instead of training from scratch
        folder: where everything goes
        steps: of training
    """
    keep_compiled()
    from camelid.demo import main

    main(folder, model, steps, ignore_config_field)
