"""The table of contents: what each verb does, in the order of the road, one screen each.

Steps that load torch's larger companions are imported where they begin, so that a fault of recipe, data or base folder
is told before they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune import engines as engine_files
from finetune import prepare, scores, source
from finetune.dataset import Reader, Source
from finetune.errors import RecipeError
from finetune.grid import Combination
from finetune.jobplace import Place
from finetune.joint_plan import JointPlan
from finetune.launch import Order
from finetune.plan import Plan
from finetune.prepare import Prepared
from finetune.report import say_plan
from finetune.runfolder import RunFolder
from finetune.terminal import Terminal, reading
from finetune.timelimit import TimeLimit
from finetune.webpage import write_page

_SHOWN_ROWS = 8


def doctor(terminal: Terminal, *, numerics: bool) -> dict[str, Any]:
    """Look at the installation and the machine, and prove what it computes; ``holds`` says whether all is well."""
    from finetune import doctor as examining

    found = examining.examine()
    for one in found:
        terminal.say(str(one))
    said = examining.to_dict(found)
    if numerics:
        from finetune import numerics as proving

        checks = proving.prove(terminal)
        for check in checks:
            terminal.say(str(check))
        said |= {"holds": said["holds"] and all(one.holds for one in checks),
                 "numerics": [one.to_dict() for one in checks]}  # fmt: skip
    return said


def init(data: str, out: Path, name: str | None, card: float | None, terminal: Terminal) -> dict[str, Any]:
    """Look at data and machine, and write a first recipe that plans."""
    from finetune import draft

    return draft.begin(data, out, name, card, terminal, reading(terminal, "reading"))


def plan(
    recipe: Path, overrides: Sequence[str], terminal: Terminal, card: float | None = None, processes: int = 1,
    engines: Mapping[str, Path] | None = None,
) -> Plan | JointPlan:  # fmt: skip
    """Check everything and say what a run would do, here or on a card of ``card`` GB. ``engines``: as of ``write``."""
    show = reading(terminal, "reading")
    prepared = prepare.prepare_all(recipe, overrides, card=card, progress=show, processes=processes)
    if engines:
        engine_files.write(engines, prepared[0], processes)
    return _say_plan(prepared, terminal)


def _say_plan(prepared: Sequence[Prepared], terminal: Terminal) -> Plan | JointPlan:
    return say_plan({one.located.name: one.plan for one in prepared}, terminal.say)


def probe(recipe: Path, overrides: Sequence[str], terminal: Terminal) -> dict[str, Any]:
    """The plan, then two steps on its heaviest micro-batch: what was predicted, and what came. Writes nothing."""
    prepared = prepare.prepare(recipe, overrides, progress=reading(terminal, "reading"))
    _say_plan([prepared], terminal)
    from finetune import probe as probing

    found = probing.probe(prepared, terminal)
    for line in found.lines():
        terminal.say(line)
    return prepared.plan.to_dict() | {"probe": found.to_dict()}


def train(
    recipe: Path, overrides: Sequence[str], terminal: Terminal, *, extend: bool = False, until: int | None = None,
    limit: TimeLimit | None = None, place: Place | None = None,
) -> list[RunFolder]:  # fmt: skip
    """The same checks, then the run, or the runs of several adapters: begun, or taken up where they stand.

    ``until``: pause a single run after that step. ``limit``: how long all of it may take. ``place``: this
    process's among those of a job, of which all but the first help and return nothing.
    """
    from finetune import follow, peers, together
    from finetune import train as training

    group = peers.join(place)
    if group.rank:
        follow.follow(recipe, overrides, group)
        return []
    prepared = _prepared(recipe, overrides, terminal, group.world)
    group.barrier()

    if len(prepared) == 1:
        folders = [training.train(prepared[0], terminal, extend=extend, until=until, limit=limit, peers=group)]
    else:
        if until is not None:
            raise RecipeError("several adapters are trained to their ends", "--until", "leave it out")
        folders = together.train(prepared, terminal, extend=extend, limit=limit)
    for folder in folders:
        if len(folders) > 1:
            terminal.say(f"adapter {folder.root.name}")
        for line in scores.table(scores.read(folder)):
            terminal.say(line)
        if not folder.finished.exists():  # paused, as asked
            continue
        terminal.say(f"adapter: {folder.adapter}   curves: {folder.metrics}   answers: {folder.samples}")
    return folders


def _prepared(recipe: Path, overrides: Sequence[str], terminal: Terminal, processes: int) -> list[Prepared]:
    """Every check, the base fetched where it is not here, and the plan said; of one run alone for several processes."""
    show = reading(terminal, "reading")
    prepared = prepare.prepare_all(recipe, overrides, progress=show, processes=processes)
    if prepared[0].base is None:
        source.bring(prepared[0].recipe.model, prepared[0].recipe.revision, terminal)
        prepared = prepare.prepare_all(recipe, overrides, progress=show, processes=processes)
    if processes > 1:
        from finetune import starts

        starts.refuse_to_make(prepared[0].recipe.adapter.method, prepared[0].plan)
    _say_plan(prepared, terminal)
    return prepared


def launch(recipe: Path, overrides: Sequence[str], terminal: Terminal, order: Order, limit: TimeLimit | None) -> int:
    """The same checks, once for all processes; then they are started, and the job's exit code returned."""
    from finetune import launch as launching

    prepared = _prepared(recipe, overrides, Terminal(silent=True), order.processes)
    return launching.start(order, limit, RunFolder(Path(prepared[0].plan.output)).root, terminal)


def sweep(
    recipe: Path, root: Path, grid: Sequence[Combination], terminal: Terminal, *, budget: float | None,
    halving: bool, dry: bool,
) -> dict[str, Any]:  # fmt: skip
    """Plan every combination of a grid and, unless ``dry``, train and compare them."""
    from finetune import sweep as sweeping
    from finetune import sweepplan

    planned = sweepplan.plan(recipe, root, grid, terminal, budget=budget, halve=halving, fetch=not dry)
    for line in planned.lines():
        terminal.say(line)
    if dry:
        return {"seconds": planned.predicted, "runs": [entry.to_dict() for entry in planned.entries]}
    return sweeping.run(planned, terminal)


def data_check(
    source: Source | Path, overrides: Sequence[str], terminal: Terminal, *, personal: bool = False
) -> list[dict[str, Any]]:
    """Judge a source, or the data of a recipe (a path) with its model's tokenizer; one report a source.

    ``personal``: look for more personal data than the patterns find.
    """
    from finetune import datacheck, texts

    show = reading(terminal, "checking")
    search = datacheck.Search(personal=texts.presidio() if personal else None)
    if isinstance(source, Path):
        reports = prepare.check_data(source, overrides, show, search)
    else:
        reports = [datacheck.check(Reader(source, datacheck.CONTROL), search=search, progress=show)]
    for report in reports:
        for line in report.lines():
            terminal.say(line)
    return [report.to_dict() for report in reports]


def data_fix(source: Source, out: Path, terminal: Terminal) -> dict[str, Any]:
    """Write a repaired copy of a source, and a log of each change; → where they are, and how many rows had what."""
    from finetune import datacheck, datafix

    counts = datafix.fix(Reader(source, datacheck.CONTROL), out, reading(terminal, "mending"))
    terminal.say(f"{out}: " + ", ".join(f"{count} rows {what}" for what, count in counts.items()))
    terminal.say(f"each change: {out}.log.jsonl")
    return {"out": str(out), "log": f"{out}.log.jsonl", "rows": counts}


def data_show(
    recipe: Path, overrides: Sequence[str], terminal: Terminal, *, row: int | None, step: int | None, html: Path | None
) -> list[dict[str, Any]]:
    """Exactly what will be trained, token by token, by row or by step: in the terminal, or as one page."""
    from finetune import datashow, look

    shown = look.step(recipe, overrides, step) if step else look.rows(recipe, overrides, row, _SHOWN_ROWS)
    if html is not None:
        write_page(html, datashow.page(str(recipe), shown))
        terminal.say(f"written: {html}")
    for one in () if html else shown:
        for line in datashow.lines(one, colour=terminal.colour):
            terminal.say(line)
        terminal.say()
    if html is None and row is None and step is None:
        terminal.say(f"these are the first rows, at most {_SHOWN_ROWS}; --row N shows another, --step N a whole step")
    return [one.to_dict() for one in shown]


def evaluate(folder: Path, terminal: Terminal, **asked: Any) -> dict[str, Any]:
    """Judge a finished run's base, adapter and merge, or a bare model; ``asked`` as of ``judgement.Asked``."""
    from finetune import judgement

    return judgement.judge(folder, judgement.Asked(**asked), terminal)


def predict(model: Path, data: Path, out: Path, terminal: Terminal, **asked: Any) -> dict[str, Any]:
    """Answer the rows of a file; ``asked`` as of ``predict.Asked``."""
    from finetune import predict as predicting

    return predicting.predict(model, data, out, predicting.Asked(**asked), terminal)


def teach(recipe: Path, overrides: Sequence[str], out: Path, top_k: int, terminal: Terminal) -> dict[str, Any]:
    """Write down what a recipe's teacher says of its rows."""
    from finetune import teach as teaching

    return teaching.teach(recipe, overrides, out, top_k, terminal, reading(terminal, "reading"))


def merge(folder: Path, out: Path, asked: Mapping[str, Any], terminal: Terminal, **bare: Any) -> dict[str, Any]:
    """Fold a run's adapter, or a bare one, into the base as it was trained against (or as published), and prove it.

    ``asked`` as of ``certify.Asked``, ``bare`` as of ``trained.of_adapter``.
    """
    from finetune import certify, trained

    return certify.merge(trained.of(folder, terminal, **bare), out, certify.Asked(**asked), terminal)


def prove(first: str, second: str, terminal: Terminal, rows: Path | None, bound: float | None) -> dict[str, Any]:
    """Compare two models' answers at the same positions."""
    from finetune import prove as proving

    return proving.prove(first, second, terminal, rows=rows, bound=proving.BOUND if bound is None else bound)


def blend(
    words: Sequence[str], out: Path, terminal: Terminal, method: str, density: float | None, seed: int, rank: int | None
) -> dict[str, Any]:
    """Write the weighted merge of several runs' adapters, ``RUN:share`` each, and what each run lost by it."""
    from finetune import blend as blending
    from finetune import weigh

    options = weigh.Options(method=method, density=density, seed=seed, rank=rank)
    return blending.blend(blending.parse(words), out, terminal, options)


def export(run: Path, out: Path, to: str, terminal: Terminal, **how: Any) -> dict[str, Any]:
    """Write a run's result for another program; ``how`` as of ``export.export``."""
    if to in ("huggingface", "original"):
        return merge(run, out, {"layout": "native" if to == "huggingface" else to}, terminal)
    from finetune import export as exporting

    return exporting.export(run, out, to, terminal, **how)


def release(
    run: Path, out: Path, what: str, asked: Mapping[str, Any], terminal: Terminal, **how: Any
) -> dict[str, Any]:
    """Make the folder that one publishes of a finished run; ``asked`` as of a merge, ``how`` as of the release."""
    from finetune import certify
    from finetune import release as releasing

    return releasing.release(run, out, what, terminal, asked=certify.Asked(**asked), **how)


def push(folder: Path, repo: str, terminal: Terminal, **how: Any) -> dict[str, Any]:
    """Upload a release to the hub; ``how`` as of ``push.push``."""
    from finetune import push as pushing

    return pushing.push(folder, repo, terminal, **how)


def convert(source: Path, out: Path, layout: str, terminal: Terminal) -> None:
    """Write a model folder, or an adapter's, in the other layout."""
    from finetune import convert as conversion

    conversion.convert(source, out, layout, terminal)


def to_lora(source: Path, out: Path, rank: int, terminal: Terminal, **bare: Any) -> dict[str, Any]:
    """Write an adapter of any method as LoRA of a rank; ``bare`` as of ``trained.of_adapter``."""
    from finetune import as_lora

    return as_lora.convert(source, out, rank, terminal, **bare)
