"""Rows as whole texts, and the rewards that a reward model gives them: what ``finetune predict`` writes of one.

A row is read in any format that trains, with its answer. A pair has two texts, and so two rewards.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from finetune import gather
from finetune.conversation import RowFault
from finetune.dataset import Example, Read, Reader, Row, Source
from finetune.errors import DataError
from finetune.model import Policy
from finetune.objectives import collate, reward
from finetune.renderer import Renderer
from finetune.unanswered import of_each
from finetune.window import Window

Rated = float | dict[str, float]
"""A text's reward, or of a pair those of ``chosen`` and ``rejected``."""


def texts(source: Source, renderer: Renderer, *, longest: int, column: str) -> list[tuple[Example, ...]]:
    """Each row's texts.

    Args:
        longest: the most tokens of a text.
        column: where the reward will go, which no row may have.

    Raises:
        DataError: every row that cannot be scored, by its place.
    """
    window = Window(renderer=renderer, max_length=sys.maxsize)

    def halves(read: Read) -> tuple[Example, ...]:
        assert not isinstance(read.found, RowFault)
        *_, whole = window.place(Row(conversation=read.found, where=read.where)).examples
        if (most := max(len(text.ids) for text in whole.halves())) > longest:
            raise DataError(f"it has {most} tokens; the model has {longest} positions", read.where, "shorten it")
        return whole.halves()

    return of_each(Reader(source, gather.special_tokens(renderer), renderer.literals), column, halves)


def rate(policy: Policy, rows: Sequence[tuple[Example, ...]]) -> list[Rated]:
    """The rewards of some rows' texts, all at once. Call inside ``policy.evaluating()``."""
    batch = collate([text for row in rows for text in row]).to(policy.device)
    found = iter(reward.rewards(policy, batch).tolist())
    return [
        next(found) if len(row) == 1 else dict(zip(("chosen", "rejected"), (next(found), next(found)), strict=True))
        for row in rows
    ]
