"""The frame of every page that the project writes: policy, style for light, dark, print and phone, tables, text.

A page is one file that needs nothing else: no script, no font, no picture, no request. Its policy allows its own style
by digest and nothing more. What somebody else may have written goes through ``safe`` or ``words``.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from finetune.errors import EnvironmentFault
from finetune.runfolder import write_atomic
from finetune.terminal import clean

PAGE = "<!doctype html>"  # how a page of ours begins

SERIES = 6
"""Colours, and as many dashes, of curves that are drawn over one another."""
_LIGHT = """--ink: #1d2329; --quiet: #66707a; --rule: #e3e6e9; --page: #fff; --panel: #f7f8f9; --accent: #0b6a8a;
  --soft: #9fc3d1; --second: #1d2329; --good: #13795b; --bad: #a4442c; --trained: #d8f5dc; --end: #237a33;
  --s0: #0b6a8a; --s1: #b4451f; --s2: #4f7414; --s3: #7b459f; --s4: #94690a; --s5: #4a545e"""
_DARK = """--ink: #dfe3e6; --quiet: #98a2ab; --rule: #32383e; --page: #16181a; --panel: #1d2023; --accent: #6cc7e6;
  --soft: #31596a; --second: #dfe3e6; --good: #4cc38a; --bad: #e29a86; --trained: #1d4a27; --end: #237a33;
  --s0: #6cc7e6; --s1: #f0936f; --s2: #a9cf62; --s3: #cda2ea; --s4: #e3bb5c; --s5: #b4bec7"""
_DASHES = ("9 3", "2 3", "12 3 2 3", "6 2", "1 4")
_STYLE = f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
* {{ box-sizing: border-box }}
html {{ -webkit-text-size-adjust: 100% }}
body {{ margin: 0 auto; max-width: 64rem; padding: 3rem 1.25rem 4rem; color: var(--ink); background: var(--page);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", sans-serif; font-variant-numeric: tabular-nums }}
h1 {{ font-size: 1.9rem; line-height: 1.2; font-weight: 600; letter-spacing: -.015em; margin: 0 0 .8rem }}
h1, h2, h3, p, li, dt, dd, pre {{ overflow-wrap: anywhere }}
h2 {{ font-size: 1.15rem; font-weight: 600; margin: 0 0 1rem }}
h3 {{ font-size: .95rem; font-weight: 600; margin: 1.6rem 0 .5rem }}
h3 small, .quiet, .none {{ color: var(--quiet); font-weight: 400 }}
p {{ margin: 0 0 1rem; max-width: 44rem }}
a {{ color: var(--accent) }}
.kicker {{ color: var(--accent); font-size: .8rem; font-weight: 600; letter-spacing: .04em; margin: 0 0 .4rem }}
.state {{ border-left: 3px solid var(--bad); padding: .1rem 0 .1rem .9rem }}
section {{ border-top: 1px solid var(--rule); margin-top: 2.6rem; padding-top: 1.5rem }}
.figures {{ display: flex; flex-wrap: wrap; gap: 1.2rem 2.6rem; margin: 1.8rem 0 0 }}
.figures dt {{ color: var(--quiet); font-size: .82rem }}
.figures dd {{ margin: 0; font-size: 1.55rem; line-height: 1.3; font-weight: 600; letter-spacing: -.01em }}
.figures small {{ display: block; color: var(--quiet); font-size: .82rem; font-weight: 400; letter-spacing: 0 }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.6rem 2rem }}
figure {{ margin: 0 0 .8rem; min-width: 0; max-width: 34rem; break-inside: avoid }}
figcaption {{ font-size: .9rem; font-weight: 600; margin-bottom: .3rem }}
svg {{ display: block; width: 100%; height: auto; overflow: visible }}
svg text {{ font: 11.5px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--ink) }}
svg .tick, svg .bound-label {{ fill: var(--quiet) }}
text.end {{ text-anchor: end }} text.middle {{ text-anchor: middle }}
.main {{ --mark: var(--accent) }} .second {{ --mark: var(--second) }} .soft {{ --mark: var(--soft) }}
{" ".join(f".s{n} {{ --mark: var(--s{n}) }}" for n in range(SERIES))}
svg .curve-label {{ fill: var(--mark) }} svg .curve-label:not(.second) {{ font-weight: 600 }}
.grid {{ stroke: var(--rule) }} .bound {{ stroke: var(--quiet); stroke-dasharray: 3 3 }}
.line {{ fill: none; stroke: var(--mark); stroke-width: 1.8; stroke-linejoin: round }}
.line.second {{ stroke-width: 1.2 }} .line.faint {{ stroke-width: 1; opacity: .35; stroke-dasharray: none }}
{" ".join(f".line.d{n} {{ stroke-dasharray: {dash} }}" for n, dash in enumerate(_DASHES, 1))}
circle, rect {{ fill: var(--mark) }}
.interval {{ stroke: var(--ink); stroke-width: 1.2 }}
.hover {{ fill: transparent }} .hover:hover {{ fill: var(--quiet); fill-opacity: .1 }}
.key {{ list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; font-size: .9rem;
  margin: 0 0 1.2rem }}
.key svg {{ width: 28px; height: 10px; display: inline-block; margin-right: .5rem }}
.wide {{ overflow-x: auto; margin: 0 0 1rem }}
table {{ border-collapse: collapse; font-size: .9rem; min-width: 60% }}
th {{ color: var(--quiet); font-weight: 400; text-align: left; white-space: nowrap }}
th, td {{ border-bottom: 1px solid var(--rule); padding: .35rem 1.6rem .35rem 0; vertical-align: top }}
th, td:not(.num) {{ max-width: 22rem; overflow-wrap: break-word }} td:first-child {{ min-width: 4.5rem }}
figure p {{ font-size: .85rem; margin: .2rem 0 0 }}
.num {{ text-align: right; white-space: nowrap }}
article {{ border-top: 1px solid var(--rule); padding: .9rem 0; break-inside: avoid }}
.where {{ color: var(--quiet); font-size: .8rem; margin: 0 }}
.asked {{ white-space: pre-wrap; margin: .1rem 0 .5rem; font-size: .95rem }}
.sides {{ display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .6rem 1.4rem; margin: 0 }}
.sides dt {{ color: var(--quiet); font-size: .8rem }} .sides .right dt {{ color: var(--accent) }}
.sides dd {{ margin: 0; white-space: pre-wrap; font-size: .95rem }}
.answer {{ border-left: 3px solid var(--rule); padding: .1rem 0 .1rem .9rem; margin: 0 0 1.2rem; break-inside: avoid }}
.answer h3 {{ margin: 0 0 .3rem }} .answer p {{ margin: 0 0 .3rem }}
.better {{ border-color: var(--good) }} .worse {{ border-color: var(--bad) }}
pre {{ font: 13px/1.7 ui-monospace, "SF Mono", Consolas, monospace; white-space: pre-wrap;
  background: var(--panel); padding: .9rem 1rem; margin: 0 0 1rem }}
.tokens span {{ border-bottom: 1px solid var(--rule) }} .tokens h2 {{ font-size: .95rem; margin: 0 0 .5rem }}
span.trained {{ background: var(--trained) }} span.end {{ background: var(--end); color: #fff }}
span.frame {{ color: var(--accent) }} span.read {{ color: var(--quiet) }}
span, rect, circle {{ print-color-adjust: exact; -webkit-print-color-adjust: exact }}
details {{ margin: 1rem 0 }} summary {{ color: var(--quiet); cursor: pointer; font-size: .9rem }}
details[open] summary {{ margin-bottom: .8rem }}
.facts {{ font-size: .88rem; margin: 0 }}
.facts div {{ display: grid; grid-template-columns: minmax(8rem, 16rem) minmax(0, 1fr); gap: 1rem;
  border-bottom: 1px solid var(--rule); padding: .25rem 0 }}
.facts dt {{ color: var(--quiet) }} .facts dd {{ margin: 0 }}
ul {{ margin: 0; padding-left: 1.1rem }} li {{ margin: .2rem 0; max-width: 44rem }}
footer {{ color: var(--quiet); font-size: .85rem; margin-top: 3rem; overflow-wrap: anywhere }}
@media (max-width: 40rem) {{ body {{ padding: 1.6rem 1rem 3rem }} .sides {{ grid-template-columns: 1fr }}
  th, td {{ padding-right: .9rem }} .facts div {{ grid-template-columns: 1fr; gap: 0 }}
  .figures {{ gap: 1rem 2rem }} .figures dd {{ font-size: 1.35rem }} }}
@media print {{ body {{ padding: 0; max-width: none; font-size: 11pt }} h2, h3 {{ break-after: avoid }}
  .hover {{ display: none }} .wide {{ overflow: visible }} th, td {{ white-space: normal; padding-right: .8rem }} }}
"""
_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
POLICY = f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none'"


def page(*, title: str, kind: str, lead: str, sections: Iterable[str], footer: str = "") -> str:
    """The whole page. ``title``, ``kind`` (what page this is) and ``footer`` are text; ``lead``, ``sections`` HTML."""
    parts = [
        PAGE, '<html lang="en">', '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{words(title)}</title>", f"<style>{_STYLE}</style>",
        f'<header><p class="kicker">{safe(kind)}</p>', f"<h1>{words(title)}</h1>", lead, "</header>",
        "<main>", *sections, "</main>", f"<footer>{safe(footer)}</footer>" if footer else "", "</html>\n",
    ]  # fmt: skip
    return "\n".join(filter(None, parts))


def section(title: str, body: str) -> str:
    """A part of a page under its heading; nothing where there is no ``body`` (HTML)."""
    return f"<section><h2>{safe(title)}</h2>{body}</section>" if body else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: int = 0) -> str:
    """``heads`` are text, ``rows`` HTML; the last ``numbers`` columns stand at the right."""
    kinds = ["" if index < len(heads) - numbers else ' class="num"' for index in range(len(heads))]
    head = "".join(f"<th{kind}>{safe(one)}</th>" for one, kind in zip(heads, kinds, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{one}</td>' for one, kind in zip(row, kinds, strict=True))}</tr>" for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def words(text: Any, limit: int = 300) -> str:
    """One line of somebody else's text."""
    return safe(clean(str(text), limit))


def safe(text: Any) -> str:
    """Text for an element or a quoted attribute, without halves of characters, which no file can hold."""
    return html.escape(str(text).encode("utf-8", "replace").decode(), quote=True)


def write_page(path: Path, page: str) -> None:
    """Write an HTML page where the user wants it; nothing but an older page is replaced.

    Raises:
        EnvironmentFault: something else is there.
    """
    if path.exists() and not (path.is_file() and path.read_bytes()[: len(PAGE)] == PAGE.encode()):
        raise EnvironmentFault("something else is there already", str(path), "give another --html")
    write_atomic(path, page.encode())
