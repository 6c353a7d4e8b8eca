"""The verbs over several runs: compare them, and sweep a grid of them. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.errors import Fault, FinetuneError
from finetune.options import AsJson, Overrides, Quiet, RecipePath, print_json, seconds, terminal

_GO_ON = "see its message above; the same command tries it again"


def compare(
    runs: Annotated[list[Path], typer.Argument(help="folders of two runs or more", show_default=False)],
    as_json: AsJson = False,
    quiet: Quiet = False,
    html: Annotated[Path | None, typer.Option("--html", help="write one self-contained page too")] = None,
) -> None:
    """Say what differs between runs, how each went, and whether one is better than the first."""
    from finetune import compare as comparing

    found = comparing.compare(runs)
    screen = terminal(quiet=quiet, as_json=as_json)
    for line in comparing.lines(found):
        screen.say(line)
    if html is not None:
        from finetune import comparepage, webpage

        webpage.write_page(html, comparepage.page(found))
        screen.say(f"written: {html}")
    if as_json:
        print_json(found)


def sweep(
    recipe: RecipePath,
    grid: Annotated[
        list[str], typer.Option("--grid", help="a key and its values; give it again for another", metavar="KEY=V,V")
    ],
    set_: Overrides = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="time for this command (2h, 90m): runs beyond it are cut by name")
    ] = None,
    halving: Annotated[
        bool, typer.Option("--halving", help="train all for a share of the steps, and only the better half goes on")
    ] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="plan all and say what they cost; train nothing")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train every combination of a grid, one after the other, and compare them; the same command goes on."""
    from finetune import grid as grids

    limit = None if budget is None else seconds(budget, "--budget")
    root, combinations = grids.combinations(recipe, grid, set_ or ())
    from finetune import pipeline

    screen = terminal(quiet=quiet, as_json=as_json)
    found = pipeline.sweep(recipe, root, combinations, screen, budget=limit, halving=halving, dry=dry)
    faults = [Fault(run["state"], run["folder"], _GO_ON) for run in found["runs"] if run.get("failed")]
    if as_json:
        print_json(found)
        raise typer.Exit(FinetuneError.exit_code if faults else 0)
    if faults:
        raise FinetuneError.of(faults)


VERBS = (compare, sweep)
