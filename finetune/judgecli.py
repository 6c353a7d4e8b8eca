"""The verbs that ask a model: eval judges it, predict lets it answer a file, teach writes down what it would say.

Imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finetune.options import AsJson, Overrides, Quiet, RecipePath, check_recipe, print_json, terminal

_Model = Annotated[Path, typer.Argument(help="a run's folder, or a model's", show_default=False)]


def eval_(
    model: _Model,
    data: Annotated[Path | None, typer.Option("--data", help="judge on the rows of this file")] = None,
    merged: Annotated[
        Path | None, typer.Option("--merged", help="the run's merged model, where it is not RUN/merged")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="judge otherwise: --set evaluate.metrics=[contains]", metavar="evaluate.KEY=VALUE"),
    ] = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="tasks of lm-eval, with commas between")] = None,
    task_path: Annotated[
        Path | None, typer.Option("--task-path", help="folder of the tasks' YAML files; they run as programs do")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--apply-chat-template", help="ask the tasks through the model's chat template")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure anew, also what was measured before")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Judge a run's base, adapter and merged model, or a bare model, on held-out rows and on tasks."""
    if other := [text for text in set_ or () if not text.startswith("evaluate.")]:
        raise typer.BadParameter(f"only how it is judged can be set here, not {other[0]!r}", param_hint="--set")
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if (task_path is not None or chat) and not names:
        raise typer.BadParameter("name the tasks: --tasks NAME,NAME", param_hint="--tasks")
    from finetune import pipeline

    found = pipeline.evaluate(
        model, terminal(quiet=quiet, as_json=as_json), data=data, merged=merged, overrides=tuple(set_ or ()),
        tasks=tuple(names), task_path=task_path, chat=chat, fresh=fresh,
    )  # fmt: skip
    if as_json:
        print_json(found)


def teach(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option("--out", help="the folder to write, which training then names as its teacher")],
    set_: Overrides = None,
    top_k: Annotated[
        int,
        typer.Option("--top-k", help="likeliest tokens kept at each position; all others are one", min=1, max=65536),
    ] = 64,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write down what a recipe's teacher says of its rows; killed, the same command goes on."""
    check_recipe(recipe, set_)
    from finetune import pipeline

    found = pipeline.teach(recipe, set_ or (), out, top_k, terminal(quiet=quiet, as_json=as_json))
    if as_json:
        print_json(found)


def predict(
    model: _Model,
    data: Annotated[Path, typer.Argument(help="the rows to answer, in any format that trains", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="where the answers go, one JSON object a row")],
    base: Annotated[bool, typer.Option("--base/--adapter", help="of a run: ask its bare base, or its adapter")] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="longest answer, in tokens", min=1)] = 256,
    batch_rows: Annotated[int, typer.Option("--batch-rows", help="rows answered at once", min=1)] = 16,
    column: Annotated[
        str | None,
        typer.Option("--column", help="the column for the answer: answer, or of a reward model reward"),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="draw tokens at this temperature; without it, greedy", min=1e-3, max=2),
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="draw from the likeliest tokens of this share", min=1e-3, max=1)
    ] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="draw from so many likeliest tokens", min=1)] = None,
    seed: Annotated[int, typer.Option("--seed", help="of what is drawn", min=0, max=2**31 - 1)] = 0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Answer every row of a file, or score it (reward models); killed, the same command ends with the same bytes."""
    if temperature is None and (top_p is not None or top_k is not None or seed):
        raise typer.BadParameter("nothing is drawn without --temperature", param_hint="--temperature")
    from finetune import pipeline

    drawn = (
        None
        if temperature is None
        else {"temperature": temperature, "top_p": top_p or 1.0, "top_k": top_k or 0, "seed": seed}
    )
    found = pipeline.predict(
        model, data, out, terminal(quiet=quiet, as_json=as_json), base=base, max_new_tokens=max_new_tokens,
        batch_rows=batch_rows, column=column, sampling=drawn,
    )  # fmt: skip
    if as_json:
        print_json(found)
