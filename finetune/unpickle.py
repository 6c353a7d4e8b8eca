"""The child process that opens one pickled shard: ``python -m finetune.unpickle SHARD.bin OUT.safetensors``.

Answers with one line of JSON: the tensors' names, or what is wrong.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from pathlib import Path

_SLACK = 6 * 1024**3
"""Address space for the interpreter and torch's libraries, which are mapped whole."""


def _limit(size: int) -> None:
    """What a shard of ``size`` bytes may need; a bomb in it ends this process and nothing else."""
    for kind, most in (
        (resource.RLIMIT_AS, 4 * size + _SLACK),
        (resource.RLIMIT_FSIZE, size + size // 8 + 64 * 1024**2),
        (resource.RLIMIT_CPU, 1800),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def unpickle(path: Path, target: Path) -> list[str]:
    """Write the tensors of one shard. Raises ValueError with what is wrong."""
    import torch

    from finetune.headers import Tensor, header_of
    from finetune.shards import TORCH_DTYPES, ShardWriter

    names = {kind: name for name, kind in TORCH_DTYPES.items()}
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001 — whatever a hostile file makes the unpickler raise
        asked = re.search(r"GLOBAL (\S+)", str(error))
        detail = f" (it asks for {asked[1]})" if asked else ""
        raise ValueError(f"this pickle holds more than tensors, is damaged or of an old format{detail}") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError("this pickle is no mapping of names to tensors")
    if odd := [name for name in state if not (isinstance(name, str) and name.isprintable())]:
        raise ValueError(f"this pickle has a tensor without a usable name: {odd[0]!r:.80}")
    unknown = [name for name, value in state.items() if value.dtype not in names]
    if unknown:
        raise ValueError(f"tensor {unknown[0]} is stored as {state[unknown[0]].dtype}, which is a quantised form")
    layout = {
        str(name): Tensor(shard=target.name, dtype=names[value.dtype], shape=tuple(value.shape))
        for name, value in state.items()
    }
    with ShardWriter(target, header_of(layout)) as shard:
        for name, value in state.items():
            shard.add(str(name), value)
    return list(layout)


def main() -> None:
    path, target = map(Path, sys.argv[1:3])
    _limit(path.stat().st_size)
    try:
        answer: dict[str, object] = {"tensors": unpickle(path, target)}
    except Exception as error:  # noqa: BLE001 — the parent gets one line, whatever happened
        answer = {"error": str(error) or type(error).__name__}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
