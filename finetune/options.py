"""What the verbs of the command line share: a recipe's path, its overrides, and its check before torch is imported."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from finetune.terminal import Terminal

RecipePath = Annotated[Path, typer.Argument(help="the recipe, a YAML file", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override a key: --set train.steps=20", metavar="KEY=VALUE")
]

RunPath = Annotated[Path, typer.Argument(help="the run's folder (`output:` of its recipe)", show_default=False)]


def check_recipe(recipe: Path, overrides: Sequence[str] | None) -> None:
    """Refuse a faulty recipe, of one run or of several, before torch is imported."""
    from finetune import recipe as recipes

    recipes.locate_all(recipe, overrides or ())


def silent() -> Terminal:
    return Terminal(out=io.StringIO(), quiet=True)
