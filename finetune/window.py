"""Rows that are longer than the window, by the recipe's policy: refused, left out, cut by whole turns, or split.

Whatever is done to a row is told by name: the rows that come in are the rows that are trained and the rows named here.
An answer is never cut, and each ends with its stop token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from finetune.dataset import Example, Row, capped
from finetune.errors import DataError, Fault

if TYPE_CHECKING:
    from finetune.conversation import Conversation
    from finetune.renderer import Renderer


@dataclass(frozen=True, kw_only=True)
class Named:
    """A row that is not trained as it stands: ``done`` is left out, cut or split; ``tokens`` it had."""

    where: str
    done: str
    tokens: int
    detail: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Rows as they will be trained, their samples, and the rows that were not taken as they stand."""

    rows: tuple[Row, ...]
    examples: tuple[Example, ...]
    named: tuple[Named, ...]

    def notes(self, key: str) -> list[str]:
        """What to say of the named rows in a plan."""
        kinds: dict[str, list[Named]] = {}
        for one in self.named:
            kinds.setdefault(one.done, []).append(one)
        return [
            f"{len(found)} rows of {key} are {done} (data.over_length), the longest has "
            f"{max(one.tokens for one in found)} tokens, the first is {found[0].where}"
            for done, found in kinds.items()
        ]


def fit(rows: Sequence[Row], renderer: Renderer, max_length: int, policy: str = "error") -> Fitted:
    """All rows as samples of at most ``max_length`` tokens. ``policy``: error, drop, truncate_turns or split.

    Raises:
        DataError: rows that the template cannot render; with ``error``, rows that are too long; with the others, when
            nothing is left.
    """
    kept: list[Row] = []
    examples: list[Example] = []
    named: list[Named] = []
    faults: list[Fault] = []
    for row in rows:
        try:
            made = renderer.examples(row)
            if _longest(made) > max_length:
                parts, told = _fitting(row, renderer, max_length, policy)
                named.append(told)
                made = [example for part in parts for example in renderer.examples(part)]
            else:
                parts = [row]
        except DataError as error:
            faults += error.faults
            continue
        kept += parts
        examples += made
    if policy == "error":
        fix = "raise train.max_length, shorten the row, or choose data.over_length"
        faults += [
            Fault(f"{one.tokens} tokens, more than train.max_length {max_length}", one.where, fix) for one in named
        ]
    if faults:
        raise capped(faults)
    if rows and not examples:
        what = f"no row fits into train.max_length {max_length}"
        raise DataError(what, rows[0].where.rpartition(":")[0], "raise train.max_length")
    return Fitted(rows=tuple(kept), examples=tuple(examples), named=tuple(named))


def _longest(examples: Sequence[Example]) -> int:
    return max(len(example.ids) for example in examples)


def _fitting(row: Row, renderer: Renderer, max_length: int, policy: str) -> tuple[list[Row], Named]:
    """(what of the row is trained, its name)."""
    tokens = _longest(renderer.examples(row))

    def fits(turns: Conversation) -> bool:
        trained = any(turn.role == "assistant" and turn.train for turn in turns)
        return trained and _longest(renderer.examples(replace(row, conversation=turns))) <= max_length

    system = row.conversation[:1] if row.conversation[0].role == "system" else ()
    turns = row.conversation[len(system) :]
    starts = [index for index, turn in enumerate(turns) if turn.role == "user"]
    if policy == "truncate_turns":
        for start in starts[1:]:
            if fits((*system, *turns[start:])):
                detail = f"the first {start} turns are left out"
                cut = replace(row, conversation=(*system, *turns[start:]))
                return [cut], Named(where=row.where, done="cut", tokens=tokens, detail=detail)
    if policy == "split":
        parts = _parts(system, turns, starts, fits)
        if parts:
            rows = [
                replace(row, conversation=part, where=f"{row.where}#{number}") for number, part in enumerate(parts, 1)
            ]
            detail = f"into {len(parts)} samples; {_lost(turns, parts, system)} turns are left out"
            return rows, Named(where=row.where, done="split", tokens=tokens, detail=detail)
    detail = f"longer than {max_length} tokens" if policy == "drop" else "not even one exchange fits"
    return [], Named(where=row.where, done="left out", tokens=tokens, detail=detail)


def _parts(system: Conversation, turns: Conversation, starts: Sequence[int], fits: Any) -> list[Conversation]:
    """The longest runs of whole exchanges that fit, one after the other; an exchange that does not fit is left out."""
    parts: list[Conversation] = []
    ends = [*starts[1:], len(turns)]
    low = 0
    while low < len(starts):
        high = low
        while high < len(starts) and fits((*system, *turns[starts[low] : ends[high]])):
            high += 1
        if high > low:
            parts.append((*system, *turns[starts[low] : ends[high - 1]]))
        low = max(high, low + 1)
    return parts


def _lost(turns: Conversation, parts: Sequence[Conversation], system: Conversation) -> int:
    return len(turns) - sum(len(part) - len(system) for part in parts)
