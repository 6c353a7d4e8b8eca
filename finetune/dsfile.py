"""The scheduler of a DeepSpeed file, which runs in place of the one that a trainer's settings ask for.

Facts of transformers' `integrations/deepspeed.py`, where a `scheduler` section wins over ``lr_scheduler_type``, and of
DeepSpeed's `runtime/lr_schedules.py`: WarmupLR rises with the logarithm of the step and stays.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.foreign import ONE_UPDATE, Draft, short

_SCHEDULERS = {"WarmupLR": "constant", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}
_MOST = 1_000_000


def scheduler(draft: Draft, usual: Mapping[str, str] | None = None) -> None:
    """A scheduler of the DeepSpeed file is the one that runs; ``usual``: that of known files which are not here."""
    settings = draft.settings
    name = settings.raw("deepspeed")
    if not name:
        return
    draft.lost("deepspeed", ONE_UPDATE)
    kind, file = _deepspeed(draft, name, usual or {})
    asked, ours = draft.lines["train.schedule"][0], _SCHEDULERS.get(kind, "")
    if ours and ours != asked:
        draft.put("train.schedule", ours, "deepspeed", value=kind, note="the DeepSpeed file's scheduler runs")
        rise = " (which rises with the logarithm of the step)" if kind.startswith("Warmup") else ""
        draft.differs("lr_scheduler_type", f"{asked} was asked for and ignored: the scheduler of {short(file)}, "
                                           f"{kind}, runs "
                      f"in its place, so the rate was {ours} after the warm-up{rise}; for what was asked, write "
                      f"schedule: {asked}")  # fmt: skip
    elif kind and not ours:
        draft.lost(
            "deepspeed", f"its scheduler {short(kind)} runs in place of lr_scheduler_type; a recipe has none like it"
        )


def _deepspeed(draft: Draft, name: Any, usual: Mapping[str, str]) -> tuple[str, str]:
    """The kind of scheduler that a DeepSpeed file, or section, has, and the file's name."""
    found = name if isinstance(name, dict) else {}
    path = Path("deepspeed") if isinstance(name, dict) else Path(draft.settings.find(str(name)))
    if path.suffix == ".json" and path.is_file() and path.stat().st_size <= _MOST:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            draft.settings.fault("deepspeed", f"{short(name)} is not valid JSON", "mend it")
    elif path.name in usual:
        return usual[path.name], path.name
    elif path.suffix == ".json":
        draft.differs("deepspeed", f"{short(name)} is not here: a scheduler in it runs in place of lr_scheduler_type")
    section = found.get("scheduler") if isinstance(found, dict) else None
    return (str(section.get("type", "")) if isinstance(section, dict) else ""), path.name
