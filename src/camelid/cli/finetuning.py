"""`camelid finetune`."""

import re
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, Suppress, arg

from camelid.cli.shared import Checkpoint, Ignore, note, tell
from camelid.cli.training import dry_run_recipe, train_recipe
from camelid.data.config import Kind
from camelid.errors import UserError

if TYPE_CHECKING:
    from camelid.runs.finetune import Plan

Data = Annotated[
    Positional[tuple[str, ...]],
    arg(metavar="DATA...", help="files, globs or hf:NAME: chats, instructions, questions and answers, pairs, or texts"),
]


def finetune(
    model: Checkpoint,
    data: Data,
    lora: bool = False,
    dpo: bool = False,
    out: Annotated[str | None, arg(metavar="DIR")] = None,
    kind: Kind | None = None,
    fields: str | None = None,
    text_key: str | None = None,
    template: str | None = None,
    max_unreadable: float | None = None,
    print_recipe: bool = False,
    dry_run: bool = False,
    ignore_config_field: Ignore = (),
    overrides: Suppress[tuple[str, ...]] = (),
) -> None:
    """Finetune a checkpoint on files, by a recipe that is chosen for them; rerun the command to resume.

    camelid finetune ./TinyLlama chats.jsonl
    camelid finetune ./TinyLlama instructions.json --lora --out runs/assistant
    camelid finetune ./TinyLlama pairs.jsonl --dpo --lora --print-recipe > dpo.toml
    camelid finetune ./TinyLlama 'texts/*.txt' --train.steps 500 --optimizer.learning-rate 1e-5

    Any field of the recipe can be set by --table.field VALUE, and the others are chosen around it, for the size of the
    model, the kind and lengths of the data, and the devices. The recipe is printed before training starts.

    Args:
        lora: train LoRA adapters instead of all parameters; --lora.rank 8 sets a field of [lora]
        dpo: train on pairs of a chosen and a rejected answer by direct preference optimization
        out: folder of the run (default: runs/ with the names of the model and of the data)
        kind: kind of the records, if it is not the one that is detected
        fields: train on fields of the records, those in brackets without a loss: '[question],answer'
        text_key: train on texts, which are in this field of the records
        template: chat template of chats, instructions and pairs (default: that of the checkpoint)
        max_unreadable: maximum fraction of records that may be unreadable; they are counted and skipped
        print_recipe: print the recipe as TOML, for `camelid train`, and exit
        dry_run: print the memory, the time and the disk space that the run needs, and exit; nothing is trained
    """
    from camelid.parallel.compilation_cache import keep_compiled

    keep_compiled()
    from camelid.runs.finetune import Request, make_plan

    options = {
        "kind": kind,
        "fields": fields,
        "text_key": text_key,
        "template": template,
        "max_unreadable": max_unreadable,
    }
    request = Request(
        model=model,
        data=data,
        lora=lora,
        dpo=dpo,
        out=out,
        options={name: value for name, value in options.items() if value is not None},
        ignore=ignore_config_field,
        overrides=overrides,
    )
    try:
        plan = make_plan(request)
        tell(plan.notes)
        if print_recipe:
            print(as_toml(plan), end="")
            return
        if plan.resumes:
            note(f"{plan.recipe.run} has a run of this model and data, which continues with its recipe")
        else:
            note(f"\n{as_toml(plan)}")
        (dry_run_recipe if dry_run else train_recipe)(plan.recipe)
    except UserError as error:
        # The folder of a run is --run for `camelid train`, and max_unreadable a field of its recipe.
        advice = re.sub(r"(?<![\w.-])max_unreadable\b", "--max-unreadable", error.advice)
        raise UserError(error.problem.replace("--run", "--out"), advice.replace("--run", "--out")) from error


def as_toml(plan: "Plan") -> str:
    """The fields that were chosen or given, as a recipe, with comments about defaults that follow from them."""
    import tomli_w

    from camelid.runs.recipe_defaults import with_defaults

    return with_defaults(tomli_w.dumps(plan.table), plan.table, plan.recipe)
