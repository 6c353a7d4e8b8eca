"""What the model will see of a row, token by token: which turn it belongs to, whether it is trained, where it ends.

For the terminal, and as one page that needs nothing else: no script, no font, no picture, text as text nodes only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from finetune import webpage
from finetune.terminal import clean
from finetune.webpage import safe, words

if TYPE_CHECKING:
    from finetune.conversation import Turn
    from finetune.dataset import Example
    from finetune.renderer import Renderer

_VISIBLE = str.maketrans({"\n": "⏎\n", "\t": "⇥", "\r": "␍"})
_STYLES = {"trained": "32", "end": "1;7;32", "frame": "2;36", "read": "2"}


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens that make whole characters together. ``kind``: trained, end (the trained stop token), frame (other control
    tokens) or read (context that is not in the loss). ``turn``: whose words they are, or frame; ``weight`` in the loss.
    """

    text: str
    ids: tuple[int, ...]
    kind: str
    weight: float
    turn: str = ""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A sample with its pieces; ``heading`` stands before it (a micro-batch begins), ``note`` says what was cut."""

    example: Example
    pieces: tuple[Piece, ...]
    heading: str = ""
    note: str = ""

    def summary(self) -> str:
        """Where the row came from, and its counts."""
        example = self.example
        text = f"{example.where}: {len(example.ids)} tokens, {sum(example.supervised)} trained"
        odd = sorted(set(example.weights) - {0.0, 1.0})
        text += f", weights {', '.join(f'{one:g}' for one in odd)}" if odd else ""
        return f"{text} ({self.note})" if self.note else text

    def to_dict(self) -> dict[str, Any]:
        """The row for a program: every token, whose it is and its weight in the loss."""
        return {
            "where": self.example.where,
            "heading": self.heading,
            "note": self.note,
            "tokens": len(self.example.ids),
            "trained": sum(self.example.supervised),
            "pieces": [asdict(piece) for piece in self.pieces],
        }


def shown(example: Example, turns: Sequence[Turn], renderer: Renderer, *, heading: str = "", note: str = "") -> Shown:
    """A sample as it will be trained; ``turns`` are the row's."""
    return Shown(
        example=example, pieces=tuple(_attributed(_pieces(example, renderer), turns)), heading=heading, note=note
    )


def _pieces(example: Example, renderer: Renderer) -> list[Piece]:
    tokenizer = renderer.tokenizer
    stop = tokenizer.convert_tokens_to_ids(renderer.stop_token)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    found: list[Piece] = []
    held: list[int] = []
    for token, weight in zip(example.ids, example.weights, strict=True):
        held.append(token)
        text = str(tokenizer.decode(held))
        if "\ufffd" in text and len(held) < 8:  # the first bytes of a character
            continue
        kind = "trained" if weight > 0 else "read"
        if token in special:
            kind = "end" if weight > 0 and token == stop else "frame"
        found.append(Piece(text=text, ids=tuple(held), kind=kind, weight=weight))
        held = []
    if held:
        found.append(Piece(text=str(tokenizer.decode(held)), ids=tuple(held), kind="read", weight=0.0))
    return found


def _attributed(found: Sequence[Piece], turns: Sequence[Turn]) -> Iterator[Piece]:
    """Each piece with the turn whose content it stands in; what lies between contents is the template's frame."""
    text = "".join(piece.text for piece in found)
    spans, place = [], 0
    for number, turn in enumerate(turns, 1):
        words = turn.content.rpartition("</think>")[2].strip()
        start = text.find(words, place) if words else -1
        if start >= 0:
            place = start + len(words)
            spans.append((start, place, f"turn {number} ({turn.role})"))
    at = 0
    for piece in found:
        end = at + len(piece.text)
        owner = next((name for low, high, name in spans if low < end and at < high), "frame")
        yield replace(piece, turn="frame" if piece.kind in ("frame", "end") else owner)
        at = end


def lines(one: Shown, *, colour: bool) -> Iterator[str]:
    """The row for a terminal; without colour what is trained stands in ⟦brackets⟧."""
    if one.heading:
        yield f"── {one.heading} ──"
    yield one.summary()
    text = ""
    before = ""
    for piece in one.pieces:
        words = visible(piece.text)
        if colour:
            text += "\n".join(f"\x1b[{_STYLES[piece.kind]}m{part}\x1b[0m" if part else "" for part in words.split("\n"))
            continue
        trained = piece.kind in ("trained", "end")
        text += ("⟦" if trained and before not in ("trained", "end") else "") + (
            "⟧" if not trained and before in ("trained", "end") else ""
        )
        text += words
        before = piece.kind
    yield from (text + ("⟧" if before in ("trained", "end") else "")).split("\n")


def visible(text: str) -> str:
    """Text with its white space made visible; what could steer a terminal or turn a line round is taken out."""
    parts = text.translate(_VISIBLE).split("\n")
    return "\n".join(clean(part, 100_000) for part in parts)


LEGEND = (
    'What the model sees, token by token: <span class="trained">trained</span>, <span class="end">the end that it '
    'learns</span>, <span class="frame">the template\'s control tokens</span>, <span class="read">read only</span>'
)
"""The colours of a token's part in the loss; also in a run's report."""


def page(title: str, rows: Sequence[Shown]) -> str:
    """One self-contained HTML page. Sample text is somebody else's: it is escaped, and the page may load nothing."""
    lead = f'<p class="tokens">{LEGEND}. Hover shows a token\'s id, its turn and its weight.</p>'
    return webpage.page(title=title, kind="finetune data", lead=lead, sections=map(_section, rows))


def _section(one: Shown) -> str:
    heading = f'<p class="kicker">{words(one.heading)}</p>' if one.heading else ""
    return f'<section class="tokens">{heading}<h2>{words(one.summary())}</h2>{block(one.pieces)}</section>'


def block(pieces: Sequence[Piece]) -> str:
    """The tokens of a sample, each a span that shows what it is."""
    return f"<pre>{''.join(_span(piece) for piece in pieces)}</pre>"


def _span(piece: Piece) -> str:
    what = " · ".join(filter(None, (" ".join(map(str, piece.ids)), piece.turn, f"weight {piece.weight:g}")))
    return f'<span class="{piece.kind}" title="{words(what)}">{safe(visible(piece.text))}</span>'
