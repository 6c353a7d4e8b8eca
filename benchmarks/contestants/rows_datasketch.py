"""datasketch's MinHashLSH over the same runs of characters, with the same threshold."""

from __future__ import annotations

import json
from pathlib import Path

from datasketch import MinHash, MinHashLSH  # type: ignore[import-not-found]  # not among this project's packages

from benchmarks.contestants.made_rows import shingles, whole
from benchmarks.contestants.rows import Call, Told, serve

THRESHOLD, PERMUTATIONS = 0.8, 128


def near(call: Call) -> Told:
    """Each row asked for and then put in, as datasketch's documentation has it; of several the most similar counts."""
    index = MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
    kept: list[MinHash] = []
    pairs: list[tuple[int, int]] = []
    for number, line in enumerate(Path(call.file).read_text(encoding="utf-8").splitlines()):
        runs = shingles(whole(json.loads(line)))
        sketch = MinHash(num_perm=PERMUTATIONS)
        sketch.update_batch([run.encode() for run in runs])
        near_ones = [(kept[other].jaccard(sketch), -other) for other in index.query(sketch)]
        best = max(near_ones, default=(0.0, 0))
        if best[0] >= THRESHOLD:
            pairs.append((-best[1], number))
        index.insert(number, sketch)
        kept.append(sketch)
    return lambda: {"pairs": pairs}


if __name__ == "__main__":
    serve({"near": near})
