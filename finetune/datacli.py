"""The verbs below ``finetune data``: judge data, mend it, and see what will be trained. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from finetune.options import Overrides, RecipePath, check_recipe, silent
from finetune.terminal import Terminal

app = typer.Typer(help="Judge data before anything is paid for.", no_args_is_help=True)
_BAD_ROWS = 3


@app.command(name="check")
def check(
    source: Annotated[
        str, typer.Argument(help="a file, a folder, a data set's id on the hub, or a recipe", show_default=False)
    ],
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
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

    terminal = silent() if as_json else Terminal()
    if source.endswith((".yaml", ".yml")):
        if fix or columns or format_ != "auto":
            raise typer.BadParameter(
                "the recipe says it; --fix, --column and --format are for files", param_hint="SOURCE"
            )
        reports = pipeline.data_check(Path(source), set_ or (), terminal, personal=personal)
    else:
        place = Source(path=source, format=format_, columns=_renamed(columns or []), split=split)
        reports = pipeline.data_check(place, (), terminal, personal=personal)
    if as_json:
        typer.echo(json.dumps(reports[0] if len(reports) == 1 else reports, indent=2))
    if fix is not None:
        pipeline.data_fix(place, fix, terminal)
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
) -> None:
    """Show exactly what the model will see, token by token: what is trained, what is only read, where it ends."""
    if row is not None and step is not None:
        raise typer.BadParameter("give --row or --step", param_hint="--step")
    check_recipe(recipe, set_)
    from finetune import pipeline

    pipeline.data_show(recipe, set_ or (), Terminal(), row=row, step=step, html=html)
