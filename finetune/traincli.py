"""The verb that trains: here, or as several processes that a launcher starts. Imports no torch."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune import jobplace
from finetune.options import AsJson, Overrides, Quiet, RecipePath, check_recipe, print_json, seconds, terminal
from finetune.timelimit import TimeLimit

Extend = Annotated[bool, typer.Option("--extend", help="lengthen a run to the recipe's new steps")]
Until = Annotated[
    int | None, typer.Option("--until", help="judge after this step and pause there; go on without it", min=1)
]
MaxTime = Annotated[
    str | None, typer.Option("--max-time", help="stop, saved, before so much time is over (2h, 90m): exit code 6")
]
Processes = Annotated[
    int, typer.Option("--processes", help="start so many, one a GPU, that share each step", min=1, max=4096)
]
Launch = Annotated[
    Literal["local", "torchrun", "accelerate", "slurm"] | None,
    typer.Option("--launch", help="what starts them; without it torchrun for several, and nothing for one"),
]
Config = Annotated[
    Path | None, typer.Option("--launch-config", help="accelerate: its config file", exists=True, dir_okay=False)
]
Job = Annotated[
    list[str] | None,
    typer.Option("--job", help="slurm: a setting of submitit, as slurm_partition=gpu", metavar="KEY=VALUE"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print the launcher's command and start nothing")]
World = Annotated[
    int | None, typer.Option("--world", help="so many of these were launched: any other number is refused", min=1)
]


def train(
    recipe: RecipePath,
    set_: Overrides = None,
    extend: Extend = False,
    until: Until = None,
    max_time: MaxTime = None,
    processes: Processes = 1,
    launch: Launch = None,
    launch_config: Config = None,
    job: Job = None,
    dry_run: DryRun = False,
    world: World = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe, or go on with it where it was interrupted."""
    limit = None if max_time is None else TimeLimit(seconds(max_time, "--max-time"))
    shard = check_recipe(recipe, set_)[0].recipe.train.shard
    place = jobplace.find(world, shard=shard)
    from finetune import pipeline

    screen = terminal(quiet=quiet, as_json=as_json)
    if launch is None:
        launch = "torchrun" if processes > 1 else "local"
    if launch != "local":
        if world is not None:
            raise typer.BadParameter("this process was launched already: leave --launch out", param_hint="--world")
        from finetune.launch import Order

        words = ["train", str(recipe), *(part for one in set_ or () for part in ("--set", one))]
        words += ["--extend"] * extend + ([] if until is None else ["--until", str(until)])
        words += ["--json"] * as_json + ["--quiet"] * quiet
        order = Order(
            engine=launch, processes=processes, words=tuple(words), config=launch_config, job=tuple(job or ())
        )
        if dry_run:
            if as_json:
                print_json({"command": order.command(limit)})
            else:
                typer.echo(shlex.join(order.command(limit)))
            return
        raise typer.Exit(pipeline.launch(recipe, set_ or (), screen, order, limit))
    if processes > 1:
        raise typer.BadParameter("local is one process: leave it out, or --processes", param_hint="--launch")
    if dry_run:
        raise typer.BadParameter("nothing is launched: finetune plan says what a run does", param_hint="--dry-run")
    folders = pipeline.train(recipe, set_ or (), screen, extend=extend, until=until, limit=limit, place=place)
    if as_json and (place is None or place.rank == 0):
        from finetune import scores

        print_json({"runs": [scores.outcome(folder) for folder in folders]})
