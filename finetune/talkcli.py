"""The verb that talks with a model: in the terminal, or as an endpoint. Imports no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from finetune.options import AsJson, Quiet, print_json, terminal
from finetune.sampling import Sampling
from finetune.terminal import Terminal

ModelPath = Annotated[
    Path,
    typer.Argument(help="a run's folder, or a model's (merged, or a base)", metavar="RUN|MODEL", show_default=False),
]


def chat(
    model: ModelPath,
    compare: Annotated[
        str | None, typer.Option("--compare", help="`base`: the run's base answers too", metavar="base")
    ] = None,
    message: Annotated[str | None, typer.Option("--prompt", help="answer this one message and leave")] = None,
    system: Annotated[str, typer.Option("--system", help="the system prompt")] = "",
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy, as evaluated; up to 2")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="draw from the likeliest tokens of this share")] = 1.0,
    top_k: Annotated[int, typer.Option("--top-k", help="draw from so many likeliest tokens; 0: from all")] = 0,
    seed: Annotated[int | None, typer.Option("--seed", help="draw the same again; otherwise new each time")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="the longest answer", min=1)] = 512,
    serve: Annotated[
        bool, typer.Option("--serve", help="an OpenAI-compatible endpoint on 127.0.0.1, for trying out")
    ] = False,
    port: Annotated[int | None, typer.Option("--port", help="0 takes a free one (8000)", min=0, max=65535)] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Talk to a finished run's model, to a merged folder or to a base. Greedy unless a temperature is given.

    In the conversation /help lists the commands. With --serve, programs talk to it as to OpenAI's API.
    """
    try:
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if compare not in (None, "base"):
        fix = "only the run's own base answers beside it; for two runs see `finetune compare` and `finetune prove`"
        raise typer.BadParameter(fix, param_hint="--compare")
    if port is not None and not serve:
        raise typer.BadParameter("goes with --serve", param_hint="--port")
    if serve:
        if compare or message is not None or system or as_json:
            what = "a request brings its own: no --compare, --prompt, --system or --json"
            raise typer.BadParameter(what, param_hint="--serve")
        from finetune import serve as serving
        from finetune.answer import Asking

        usual = Asking(sampling=sampling, max_new_tokens=max_new_tokens)
        serving.serve(model, 8000 if port is None else port, usual, terminal(quiet=quiet))
        return
    from finetune import chat as chatting
    from finetune.session import Settings

    settings = Settings(system, sampling, max_new_tokens)
    out = terminal(quiet=quiet, as_json=as_json)
    notes = Terminal(out=sys.stderr, quiet=quiet, silent=out.silent)
    found = chatting.talk(model, settings, out, notes, compare=compare is not None, message=message)
    if as_json:
        print_json(found)


VERBS = (chat,)
