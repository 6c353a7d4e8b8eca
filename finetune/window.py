"""Rows that are longer than the window, by the recipe's policy: refused, left out, cut by whole turns, or split.

Whatever is done to a row is told by name: the rows that come in are the rows that are trained and the rows named here.
An answer is never cut, and each ends with its stop token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from finetune.conversation import TEXT, Conversation, RowFault, Turn
from finetune.dataset import Example, Faults, Row
from finetune.errors import DataError

if TYPE_CHECKING:
    from finetune.renderer import Renderer

Turns = tuple[Turn, ...]
_IS = {
    "answers": "this row shows an answer and judges none", "pairs": "this row ranks two answers",
    "labels": "this row says whether an answer is wanted",
}  # fmt: skip
_TRAINS = {
    "answers": "this objective trains on every answer", "pairs": "this objective trains on pairs",
    "labels": "objective kto trains on labels", "prompts": "objective grpo answers by itself, beside a right answer",
}  # fmt: skip
_SINGLE, _PAIRED = "train with objective.method: sft", "train with objective.method: dpo, orpo, simpo or reward"
_LABELLED = "train with objective.method: kto"
_MEND = {
    ("answers", "pairs"): f"{_PAIRED}; to train on the chosen answers alone, write them as messages",
    ("answers", "labels"): f"{_LABELLED}; to train on the wanted answers alone, write them as messages",
    ("pairs", "answers"): f"give it a chosen and a rejected ending, or {_SINGLE}",
    ("pairs", "labels"): f"give it a chosen and a rejected ending, or {_LABELLED}",
    ("labels", "answers"): f"add label: true or false, or {_SINGLE}",
    ("labels", "pairs"): f"write both endings as rows with label: true and label: false, or {_PAIRED}",
}
"""What to do about a row, by what the objective trains on and what the row is."""
APART = "tokenised in pieces"
"""What is done to a row whose text in one piece has other ids: it opens with a newline, or holds a declared literal."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """A row that is not trained as it stands: ``done`` is left out, cut, split or APART; ``tokens`` it had."""

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


def notes(named: Iterable[Named], key: str) -> list[str]:
    """What to say of the named rows in a plan."""
    kinds: dict[str, list[Named]] = {}
    for one in named:
        kinds.setdefault(one.done, []).append(one)
    said = []
    for done, found in kinds.items():
        what = f"{len(found)} rows of {key} are {done}"
        if done == APART:
            said.append(f"{what}: in one piece their text would have other ids; the first is {found[0].where}")
        else:
            longest = max(one.tokens for one in found)
            said.append(f"{what} (data.over_length), the longest has {longest} tokens, the first is {found[0].where}")
    return said


@dataclass(frozen=True, kw_only=True)
class Window:
    """How rows are fitted: the renderer, the most tokens of a sample, and the policy for rows that have more.

    ``policy``: error, drop, truncate_turns or split. ``rows``: what the objective trains on, answers, pairs or labels.
    """

    renderer: Renderer
    max_length: int
    policy: str = "error"
    rows: str = "answers"

    def refusal(self, conversation: Conversation) -> RowFault | None:
        """What is wrong with a row of another kind than the objective trains on."""
        return refusal(conversation, self.rows)

    def place(self, row: Row) -> Placed:
        """One row's samples, and its name where it is not trained as it stands.

        Raises:
            DataError: the template cannot render it; with the policy ``error``, it is too long.
        """
        made = self._pair(row) if row.conversation.rejected else self.renderer.examples(row)
        if row.conversation.label is not None:
            made = [replace(example, label=row.conversation.label) for example in made]
        tokens = _longest(made)
        if tokens <= self.max_length:
            return Placed(parts=(row,), examples=tuple(made), named=_apart(row, made, tokens))
        if self.policy == "error":
            fix = "raise train.max_length, shorten the row, or choose data.over_length"
            raise DataError(f"{tokens} tokens, more than train.max_length {self.max_length}", row.where, fix)
        if row.conversation.ranked:  # either text of a pair decides; the recipe leaves no other policy
            detail = f"longer than {self.max_length} tokens"
            return Placed(
                parts=(), examples=(), named=Named(where=row.where, done="left out", tokens=tokens, detail=detail)
            )
        if row.conversation.turns[0].role == TEXT and self.policy == "split":
            examples, named = _slices(made[0], self.max_length)
            return Placed(parts=(row,), examples=examples, named=named)
        parts, named = _fitting(row, self.renderer, self.max_length, self.policy, tokens)
        fitted = tuple(example for part in parts for example in self.renderer.examples(part))
        return Placed(parts=tuple(parts), examples=fitted, named=named)

    def _pair(self, row: Row) -> list[Example]:
        """Both texts of a pair as one sample, so that nothing can part them."""
        texts = []
        for turns in row.conversation.endings():
            one = replace(row, conversation=replace(row.conversation, turns=turns, rejected=()))
            made = self.renderer.examples(one)
            if len(made) > 1:
                what = "the template renders this ending's answers each with a prompt of its own"
                raise DataError(what, row.where, "set data.train_on: last, or give endings of one answer")
            texts += made
        chosen, rejected = texts
        return [
            replace(
                chosen, ids=chosen.ids + rejected.ids, weights=chosen.weights + rejected.weights,
                apart=chosen.apart or rejected.apart, half=len(chosen.ids),
            )
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Placed:
    """One row as it will be trained: the rows that it became, their samples, and its name if it was not taken as is."""

    parts: tuple[Row, ...]
    examples: tuple[Example, ...]
    named: Named | None


def fit(rows: Sequence[Row], window: Window) -> Fitted:
    """All rows as samples.

    Raises:
        DataError: rows that the template cannot render; rows that are too long, where the policy is ``error``; with the
            others, when nothing is left.
    """
    kept: list[Row] = []
    examples: list[Example] = []
    named: list[Named] = []
    faults = Faults(rows[0].where.rpartition(":")[0] if rows else "")
    for row in rows:
        if (fault := window.refusal(row.conversation)) is not None:
            faults.add(row.where, fault)
            continue
        try:
            placed = window.place(row)
        except DataError as error:
            faults.put(error.faults[0])
            continue
        kept += placed.parts
        examples += placed.examples
        named += [placed.named] if placed.named else []
        faults.rows += 1
    if rows:
        faults.raise_if_any()
        refuse_empty(len(examples), window.max_length, faults.place)
    return Fitted(rows=tuple(kept), examples=tuple(examples), named=tuple(named))


def refusal(conversation: Conversation, rows: str) -> RowFault | None:
    """What is wrong with a row where an objective trains on ``rows``: answers, pairs, labels or prompts."""
    kind = "pairs" if conversation.rejected else "answers" if conversation.label is None else "labels"
    asks = "answers" if rows == "prompts" else rows
    if kind == asks:
        return None
    code = "ranked" if conversation.ranked else "not_ranked"
    return RowFault("", f"{_IS[kind]}, and {_TRAINS[rows]}", _MEND[asks, kind], code=code)


def refuse_empty(samples: int, max_length: int, place: str) -> None:
    """Raises DataError where no row of a source fits."""
    if not samples:
        raise DataError(f"no row fits into train.max_length {max_length}", place, "raise train.max_length")


def _apart(row: Row, made: Sequence[Example], tokens: int) -> Named | None:
    if not any(example.apart for example in made):
        return None
    return Named(where=row.where, done=APART, tokens=tokens, detail="in one piece the text has other ids")


def _slices(example: Example, max_length: int) -> tuple[tuple[Example, ...], Named]:
    """Plain text in pieces. Each begins with the last token of the one before, so that every token is trained once."""
    step = max_length - 1
    starts = range(0, len(example.ids) - 1, step)
    parts = [
        Example(
            ids=example.ids[low : low + max_length], weights=(0.0, *example.weights[low + 1 : low + max_length]),
            where=f"{example.where}#{number}",
        )
        for number, low in enumerate(starts, 1)
    ]  # fmt: skip
    detail = f"into {len(parts)} samples; nothing is left out"
    return tuple(parts), Named(where=example.where, done="split", tokens=len(example.ids), detail=detail)


def _longest(examples: Sequence[Example]) -> int:
    return max(len(half.ids) for example in examples for half in example.halves())


def _fitting(row: Row, renderer: Renderer, max_length: int, policy: str, tokens: int) -> tuple[list[Row], Named]:
    """(what of the row is trained, its name)."""

    def with_turns(turns: Turns, where: str = row.where) -> Row:
        return replace(row, conversation=replace(row.conversation, turns=turns), where=where)

    def fits(turns: Turns) -> bool:
        return any(turn.answers for turn in turns) and _longest(renderer.examples(with_turns(turns))) <= max_length

    def short(turns: Turns) -> bool:
        """As if each answer were trained: what is context only takes as much room."""
        trained = tuple(replace(turn, weight=1.0) if turn.role == "assistant" else turn for turn in turns)
        return fits(trained)

    whole = row.conversation.turns
    system = whole[:1] if whole[0].role == "system" else ()
    turns = whole[len(system) :]
    starts = [index for index, turn in enumerate(turns) if turn.role == "user"]
    if policy == "truncate_turns":
        for start in starts[1:]:
            if fits((*system, *turns[start:])):
                detail = f"the first {start} turns are left out"
                return [with_turns((*system, *turns[start:]))], Named(
                    where=row.where, done="cut", tokens=tokens, detail=detail
                )
    if policy == "split":
        parts = [part for part in _parts(system, turns, starts, short) if any(turn.answers for turn in part)]
        if parts:
            rows = [with_turns(part, f"{row.where}#{number}") for number, part in enumerate(parts, 1)]
            detail = f"into {len(parts)} samples; {_lost(turns, parts, system)} turns are left out"
            return rows, Named(where=row.where, done="split", tokens=tokens, detail=detail)
    detail = f"longer than {max_length} tokens" if policy == "drop" else "not even one exchange fits"
    return [], Named(where=row.where, done="left out", tokens=tokens, detail=detail)


def _parts(system: Turns, turns: Turns, starts: Sequence[int], short: Callable[[Turns], bool]) -> list[Turns]:
    """The longest runs of whole exchanges that fit, one after the other; an exchange that does not fit is left out."""
    parts: list[Turns] = []
    ends = [*starts[1:], len(turns)]
    low = 0
    while low < len(starts):
        high = low
        while high < len(starts) and short((*system, *turns[starts[low] : ends[high]])):
            high += 1
        if high > low:
            parts.append((*system, *turns[starts[low] : ends[high - 1]]))
        low = max(high, low + 1)
    return parts


def _lost(turns: Turns, parts: Sequence[Turns], system: Turns) -> int:
    return len(turns) - sum(len(part) - len(system) for part in parts)
