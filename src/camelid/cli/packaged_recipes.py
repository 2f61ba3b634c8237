"""`camelid recipes`: the recipes that are installed with camelid."""

import shutil
import textwrap
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from camelid import recipes
from camelid.errors import UserError

Name = Annotated[Positional[str], arg(metavar="NAME", help="a name that `camelid recipes` lists")]


def list_recipes() -> None:
    """List the recipes that are installed with camelid, which `camelid train NAME` runs.

    camelid recipes ls
    """
    width = shutil.get_terminal_size().columns
    longest = max(map(len, recipes.names()))
    for name in recipes.names():
        print(textwrap.fill(f"{name:{longest}}  {recipes.summary(name)}", width, subsequent_indent=" " * (longest + 2)))


def show_recipe(name: Name) -> None:
    """Print a recipe.

    camelid recipes show llama2_7b_alpaca_lora
    """
    print(recipes.path_of(name).read_text("utf-8"), end="")


def copy_recipe(name: Name, file: Annotated[Positional[Path], arg(metavar="FILE")]) -> None:
    """Copy a recipe to a file, to be edited; an existing file is not replaced.

    camelid recipes cp llama2_7b_alpaca_lora mine.toml
    """
    text = recipes.path_of(name).read_text("utf-8")
    if file.is_dir():
        file /= f"{name}.toml"
    try:
        with file.open("x", encoding="utf-8") as created:
            created.write(text)
    except FileExistsError as error:
        raise UserError(f"{file} exists", "Give a new name.") from error
    print(f"{file}   edit it, then: camelid train {file}")
