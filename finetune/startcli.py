"""The verbs of a beginning: doctor. Imports no torch."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from finetune.options import silent
from finetune.terminal import Terminal


def doctor(
    numerics: Annotated[
        bool, typer.Option("--numerics", help="train a tiny model in ways that must agree, and show how far they do")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print the findings as JSON")] = False,
) -> None:
    """Look at versions, known conflicts, GPU, memory, disk and environment. Exit 1 where one must be mended."""
    from finetune import pipeline

    found = pipeline.doctor(silent() if as_json else Terminal(), numerics=numerics)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    if not found["holds"]:
        raise typer.Exit(1)


VERBS = (doctor,)
