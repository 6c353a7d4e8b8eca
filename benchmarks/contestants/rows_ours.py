"""`finetune`'s own data steps, as its verbs call them."""

from __future__ import annotations

import os
from array import array
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.contestants.rows import Call, Told, digest, serve
from finetune import base, datacheck, gather, schedule, similar, store, tokenizer
from finetune.conversation import RowFault
from finetune.dataset import Reader, Source
from finetune.renderer import Renderer
from finetune.samples import Stored
from finetune.similar import Similar
from finetune.window import Window

SEED, BATCH = 7, 512


@cache
def renderer(folder: str) -> Renderer:
    found = base.inspect(Path(folder))
    return Renderer(tokenizer.of(found), found.stop_token)


def warm(call: Call) -> Told:
    """Load what a run would have loaded before its data."""
    renderer(call.base)
    return dict


def tokenise(call: Call) -> Told:
    stored = _opened(call)

    def told() -> dict[str, Any]:
        columns = stored.columns
        found = {
            "rows": stored.meta["rows"], "samples": len(stored.lengths), "tokens": stored.meta["tokens"],
            "supervised": int(columns["supervised"].sum()),
        }  # fmt: skip
        if call.options.get("digests"):
            stop = renderer(call.base).encode(renderer(call.base).stop_token)[0]
            examples = [stored.example(index) for index in range(len(stored.lengths))]
            found["digests"] = [digest(one.ids, one.supervised, stop) for one in examples]
        if call.lengths:
            Path(call.lengths).write_text(str(stored.lengths.tolist()))
        return found

    return told


def _opened(call: Call) -> Stored:
    os.environ["XDG_CACHE_HOME"] = call.folder
    source = Source(path=call.file)
    speaks = renderer(call.base)
    fitting = Window(renderer=speaks, max_length=call.window, policy="drop")
    return store.open_source(Reader(source, gather.special_tokens(speaks)), fitting)


def check(call: Call) -> Told:
    """Without a model, as `finetune data check FILE` does it; ``all``: near copies and languages are looked for too."""
    every = bool(call.options.get("all"))
    search = datacheck.Search(near=every, languages=every)
    report = datacheck.check(Reader(Source(path=call.file), datacheck.CONTROL), search=search)
    return lambda: {
        "rows": report.rows, "trainable": report.trainable, "errors": report.errors,
        "codes": dict(report.counts),
    }  # fmt: skip


def pack(call: Call) -> Told:
    """One epoch's steps, each packed. ``read``: and every pack's samples read from the store, as training does it."""
    lengths: list[int] = call.options["lengths"]
    tokens = call.options["step"] * call.window if call.options["step"] else sum(lengths)
    steps = schedule.steps(lengths, SEED, count=None, epochs=1.0, examples=None, tokens=tokens)
    packs = [
        [step[at] for at in positions]
        for step in steps
        for positions in schedule.pack([lengths[index] for index in step], call.window)
    ]
    if call.options.get("read"):
        stored = _opened(call)
        for one in packs:
            array("i", [token for index in one for token in stored.example(index).ids])
    return lambda: {"packs": len(packs), "fill": sum(lengths) / (len(packs) * call.window), "steps": len(steps)}


def near(call: Call) -> Told:
    """The search for near copies by itself: reading the file is in it, every other check is not."""
    search, pairs, numbers = Similar(), list[tuple[int, int]](), list[int]()
    waiting: list[similar.Pair] = []

    def look() -> None:
        for number, before in zip(numbers, search.add_many(numbers, waiting), strict=True):
            if before is not None:
                pairs.append((before, number))
        numbers.clear()
        waiting.clear()

    for read in Reader(Source(path=call.file)):
        assert not isinstance(read.found, RowFault)
        numbers.append(read.number - 1)
        waiting.append(similar.parts(read.found))
        if len(numbers) == BATCH:
            look()
    look()
    return lambda: {"pairs": pairs}


if __name__ == "__main__":
    serve({"warm": warm, "tokenise": tokenise, "check": check, "pack": pack, "near": near})
