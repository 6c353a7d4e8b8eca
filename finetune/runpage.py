"""``report.html`` of a run: one page that needs nothing else, made from the files of the run's folder alone."""

from __future__ import annotations

from pathlib import Path

from finetune import ended, runresult, runsections, runstory, webpage
from finetune.errors import EnvironmentFault, FinetuneError
from finetune.runfolder import RunFolder, write_atomic
from finetune.runstory import Story
from finetune.terminal import Terminal, clean
from finetune.webpage import safe

_TIMES = 20
"""How often a report is written at most while a run is under way; its metrics are read whole each time."""
_SECTIONS = (
    ("Result", runresult.result),
    ("Evaluation", runresult.evaluation),
    ("Training", runsections.training),
    ("Answers, base and adapter", runresult.answers),
    ("Data", runsections.data),
    ("Plan and measurement", runsections.plan),
    ("Notes", runsections.notes),
    ("Identity", runsections.identity),
)


def page(story: Story, *, training: bool = False) -> str:
    """The whole page. ``training``: a run that is not finished is under way, and was not interrupted."""
    state = runstory.state(story, training=training)
    lead = [f"<p>{safe(runstory.summary(story))}</p>", f'<p class="state">{safe(state)}</p>' if state else ""]
    return webpage.page(
        title=story.name,
        kind="finetune report",
        lead="\n".join(filter(None, [*lead, runresult.figures(story)])),
        sections=(webpage.section(title, made(story)) for title, made in _SECTIONS),
        footer=f"Made from the files in {clean(story.folder, 300)} alone.",
    )


def write(folder: RunFolder, *, training: bool = False) -> Path:
    """(Re)write the report of a run folder; one that would be the same is left alone.

    Raises:
        EnvironmentFault: there is no run, or the disk refuses.
    """
    if not folder.identity.is_file():
        raise EnvironmentFault("this is not a run folder", str(folder.root), "give the `output:` folder of a run")
    made = page(runstory.read(folder), training=training).encode("utf-8", "replace")
    if not folder.report.is_file() or folder.report.read_bytes() != made:
        write_atomic(folder.report, made)
    return folder.report


def keep(folder: RunFolder, terminal: Terminal, *, training: bool = False) -> None:
    """Write the report beside a run. Whatever goes wrong with it is said and stops nothing: the run is what counts."""
    try:
        write(folder, training=training)
    except FinetuneError as error:
        terminal.say(clean(f"report.html was not written: {error}", 400))
    except Exception as error:  # noqa: BLE001 — a page must not cost a run
        terminal.say(clean(f"report.html was not written: {type(error).__name__}: {error}", 400))


class Pages:
    """When a run's report is due while it trains: at the saves and judgements, but seldom in a long run."""

    def __init__(self, folder: RunFolder, terminal: Terminal, total: int, start: int) -> None:
        self.folder, self.terminal, self.total = folder, terminal, total
        self.written = start

    def at(self, step: int) -> None:
        """A step was saved or judged."""
        if step < self.total and (step - self.written) * _TIMES >= self.total:
            keep(self.folder, self.terminal, training=True)
            self.written = step


def rewrite(root: Path) -> list[Path]:
    """Write the report of a run, or of each adapter of a run of several; where they are.

    Raises:
        EnvironmentFault: as ``write``.
    """
    members = sorted(path.parent for path in root.glob("*/identity.json"))
    folders = [root] if (root / "identity.json").is_file() or not members else members
    return [write(RunFolder(folder), training=ended.under_way(RunFolder(folder))) for folder in folders]
