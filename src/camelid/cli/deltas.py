"""The commands for differences between checkpoints, and for applying deltas and LoRA adapters."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from camelid.cli.format_names import WritableFormat
from camelid.cli.shared import Ignore, model_config, note, progress_bar, tell
from camelid.errors import UserError


def delta_make(
    base: Annotated[Positional[str], arg(metavar="BASE", help="checkpoint of the base model, in any format")],
    tuned: Annotated[
        Positional[str], arg(metavar="TUNED", help="checkpoint of the model trained from it, in any format")
    ],
    destination: Annotated[Positional[Path], arg(metavar="DESTINATION", help="folder to create")],
    kind: Literal["exact", "sum", "lora"] = "exact",
    rank: int | None = None,
    config: str | None = None,
    ignore_config_field: Ignore = (),
    overwrite: bool = False,
) -> None:
    """Write the difference between two checkpoints, as a delta or a LoRA adapter.

    camelid delta make ./llama-7b ./vicuna-7b ./vicuna-delta
    camelid delta make ./llama-7b ./vicuna-7b ./vicuna-lora --kind lora --rank 64

    Args:
        kind: exact: bitwise and lossless; sum: tuned - base, rounded, like published deltas; lora: a rank-r
            approximation as a PEFT adapter, whose residual is printed
        rank: rank of the adapter, for --kind lora
        config: model configuration of both, if the files do not contain it: a preset or a config.json
        overwrite: replace the checkpoint in DESTINATION; other files there are kept
    """
    if kind == "lora" and rank is None:
        raise UserError("--kind lora needs --rank", "Choose one, for example --rank 16.")
    from camelid.checkpoint.adapters.delta import make

    described = model_config(config, ignore_config_field)
    with progress_bar("delta make") as progress:
        made = make(
            base,
            tuned,
            destination,
            kind=kind,
            rank=rank,
            config=described,
            ignore=ignore_config_field,
            overwrite=overwrite,
            progress=progress,
        )
    tell(made.notes)
    if made.residual is not None:
        note(f"the residual of rank {rank} is {made.residual:.3%} of the difference (relative Frobenius norm)")
    note(f"wrote {destination}")


def delta_apply(
    base: Annotated[Positional[str], arg(metavar="BASE", help="checkpoint from which the delta was created")],
    delta: Annotated[Positional[str], arg(metavar="DELTA", help="folder of a delta or of a PEFT adapter")],
    destination: Annotated[Positional[Path], arg(metavar="DESTINATION", help="folder to create")],
    to: WritableFormat = "hf",
    summed: Annotated[bool, arg(name="sum")] = False,
    config: str | None = None,
    ignore_config_field: Ignore = (),
    overwrite: bool = False,
) -> None:
    """Apply a delta or a LoRA adapter to a base model, and write the result.

    camelid delta apply ./llama-7b ./vicuna-delta ./vicuna-7b
    camelid delta apply ./llama-7b ./vicuna-7b-delta-v0 ./vicuna-7b --sum

    Args:
        to: format to write
        summed: DELTA is an ordinary checkpoint that contains differences, to be added to BASE
        config: model configuration of BASE, if its files do not contain it: a preset or a config.json
        overwrite: replace the checkpoint in DESTINATION; other files there are kept
    """
    from camelid.checkpoint.adapters.delta import apply

    described = model_config(config, ignore_config_field)
    with progress_bar("delta apply") as progress:
        notes = apply(
            base,
            delta,
            destination,
            to=to,
            summed=summed,
            config=described,
            ignore=ignore_config_field,
            overwrite=overwrite,
            progress=progress,
        )
    tell(notes)
    note(f"wrote {destination}")
