"""The verbs that ship: merge, prove, export, release, push, verify, convert. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from finetune import forms
from finetune.errors import Fault, FinetuneError
from finetune.options import AsJson, Quiet, RunPath, print_json, terminal
from finetune.terminal import ByteBar

_BASES, _LAYOUTS = ("auto", "replayed", "original"), ("native", "original")
_CONVERSIONS = (*_LAYOUTS, "lora")
_EXPORTS = ("adapter", "huggingface", "gguf", "ollama", "original")
_OF = {"--target": ("adapter",), "--quantize": ("gguf", "ollama"), "--adapter-only": ("gguf",)}
"""Options of an export, and what they belong to."""


_RUNS = "a run's folder, an adapter's, or several runs with weights: a:0.7 b:0.3"
_BASE = "auto (what is nearer to the live model), replayed (as trained against) or original (as published)"
_METHOD = "of several: linear (the exact sum), svd, ties, dare_ties, …, as PEFT spells them"


def merge(
    runs: Annotated[list[str], typer.Argument(help=_RUNS, show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="the folder to write, which must not exist")],
    base: Annotated[str, typer.Option("--base", help=_BASE)] = "auto",
    layout: Annotated[
        str, typer.Option("--layout", help="native (plain transformers) or original (the first Qwen's own)")
    ] = "native",
    correct: Annotated[
        int, typer.Option("--correct", help="correct the published base towards the quantised one at this rank", min=0)
    ] = 0,
    method: Annotated[str, typer.Option("--method", help=_METHOD)] = "linear",
    density: Annotated[
        float | None, typer.Option("--density", help="of several: the fraction of values that ties and dare keep")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="of several: of the masks that dare draws")] = 0,
    rank: Annotated[int | None, typer.Option("--rank", help="of several: the rank that an svd form gives")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="of a bare adapter: its base, where it is not the one it names")
    ] = None,
    quantised_as: Annotated[
        str | None,
        typer.Option(
            "--quantised-as", help="of a bare adapter: nf4, fp4, int8 or torchao_int8, as its base was in training"
        ),
    ] = None,
    rows: Annotated[Path | None, typer.Option("--rows", help="of a bare adapter: a data file to compare on")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Fold an adapter into its base, and prove that the result is the trained model.

    Several runs with weights become one adapter; what each of them lost is measured.
    """
    _one_of(base, _BASES, "--base")
    _one_of(layout, _LAYOUTS, "--layout")
    _one_of(quantised_as or "nf4", tuple(forms.MADE), "--quantised-as")
    from finetune import pipeline

    screen = terminal(quiet=quiet, as_json=as_json)
    if len(runs) > 1 or (not Path(runs[0]).exists() and ":" in runs[0]):
        found = pipeline.blend(runs, out, screen, method, density, seed, rank)
        if as_json:
            print_json(found)
        return
    of_several = {"--method": method != "linear", "--density": density is not None, "--rank": rank is not None}
    if given := [option for option, said in of_several.items() if said]:
        raise typer.BadParameter("is of several runs with weights", param_hint=given[0])
    bare = {"name": model, "quantised_as": quantised_as, "rows": rows}
    asked = {"base": base, "layout": layout, "correct": correct}
    found = pipeline.merge(Path(runs[0]), out, asked, screen, **bare)
    if as_json:
        print_json({"out": str(out)} | found)


def prove(
    first: Annotated[str, typer.Argument(help="a run, an adapter, a model or a .gguf file", show_default=False)],
    second: Annotated[str, typer.Argument(help="another one", show_default=False)],
    rows: Annotated[Path | None, typer.Option("--rows", help="a data file to ask; else a run's held-out rows")] = None,
    bound: Annotated[
        float | None, typer.Option("--bound", help="the largest mean KL in nats that passes (default 0.001)", min=0)
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Do two models answer alike? Exit 1 where they do not."""
    from finetune import pipeline

    found = pipeline.prove(first, second, terminal(quiet=quiet, as_json=as_json), rows, bound)
    if as_json:
        print_json(found)


def _one_of(word: str, legal: Sequence[str], option: str) -> None:
    if word not in legal:
        raise typer.BadParameter(f"must be {', '.join(legal[:-1])} or {legal[-1]}", param_hint=option)


def export(
    run: RunPath,
    out: Annotated[Path, typer.Option("--out", help="the folder (gguf: the file) to write, which must not exist")],
    to: Annotated[str, typer.Option("--to", help="adapter, huggingface, gguf, ollama or original")] = "adapter",
    target: Annotated[
        str | None, typer.Option("--target", help="who is to load an adapter: peft (default) or vllm")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option("--quantize", help="of a GGUF's weights: q4_k_m, q5_k_m, q6_k, q8_0, f16, …")
    ] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="of a GGUF: the adapter without its base")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a run's result for another program: a plain LoRA adapter, or the merged model in a layout or as GGUF."""
    _one_of(to, _EXPORTS, "--to")
    _one_of(target or "peft", ("peft", "vllm"), "--target")
    given = {"--target": target, "--quantize": quantize, "--adapter-only": adapter_only or None}
    for option, value in given.items():
        if value is not None and to not in _OF[option]:
            raise typer.BadParameter(f"is of --to {' or '.join(_OF[option])}", param_hint=option)
    from finetune import pipeline

    screen = terminal(quiet=quiet, as_json=as_json)
    found = pipeline.export(run, out, to, screen, target=target or "peft", quantise=quantize, adapter_only=adapter_only)
    if as_json:
        print_json({"out": str(out), "kind": to} | found)


def release(
    run: RunPath,
    out: Annotated[Path, typer.Option("--out", help="the folder to publish, which must not exist")],
    what: Annotated[str, typer.Option("--what", help="merged, adapter or both")] = "merged",
    base: Annotated[str, typer.Option("--base", help="as of `finetune merge`")] = "auto",
    layout: Annotated[str, typer.Option("--layout", help="as of `finetune merge`")] = "native",
    data_licence: Annotated[
        str | None, typer.Option("--data-licence", help="the data's licence, where no text beside it says it")
    ] = None,
    allow_unknown: Annotated[
        bool, typer.Option("--allow-unknown-licence", help="go on where a licence is not known; the card says so")
    ] = False,
    key: Annotated[Path | None, typer.Option("--sign", help="sign with this private key (extra sign)")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make the folder that one publishes: weights, card, licence, notice, manifest, digests."""
    _one_of(what, ("merged", "adapter", "both"), "--what")
    _one_of(base, _BASES, "--base")
    _one_of(layout, _LAYOUTS, "--layout")
    from finetune import pipeline

    how = {"data_licence": data_licence, "allow_unknown": allow_unknown, "key": key}
    found = pipeline.release(
        run, out, what, {"base": base, "layout": layout}, terminal(quiet=quiet, as_json=as_json), **how
    )
    if as_json:
        print_json(found)


def push(
    folder: Annotated[Path, typer.Argument(help="a release", show_default=False)],
    repo: Annotated[str, typer.Argument(help="owner/name on the hub", show_default=False)],
    public: Annotated[
        bool, typer.Option("--public", help="where the repository is made now: everybody can read and copy it")
    ] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="the branch, which must exist")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Upload a release to the Hugging Face hub: one commit of what verifies, read back and compared."""
    from finetune import pipeline

    screen = terminal(quiet=quiet, as_json=as_json)
    found = pipeline.push(folder, repo, screen, private=not public, revision=revision)
    if as_json:
        print_json(found)


def verify(
    folder: Annotated[Path, typer.Argument(help="a release", show_default=False)],
    key: Annotated[Path | None, typer.Option("--key", help="the public key that it must be signed with")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check every byte of a release. Exit 1 where anything differs. Needs no torch."""
    from finetune import seal

    screen = terminal(quiet=quiet, as_json=as_json)
    faults = seal.faults(folder, key, ByteBar.over(screen, "verifying", folder.rglob("*")).more)
    if faults:
        raise FinetuneError.of([Fault(fault, str(folder)) for fault in faults])
    screen.say(f"{folder}: every file is what was released{'' if key is None else ', and the signature is right'}")
    if as_json:
        print_json({"folder": str(folder), "holds": True, "signature": None if key is None else "right"})


def convert(
    source: Annotated[Path, typer.Argument(help="a model folder, an adapter's, or a run's", show_default=False)],
    out: Annotated[Path, typer.Argument(help="the folder to write, which must not exist", show_default=False)],
    to: Annotated[
        str, typer.Option("--to", help="native (plain transformers), original (the first Qwen's own) or lora")
    ],
    rank: Annotated[
        int | None, typer.Option("--rank", help="of --to lora: the rank that the update gets", min=1)
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="of --to lora: the adapter's base, where it is not the one it names")
    ] = None,
    quantised_as: Annotated[
        str | None,
        typer.Option("--quantised-as", help="of --to lora: nf4, fp4, int8 or torchao_int8, as that base was"),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a model or an adapter in the other layout, or an adapter of another method as LoRA.

    A layout changes no number. LoRA of a rank is the nearest one: how far each module is off is measured and printed.
    """
    _one_of(to, _CONVERSIONS, "--to")
    _one_of(quantised_as or "nf4", tuple(forms.MADE), "--quantised-as")
    from finetune import pipeline

    screen = terminal(quiet=quiet, as_json=as_json)
    if to == "lora":
        if rank is None:
            raise typer.BadParameter("--to lora needs it", param_hint="--rank")
        found = pipeline.to_lora(source, out, rank, screen, name=model, quantised_as=quantised_as)
        if as_json:
            print_json({"out": str(out)} | found)
        return
    of_lora = {"--rank": rank, "--model": model, "--quantised-as": quantised_as}
    if given := [option for option, value in of_lora.items() if value is not None]:
        raise typer.BadParameter("is of --to lora", param_hint=given[0])
    pipeline.convert(source, out, to, screen)
    if as_json:
        print_json({"out": str(out), "layout": to})


VERBS = (merge, prove, export, release, push, verify, convert)
