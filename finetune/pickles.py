"""Pickled ``.bin`` shards → safetensors, the one place where a pickle is opened.

In a child process with an empty environment and limits on memory, processor time and file size; weights only, so that
a payload is refused by the unpickler; one shard at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from finetune.errors import ModelError
from finetune.headers import INDEX
from finetune.runfolder import json_bytes, write_synced

_INDEX = "pytorch_model.bin.index.json"
_SECONDS = 3600


def unpack(source: Path, out: Path, progress: Callable[[int, int], None]) -> None:
    """Write every ``.bin`` shard of ``source`` to ``out`` under the same tensor names, with the same split.

    Raises:
        ModelError: a shard that is missing, damaged, or holds anything but tensors.
    """
    names = _shards(source)
    weight_map: dict[str, str] = {}
    for done, name in enumerate(names):
        progress(done, len(names))
        target = safe_name(name)
        found = unpack_one(source / name, out / target)
        if twice := sorted(set(found) & set(weight_map)):
            what = f"tensor {twice[0]} lies in {weight_map[twice[0]]} too: which one is meant cannot be told"
            raise ModelError(what, str(source / name), "remove the shard that does not belong here")
        weight_map |= dict.fromkeys(found, target)
    progress(len(names), len(names))
    if len(names) > 1:
        write_synced(out / INDEX, json_bytes({"metadata": {}, "weight_map": weight_map}))


def safe_name(name: str) -> str:
    """``pytorch_model-00001-of-00002.bin`` → ``model-00001-of-00002.safetensors``."""
    return name.removeprefix("pytorch_").rpartition(".")[0] + ".safetensors"


def _shards(source: Path) -> list[str]:
    index = source / _INDEX
    if not index.is_file():
        return ["pytorch_model.bin"]
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        if strangers := [name for name in names if Path(name).name != name or not name.endswith(".bin")]:
            what = f"it names {strangers[0]!r}, which is no shard of this folder"
            raise ModelError(what, str(index), "fetch it again")
        return names
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ModelError("the shard index cannot be read", str(index), "fetch the file again") from None


def unpack_one(path: Path, target: Path) -> list[str]:
    """Write the tensors of one pickled file to ``target`` and return their names. Raises ModelError."""
    if not path.is_file():
        raise ModelError("this shard is missing", str(path), "fetch it again")
    # -P: the working folder is no place to import from. Nothing of our environment, tokens above all, goes along.
    command = [sys.executable, "-P", "-m", "finetune.unpickle", str(path.absolute()), str(target.absolute())]
    kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH") if key in os.environ}
    try:
        done = subprocess.run(
            command, env=kept, cwd=target.parent, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise ModelError(f"reading this shard took more than {_SECONDS} s", str(path), "use safetensors") from None
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        answer = {"error": f"the reading process ended with {done.returncode}"}
    if "error" in answer:
        raise ModelError(answer["error"], str(path), "fetch it again, or use the model's safetensors form")
    names: list[str] = answer["tensors"]
    return names
