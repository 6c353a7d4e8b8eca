"""The verbs of a beginning: init, import and doctor. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.options import AsJson, Quiet, print_json, terminal


def init(
    data: Annotated[str, typer.Argument(help="a file, a folder, or a data set's id on the hub", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="the recipe to write, which must not exist")] = Path("recipe.yaml"),
    model: Annotated[
        str | None, typer.Option("--model", help="the base: a folder, or a model's id on the hub; else what fits")
    ] = None,
    card: Annotated[
        float | None, typer.Option("--card", help="draft for a CUDA card with so many GB, not for this machine", min=1)
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Look at your data and this machine, and write a commented recipe that plans. Overwrites nothing."""
    from finetune import pipeline

    made = pipeline.init(data, out, model, card, terminal(quiet=quiet, as_json=as_json))
    if as_json:
        print_json(made)


def import_(
    config: Annotated[
        Path,
        typer.Argument(help="another trainer's YAML, JSON or shell script; nothing in it is run", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", help="the recipe to write, which must not exist")] = Path("recipe.yaml"),
    trainer: Annotated[
        str | None, typer.Option("--from", help="axolotl, llamafactory, qwen, swift or trl; else as its keys say")
    ] = None,
    devices: Annotated[
        int | None, typer.Option("--devices", help="on how many it was trained, where the file does not say", min=1)
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a recipe with the meaning of another trainer's settings, and say what became of each key."""
    from finetune import adopt

    made = adopt.begin(config, out, trainer, devices, terminal(quiet=quiet, as_json=as_json))
    if as_json:
        print_json(made)


def doctor(
    numerics: Annotated[
        bool, typer.Option("--numerics", help="train a tiny model in ways that must agree, and show how far they do")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Look at versions, known conflicts, GPU, memory, disk and environment. Exit 1 where one must be mended."""
    from finetune import pipeline

    found = pipeline.doctor(terminal(quiet=quiet, as_json=as_json), numerics=numerics)
    if as_json:
        print_json(found)
    if not found["holds"]:
        raise typer.Exit(1)


VERBS = (init, import_, doctor)
