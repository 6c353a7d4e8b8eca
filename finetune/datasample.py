"""``data.json`` of a run: what its data is in numbers, its first samples token by token, and what judges it as text.

Written while the tokenizer is at hand, so that the run's report can be made from the folder alone.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from finetune import datashow
from finetune.runfolder import RunFolder, json_bytes, write_atomic

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.evaluate import HeldOut
    from finetune.renderer import Renderer
    from finetune.samples import Samples

_SHOWN, _TOKENS = 2, 600
_ASKED, _CHARACTERS = 200, 1200
_BINS = 24


def write(folder: RunFolder, samples: Samples, held_out: HeldOut | None, renderer: Renderer) -> None:
    """Describe the data, once: the same data gives the same bytes.

    Raises:
        EnvironmentFault: the disk refuses.
    """
    data = json_bytes(describe(samples, held_out, renderer))
    if not folder.data.is_file() or folder.data.read_bytes() != data:
        write_atomic(folder.data, data)


def describe(samples: Samples, held_out: HeldOut | None, renderer: Renderer) -> dict[str, Any]:
    """Counts by source, lengths, samples with their tokens' part in the loss, and held-out questions as text."""
    lengths, supervised = samples.lengths, samples.supervised
    sources, begin = [], 0
    for part in samples.part_list():
        end = begin + part.samples
        sources.append({
            "name": part.name, "samples": part.samples, "tokens": int(lengths[begin:end].sum()),
            "supervised": int(supervised[begin:end].sum()),
        })  # fmt: skip
        begin = end
    return {
        "samples": len(samples),
        "tokens": int(lengths.sum()),
        "supervised": int(supervised.sum()),
        "longest": int(lengths.max()),
        "sources": sources,
        "lengths": _histogram([int(one) for one in lengths]),
        "held_out": held_out.rows if held_out else 0,
        "shown": [
            _tokens(half, renderer) for index in range(min(_SHOWN, len(samples))) for half in samples[index].halves()
        ],
        "asked": _asked(held_out, renderer),
    }


def _histogram(lengths: list[int]) -> list[dict[str, int]]:
    """Samples by length, in bins of equal width."""
    low, high = min(lengths), max(lengths)
    width = max(1, math.ceil((high - low + 1) / _BINS))
    counts = [0] * (((high - low) // width) + 1)
    for one in lengths:
        counts[(one - low) // width] += 1
    return [
        {"from": low + index * width, "to": low + (index + 1) * width - 1, "samples": n}
        for index, n in enumerate(counts)
    ]


def _tokens(sample: Example, renderer: Renderer) -> dict[str, Any]:
    one = datashow.shown(sample, (), renderer)
    pieces = [
        {"text": piece.text, "ids": list(piece.ids), "kind": piece.kind, "weight": piece.weight}
        for piece in one.pieces[:_TOKENS]
    ]
    return {"summary": one.summary(), "pieces": pieces, "more": max(0, len(one.pieces) - _TOKENS)}


def _asked(held_out: HeldOut | None, renderer: Renderer) -> dict[str, str]:
    """Each question's last turn, as the model reads it."""
    questions = held_out.questions[:_ASKED] if held_out else ()
    return {question.where: _last_turn(question.prompt, renderer)[-_CHARACTERS:] for question in questions}


def _last_turn(prompt: tuple[int, ...], renderer: Renderer) -> str:
    """What stands between control tokens before the model's own turn is opened; all of it where there are none."""
    tokenizer = renderer.tokenizer
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    stretches = [list(ids) for control, ids in itertools.groupby(prompt, special.__contains__) if not control]
    found = [text for ids in stretches if (text := str(tokenizer.decode(ids)).strip())]
    return found[-2 if len(found) > 1 else -1].removeprefix("user\n") if found else ""
