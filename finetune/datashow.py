"""What the model will see of a row, token by token: which turn it belongs to, whether it is trained, where it ends.

For the terminal, and as one page that needs nothing else: no script, no font, no picture, text as text nodes only.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune.terminal import clean

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.renderer import Renderer

_VISIBLE = str.maketrans({"\n": "⏎\n", "\t": "⇥", "\r": "␍"})
_STYLES = {"trained": "32", "end": "1;7;32", "frame": "2;36", "read": "2"}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens that make whole characters together. ``kind``: trained, end (the trained stop token), frame (other control
    tokens) or read (context that is not in the loss)."""

    text: str
    ids: tuple[int, ...]
    kind: str


def pieces(example: Example, renderer: Renderer) -> list[Piece]:
    """An example as it will be trained."""
    tokenizer = renderer.tokenizer
    stop = tokenizer.convert_tokens_to_ids(renderer.stop_token)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    found: list[Piece] = []
    held: list[int] = []
    for token, supervised in zip(example.ids, example.supervised, strict=True):
        held.append(token)
        text = str(tokenizer.decode(held))
        if "\ufffd" in text and len(held) < 8:  # the first bytes of a character
            continue
        kind = "trained" if supervised else "read"
        if token in special:
            kind = "end" if supervised and token == stop else "frame"
        found.append(Piece(text=text, ids=tuple(held), kind=kind))
        held = []
    if held:
        found.append(Piece(text=str(tokenizer.decode(held)), ids=tuple(held), kind="read"))
    return found


def summary(example: Example) -> str:
    """Where the row came from, and its counts."""
    return f"{example.where}: {len(example.ids)} tokens, {sum(example.supervised)} trained"


def lines(example: Example, found: Sequence[Piece], *, colour: bool) -> Iterator[str]:
    """The row for a terminal; without colour what is trained stands in ⟦brackets⟧."""
    yield summary(example)
    text = ""
    before = ""
    for piece in found:
        shown = _shown(piece.text)
        if colour:
            text += "\n".join(f"\x1b[{_STYLES[piece.kind]}m{part}\x1b[0m" if part else "" for part in shown.split("\n"))
            continue
        trained = piece.kind in ("trained", "end")
        text += ("⟦" if trained and before not in ("trained", "end") else "") + (
            "⟧" if not trained and before in ("trained", "end") else ""
        )
        text += shown
        before = piece.kind
    yield from (text + ("⟧" if before in ("trained", "end") else "")).split("\n")


def _shown(text: str) -> str:
    """Text with its white space made visible; what could steer a terminal is taken out."""
    parts = text.translate(_VISIBLE).split("\n")
    return "\n".join(clean(part, 100_000) for part in parts)


_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; \
form-action 'none'">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 15px/1.6 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
body {{ color: #222; background: #fff }}
pre {{ font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
pre {{ border: 1px solid #ddd; padding: .8rem }}
span {{ border-bottom: 1px solid #eee }}
.trained {{ background: #d8f5dc }}
.end {{ background: #2a8f3c; color: #fff }}
.frame {{ color: #0b6a8a }}
.read {{ color: #777 }}
@media (prefers-color-scheme: dark) {{
body {{ color: #ddd; background: #16181a }} pre {{ border-color: #444 }} span {{ border-color: #333 }}
.trained {{ background: #1d4a27 }} .frame {{ color: #6cc7e6 }} .read {{ color: #999 }}
}}
</style>
<h1>{title}</h1>
<p>What the model sees, token by token: <span class="trained">trained</span>,
<span class="end">the end that it learns</span>, <span class="frame">the template's control tokens</span>,
<span class="read">read only</span>. Hover shows a token's id.</p>
{body}
</html>
"""


def page(title: str, rows: Sequence[tuple[Example, Sequence[Piece]]]) -> str:
    """One self-contained HTML page. Sample text is somebody else's: it is escaped, and the page may load nothing."""
    body = "\n".join(_section(example, found) for example, found in rows)
    return _PAGE.format(title=_safe(title), body=body)


def _section(example: Example, found: Sequence[Piece]) -> str:
    spans = "".join(_span(piece) for piece in found)
    return f"<h2>{_safe(summary(example))}</h2>\n<pre>{spans}</pre>"


def _span(piece: Piece) -> str:
    ids = " ".join(map(str, piece.ids))
    return f'<span class="{piece.kind}" title="{ids}">{_safe(_shown(piece.text))}</span>'


def _safe(text: Any) -> str:
    return html.escape(str(text), quote=True)
