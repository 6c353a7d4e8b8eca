"""The words of a fault: the nearest legal one, how a found value is shown, what a schema fragment asks for."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from finetune.recipe import secrets_shape
from finetune.recipe.yamlfile import KeyPath


class Finding(NamedTuple):
    """One thing wrong with a key, before it is known where that key was written."""

    path: KeyPath
    what: str
    fix: str = ""


_SHOWN = 60  # characters of a found value that are shown
_ENTRIES = 5000  # names of one folder that are looked at for a suggestion

# What other tools call our keys: no spelling distance leads from one to the other.
SYNONYMS = {
    "lr": "learning_rate",
    "lora_rank": "r",
    "lora_r": "r",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules",
    "batch_size": "examples_per_step",
    "per_device_train_batch_size": "examples_per_step",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "max_seq_length": "max_length",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "warmup_steps": "warmup",
    "gradient_checkpointing": "recompute",
    "save_steps": "save_every",
    "save_total_limit": "keep_last",
    "eval_steps": "every",
    "val_set_size": "eval_fraction",
    "report_to": "tracker",
    "output_dir": "output",
    "base_model": "model",
    "model_name_or_path": "model",
    "bits": "weights",
    "optim": "optimizer",
    "loraplus_lr_ratio": "lora_plus_ratio",
}


def nearest(word: str, legal: Iterable[str]) -> str | None:
    """The legal word that ``word`` was most likely meant to be."""
    words = {str(each).lower(): str(each) for each in legal}
    meant = SYNONYMS.get(word.lower())
    if meant in words:
        return words[meant]
    found = difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.6)
    return words[found[0]] if found else None


def did_you_mean(word: str, legal: Iterable[str]) -> str:
    """``did you mean 'x'?``, or the legal words when none is near."""
    words = list(legal)
    near = nearest(word, words)
    if near is not None:
        return f"did you mean {near!r}?"
    return f"legal: {', '.join(words)}" if words else ""


def near_path(path: Path) -> str:
    """``did you mean 'x'?`` for a path that does not exist, its first missing part mended; else empty."""
    parts = path.parts
    for depth in range(1, len(parts) + 1):
        if Path(*parts[:depth]).exists():
            continue
        parent = Path(*parts[: depth - 1])
        near = nearest(parts[depth - 1], _names(parent))
        return f"did you mean {str(Path(parent, near, *parts[depth:]))!r}?" if near else ""
    return ""


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry, _ in zip(entries, range(_ENTRIES), strict=False)]
    except OSError:
        return []


def shown(value: object) -> str:
    """A found value as the file would write it, short and without secrets."""
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, str):
        text = secrets_shape.mask(value)
        return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
    return "nothing" if value is None else json.dumps(value)


def mend(value: object, fragment: dict[str, Any]) -> str:
    """What to write instead of a refused value, as far as one can tell."""
    legal = options(fragment)
    if isinstance(value, str) and legal:
        near = nearest(value, legal)
        return f"did you mean {near!r}?" if near else ""
    if isinstance(value, str) and _is_number(value) and "string" not in kinds(fragment):
        return "write it without quotes"
    return ""


def options(fragment: dict[str, Any]) -> list[str]:
    """The words a fragment of the schema accepts."""
    if "anyOf" in fragment:
        return [word for part in fragment["anyOf"] for word in options(part)]
    if "const" in fragment:
        return [str(fragment["const"])]
    return [str(word) for word in fragment.get("enum", [])]


def kinds(fragment: dict[str, Any]) -> set[str]:
    """The JSON types a fragment of the schema accepts."""
    if "anyOf" in fragment:
        return {kind for part in fragment["anyOf"] for kind in kinds(part)}
    return {fragment["type"]} if isinstance(fragment.get("type"), str) else set()


def describe(fragment: dict[str, Any]) -> str:
    """What a fragment of the schema accepts, in words: ``a whole number, at least 1``."""
    if "anyOf" in fragment:
        return " or ".join(describe(part) for part in fragment["anyOf"])
    if legal := options(fragment):
        return legal[0] if len(legal) == 1 else f"one of {', '.join(legal)}"
    kind = fragment.get("type")
    if kind == "array":
        return f"a list of {describe(fragment['items'])}" if fragment.get("items") else "a list"
    names = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}
    names |= {"null": "null", "object": "a section of 'key: value' lines"}
    return ", ".join([names.get(str(kind), "another value"), *_bounds(fragment)])


def _bounds(fragment: dict[str, Any]) -> list[str]:
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    return [f"{word} {fragment[bound]:g}" if fragment[bound] < 1 else f"{word} {fragment[bound]:.0f}"
            for bound, word in words.items() if bound in fragment]  # fmt: skip


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
