"""What the verbs of the command line share: a recipe's path and its check before torch is imported, and where a verb's
result goes: text for a person on standard output, or with ``--json`` one object there and the text on standard error.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.terminal import Terminal

if TYPE_CHECKING:
    from finetune.recipe import Located

RecipePath = Annotated[Path, typer.Argument(help="the recipe, a YAML file", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="override a key: --set train.steps=20", metavar="KEY=VALUE")
]

RunPath = Annotated[Path, typer.Argument(help="the run's folder (`output:` of its recipe)", show_default=False)]
AsJson = Annotated[
    bool, typer.Option("--json", help="print one JSON object; what a person reads goes to standard error")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="show no progress; with --json print nothing but the object")]

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def check_recipe(recipe: Path, overrides: Sequence[str] | None) -> list[Located]:
    """Refuse a faulty recipe, of one run or of several, before torch is imported."""
    from finetune import recipe as recipes

    return recipes.locate_all(recipe, overrides or ())


_LONGEST = 366 * 24 * 3600.0


def seconds(text: str, option: str) -> float:
    """``2h``, ``1h30m``, ``90m``, ``45s`` as seconds; anything else, and no time at all, is a fault of ``option``."""
    found = _DURATION.fullmatch(text.strip())
    parts = [float(part or 0) for part in found.groups()] if found else [0.0]
    total = sum(part * size for part, size in zip(parts, (3600, 60, 1), strict=False))
    if not 0 < total <= _LONGEST:
        raise typer.BadParameter("write 2h, 90m or 1h30m; a year at most", param_hint=option)
    return total


def terminal(*, quiet: bool, as_json: bool = False) -> Terminal:
    """Where a verb tells a person what it does."""
    return Terminal(out=sys.stderr if as_json else sys.stdout, quiet=quiet, silent=quiet and as_json)


def print_json(value: dict[str, Any]) -> None:
    """The one object that ``--json`` asks for: a program's input, so never NaN."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
