"""``report.html`` of a run: one page that needs nothing else, made from the files of the run's folder alone.

No script, no font, no picture, no request: the policy allows the page's own style by its digest and nothing more.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from finetune import datashow, ended, runresult, runsections, runstory
from finetune.datashow import safe
from finetune.errors import EnvironmentFault, FinetuneError
from finetune.runfolder import PAGE, RunFolder, write_atomic
from finetune.runstory import Story
from finetune.terminal import Terminal, clean

_TIMES = 20
"""How often a report is written at most while a run is under way; its metrics are read whole each time."""
_SECTIONS = (
    ("Result", runresult.result),
    ("Training", runsections.training),
    ("Answers, base and adapter", runresult.answers),
    ("Data", runsections.data),
    ("Plan and measurement", runsections.plan),
    ("Notes", runsections.notes),
    ("Identity", runsections.identity),
)

_STYLE = (
    """
:root { --ink: #1d2329; --quiet: #66707a; --rule: #e3e6e9; --page: #fff; --panel: #f7f8f9; --accent: #0b6a8a;
  --soft: #9fc3d1; --second: #1d2329; --bad: #a4442c }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe3e6; --quiet: #98a2ab; --rule: #32383e; --page: #16181a;
  --panel: #1d2023; --accent: #6cc7e6; --soft: #31596a; --second: #dfe3e6; --bad: #e29a86 } }
@media print { :root { --ink: #111; --quiet: #555; --rule: #ccc; --page: #fff; --panel: #fff; --accent: #0b6a8a;
  --soft: #9fc3d1; --second: #111; --bad: #a4442c } }
* { box-sizing: border-box }
html { -webkit-text-size-adjust: 100% }
body { margin: 0 auto; max-width: 64rem; padding: 3rem 1.25rem 4rem; color: var(--ink); background: var(--page);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 1.9rem; line-height: 1.2; font-weight: 600; letter-spacing: -.015em; margin: 0 0 .8rem;
  overflow-wrap: anywhere }
h2 { font-size: 1.15rem; font-weight: 600; margin: 0 0 1rem }
h3 { font-size: .95rem; font-weight: 600; margin: 1.6rem 0 .5rem; overflow-wrap: anywhere }
h3 small, .quiet, .none { color: var(--quiet); font-weight: 400 }
p { margin: 0 0 1rem; max-width: 44rem; overflow-wrap: anywhere }
.kicker { color: var(--accent); font-size: .8rem; font-weight: 600; letter-spacing: .04em; margin: 0 0 .4rem }
.state { border-left: 3px solid var(--bad); padding: .1rem 0 .1rem .9rem }
section { border-top: 1px solid var(--rule); margin-top: 2.6rem; padding-top: 1.5rem }
.figures { display: flex; flex-wrap: wrap; gap: 1.2rem 2.6rem; margin: 1.8rem 0 0 }
.figures dt { color: var(--quiet); font-size: .82rem }
.figures dd { margin: 0; font-size: 1.55rem; line-height: 1.3; font-weight: 600; letter-spacing: -.01em }
.figures small { display: block; color: var(--quiet); font-size: .82rem; font-weight: 400; letter-spacing: 0 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.6rem 2rem }
figure { margin: 0 0 .8rem; min-width: 0; max-width: 34rem; break-inside: avoid }
figcaption { font-size: .9rem; font-weight: 600; margin-bottom: .3rem }
svg { display: block; width: 100%; height: auto; overflow: visible }
svg text { font: 11.5px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--ink) }
svg .tick { fill: var(--quiet) } .end { text-anchor: end } .middle { text-anchor: middle }
svg .main-label { fill: var(--accent); font-weight: 600 } svg .bound-label { fill: var(--quiet) }
.grid { stroke: var(--rule) } .bound { stroke: var(--quiet); stroke-dasharray: 3 3 }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round } .faint { stroke-width: 1; opacity: .35 }
polyline.main { stroke: var(--accent) } polyline.second { stroke: var(--second); stroke-width: 1.2 }
circle.main, rect.main { fill: var(--accent) } circle.second { fill: var(--second) } rect.soft { fill: var(--soft) }
.interval { stroke: var(--ink); stroke-width: 1.2 }
.hover { fill: transparent } .hover:hover { fill: var(--quiet); fill-opacity: .1 }
.wide { overflow-x: auto; margin: 0 0 1rem }
table { border-collapse: collapse; font-size: .9rem; min-width: 60% }
th { color: var(--quiet); font-weight: 400; text-align: left; white-space: nowrap }
th, td { border-bottom: 1px solid var(--rule); padding: .35rem 1.6rem .35rem 0; vertical-align: top }
.num { text-align: right; white-space: nowrap }
article { border-top: 1px solid var(--rule); padding: .9rem 0; break-inside: avoid }
.where { color: var(--quiet); font-size: .8rem; margin: 0 }
.asked { white-space: pre-wrap; margin: .1rem 0 .5rem; font-size: .95rem }
.sides { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .6rem 1.4rem; margin: 0 }
.sides dt { color: var(--quiet); font-size: .8rem } .sides .right dt { color: var(--accent) }
.sides dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .95rem }
pre { font: 13px/1.7 ui-monospace, "SF Mono", Consolas, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--panel); padding: .9rem 1rem; margin: 0 0 1rem }
.tokens pre span { border-bottom: 1px solid var(--rule) }
details { margin: 1rem 0 } summary { color: var(--quiet); cursor: pointer; font-size: .9rem }
details[open] summary { margin-bottom: .8rem }
.facts { font-size: .88rem; margin: 0 }
.facts div { display: grid; grid-template-columns: minmax(8rem, 16rem) minmax(0, 1fr); gap: 1rem;
  border-bottom: 1px solid var(--rule); padding: .25rem 0 }
.facts dt { color: var(--quiet); overflow-wrap: anywhere } .facts dd { margin: 0; overflow-wrap: anywhere }
ul { margin: 0; padding-left: 1.1rem } li { margin: .2rem 0; max-width: 44rem; overflow-wrap: anywhere }
footer { color: var(--quiet); font-size: .85rem; margin-top: 3rem }
@media (max-width: 40rem) { body { padding: 1.6rem 1rem 3rem } .sides { grid-template-columns: 1fr }
  th, td { padding-right: .9rem } .facts div { grid-template-columns: 1fr; gap: 0 }
  .figures { gap: 1rem 2rem } .figures dd { font-size: 1.35rem } }
@media print { body { padding: 0; font-size: 11pt } section { break-inside: auto } h2, h3 { break-after: avoid }
  .hover { display: none } }
"""
    + datashow.LIGHT
    + "\n@media screen and (prefers-color-scheme: dark) { "
    + datashow.DARK
    + " }\n"
)
_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_POLICY = f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none'"


def page(story: Story, *, training: bool = False) -> str:
    """The whole page. ``training``: a run that is not finished is under way, and was not interrupted."""
    state = runstory.state(story, training=training)
    parts = [
        PAGE, '<html lang="en">', '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{safe(story.name)}</title>", f"<style>{_STYLE}</style>",
        '<header><p class="kicker">finetune report</p>', f"<h1>{safe(story.name)}</h1>",
        f"<p>{safe(runstory.summary(story))}</p>", f'<p class="state">{safe(state)}</p>' if state else "",
        runresult.figures(story), "</header>", "<main>",
    ]  # fmt: skip
    for title, section in _SECTIONS:
        if body := section(story):
            parts.append(f"<section><h2>{title}</h2>{body}</section>")
    parts += [
        "</main>",
        f"<footer>Made from the files in {safe(clean(story.folder, 300))} alone.</footer>",
        "</html>\n",
    ]
    return "\n".join(filter(None, parts))


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
