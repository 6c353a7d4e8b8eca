"""The verbs below ``finetune data``: judge data, mend it, and see what will be trained. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune.options import AsJson, Overrides, Quiet, RecipePath, check_recipe, print_json, terminal

app = typer.Typer(help="Judge data before anything is paid for.", no_args_is_help=True)
_BAD_ROWS = 3


@app.command(name="check")
def check(
    source: Annotated[
        str, typer.Argument(help="a file, a folder, a data set's id on the hub, or a recipe", show_default=False)
    ],
    set_: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    format_: Annotated[str, typer.Option("--format", help="layout of a row; auto looks at the columns")] = "auto",
    columns: Annotated[
        list[str] | None, typer.Option("--column", help="another column name: messages=dialog", metavar="OURS=THEIRS")
    ] = None,
    split: Annotated[str, typer.Option("--split", help="split of a folder or of a data set on the hub")] = "train",
    personal: Annotated[
        bool, typer.Option("--personal", help="look for phone and identity numbers too (needs the extra pii)")
    ] = False,
    fix: Annotated[Path | None, typer.Option("--fix", help="write a repaired copy there, and a log beside it")] = None,
) -> None:
    """Find every row that cannot be trained, and what is odd about the others. Exit 3 where there is an error."""
    from finetune import pipeline
    from finetune.dataset import Source

    screen = terminal(quiet=quiet, as_json=as_json)
    if source.endswith((".yaml", ".yml")):
        if fix or columns or format_ != "auto":
            raise typer.BadParameter(
                "the recipe says it; --fix, --column and --format are for files", param_hint="SOURCE"
            )
        reports = pipeline.data_check(Path(source), set_ or (), screen, personal=personal)
    else:
        place = Source(path=source, format=format_, columns=_renamed(columns or []), split=split)
        reports = pipeline.data_check(place, (), screen, personal=personal)
    found: dict[str, Any] = {"sources": reports}
    if fix is not None:
        found["fixed"] = pipeline.data_fix(place, fix, screen)
    if as_json:
        print_json(found)
    if any(report["summary"]["errors"] for report in reports):
        raise typer.Exit(_BAD_ROWS)


def _renamed(columns: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in columns]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise typer.BadParameter("write OURS=THEIRS", param_hint="--column")
    return {ours: theirs for ours, _, theirs in pairs}


@app.command(name="show")
def show(
    recipe: RecipePath,
    set_: Overrides = None,
    row: Annotated[
        int | None, typer.Option("--row", help="one training row, from 1; else the first ones", min=1)
    ] = None,
    step: Annotated[int | None, typer.Option("--step", help="the micro-batches of one step, from 1", min=1)] = None,
    html: Annotated[Path | None, typer.Option("--html", help="write one self-contained page instead")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Show exactly what the model will see, token by token: what is trained, what is only read, where it ends."""
    if row is not None and step is not None:
        raise typer.BadParameter("give --row or --step", param_hint="--step")
    check_recipe(recipe, set_)
    from finetune import pipeline

    screen = terminal(quiet=quiet, as_json=as_json)
    rows = pipeline.data_show(recipe, set_ or (), screen, row=row, step=step, html=html)
    if as_json:
        print_json({"rows": rows})
