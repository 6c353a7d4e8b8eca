"""Rows that nobody has described yet: their format, and how long they and their answers are."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from finetune import datacheck, dataset, gather, tokenizer, window
from finetune.base import Base
from finetune.conversation import TEXT, RowFault
from finetune.datacheck import Report
from finetune.dataset import Faults, Read, Reader, Row, Source
from finetune.errors import DataError
from finetune.renderer import Renderer

_BYTES = 3
"""Of a text to a token, cautiously, where no tokenizer is here: 4 in English, 2 to 3 in others (Qwen's vocabulary)."""
_TURN, _FRAME = 8, 24
"""Tokens of the template around a turn, and around a row with its system turn."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """``lengths``: tokens of each row; ``answer``: of the longest last answer, 0 where rows are no questions.

    ``measured`` by the model's own tokenizer, or estimated from the text.
    """

    format: str
    mapping: str
    lengths: Sequence[int]
    answer: int
    thinking: bool
    measured: bool

    @property
    def rows(self) -> int:
        return len(self.lengths)


def judge(path: str, progress: dataset.Progress) -> Report:
    """Every row judged, as ``finetune data check`` does."""
    return datacheck.check(Reader(Source(path=path), datacheck.CONTROL), progress=progress)


def measure(path: str, base: Base | None, progress: dataset.Progress) -> Survey:
    """The rows' lengths, by the tokenizer and template of ``base`` where it is here.

    Raises:
        DataError: rows that no objective trains on, or that the template cannot render, each by its place.
    """
    renderer = Renderer(tokenizer.of(base), base.stop_token, piecewise=base.piecewise) if base else None
    reader = Reader(Source(path=path), gather.special_tokens(renderer) if renderer else datacheck.CONTROL)
    lengths, faults, longest, questions, thinking = array("q"), Faults(path), 0, True, False
    for read in reader:
        faults.rows += 1
        if faults.rows % 1000 == 0:
            progress(path, faults.rows, read.done)
        try:
            length, answer = _sizes(read, renderer)
        except RowFault as fault:
            faults.add(read.where, fault)
            continue
        except DataError as error:
            faults.put(error.faults[0])
            continue
        assert not isinstance(read.found, RowFault)
        lengths.append(length)
        longest = max(longest, answer)
        last = read.found.turns[-1]
        questions &= answer > 0 and not read.found.tools and not last.calls
        thinking |= any(turn.thinking for turn in read.found.turns)
    faults.raise_if_any()
    return Survey(
        format=reader.mapping.partition(":")[0], mapping=reader.mapping, lengths=lengths,
        answer=longest if questions else 0, thinking=thinking, measured=renderer is not None,
    )  # fmt: skip


def _sizes(read: Read, renderer: Renderer | None) -> tuple[int, int]:
    """Tokens of a row, and of the answer that ends it. Raises RowFault, DataError."""
    if isinstance(read.found, RowFault):
        raise read.found
    if (fault := window.refusal(read.found, "answers")) is not None:
        raise fault
    last = read.found.turns[-1]
    if renderer is not None:
        made = renderer.examples(Row(conversation=read.found, where=read.where))
        answer = len(renderer.tokenizer.encode(last.content, add_special_tokens=False))
        length = max(len(example.ids) for example in made)
    else:
        said = [_estimate(turn.says()) + _TURN for turn in read.found.turns]
        answer = _estimate(last.content)
        length = sum(said) + _FRAME + sum(_estimate(str(tool)) for tool in read.found.tools)
    return length, 0 if last.role == TEXT else answer


def _estimate(text: str) -> int:
    return -(-len(text.encode("utf-8", "surrogatepass")) // _BYTES)
