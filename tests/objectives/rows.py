"""Pairs and labelled rows as samples, and what TRL says of some."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from finetune import objectives
from finetune.dataset import Example
from finetune.objectives import Objective

VECTORS = Path(__file__).resolve().parents[1] / "vectors" / "objectives"
TRL: dict[str, Any] = json.loads((VECTORS / "trl.json").read_text())
DPO = {"loss": "sigmoid", "beta": 0.3, "label_smoothing": 0.0, "length_normalised": False}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dpo sigmoid": ("dpo", DPO),
    "dpo smoothed": ("dpo", DPO | {"label_smoothing": 0.2}),
    "dpo sigmoid normalised": ("dpo", DPO | {"length_normalised": True}),
    "dpo ipo": ("dpo", DPO | {"loss": "ipo", "length_normalised": True}),
    "dpo hinge": ("dpo", DPO | {"loss": "hinge"}),
    "dpo robust": ("dpo", DPO | {"loss": "robust", "label_smoothing": 0.2}),
    "orpo": ("orpo", {"beta": 0.3}),
    "simpo": ("simpo", {"beta": 0.3, "gamma": 0.6}),
    "kto": ("kto", {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7, "longest": 64}),
}
"""The objectives as the vectors were made with them."""


def make(kind: str) -> Objective:
    method, settings = KINDS[kind]
    return objectives.get(method, settings)


def script() -> ModuleType:
    """The script that made the vectors."""
    spec = importlib.util.spec_from_file_location("vectors_of_trl", VECTORS / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def example(prompt: Sequence[int], answer: Sequence[int], where: str) -> Example:
    weights = (0.0,) * len(prompt) + (1.0,) * len(answer)
    return Example(ids=(*prompt, *answer), weights=weights, where=where)


def pair(chosen: Example, rejected: Example) -> Example:
    return replace(
        chosen, ids=chosen.ids + rejected.ids, weights=chosen.weights + rejected.weights, half=len(chosen.ids)
    )


def of_trl(kind: str) -> list[Example]:
    """The rows that TRL was given."""
    if kind == "kto":
        return [
            replace(example(row["prompt_ids"], row["completion_ids"], f"r:{i}"), label=row["label"])
            for i, row in enumerate(TRL["labelled"])
        ]
    return [
        pair(*(example(row["prompt_ids"], row[f"{side}_ids"], f"r:{i}") for side in ("chosen", "rejected")))
        for i, row in enumerate(TRL["rows"])
    ]


def drawn(kind: str, count: int = 7, seed: int = 0) -> list[Example]:
    """Random rows of uneven lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(250, (length,), generator=generator).tolist()

    made = []
    for row in range(count):
        prompt = ids(2, 9)
        texts = [example(prompt, ids(1, 14), f"r:{row}") for _ in range(2)]
        if kind == "kto":
            made.append(replace(texts[0], label=row % 3 != 0))
        else:
            made.append(pair(*texts))
    return made
