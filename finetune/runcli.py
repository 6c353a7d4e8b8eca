"""The verbs over several runs: compare them, and sweep a grid of them. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from finetune.options import silent
from finetune.terminal import Terminal


def compare(
    runs: Annotated[list[Path], typer.Argument(help="folders of two runs or more", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="print the comparison as JSON")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="write one self-contained page too")] = None,
) -> None:
    """Say what differs between runs, how each went, and whether one is better than the first."""
    from finetune import compare as comparing

    found = comparing.compare(runs)
    terminal = silent() if as_json else Terminal()
    for line in comparing.lines(found):
        terminal.say(line)
    if html is not None:
        from finetune import comparepage, runfolder

        runfolder.write_page(html, comparepage.page(found))
        terminal.say(f"written: {html}")
    if as_json:
        typer.echo(json.dumps(found, indent=2, allow_nan=False))


VERBS = (compare,)
