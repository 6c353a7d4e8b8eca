"""What is trained in the step benchmark: four cases, each an ordinary recipe over a base and rows that are made here.

Lengths of the made rows follow the chat set of published comparisons: lognormal, 50 to 800 tokens, half supervised.
"""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contestants import made_rows

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "data" / "bases"
MEDIAN, SPREAD, SHORTEST, LONGEST = 208, 0.78, 50, 800
"""A row's tokens: median and sigma of a lognormal distribution, and its bounds. The mean is about 280."""
ROWS = 512
_FRAME = 30
"""Tokens that the template and its default system prompt add to a row."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """``recipe``: a file; ``overrides``: what is set beside it. ``weights``: the form of the frozen base."""

    name: str
    title: str
    recipe: Path
    weights: str
    overrides: tuple[str, ...] = ()


# 50 M parameters in the blocks under a vocabulary of 4k, and 9 M under Qwen's own of 152k, tied as in its small models.
_SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "vocab_size": 4096, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8,
        "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64,
    },
    "large": {
        "vocab_size": 151_936, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64,
    },
}  # fmt: skip
_TITLES = {
    "small": "53 M parameters, 4k vocabulary, chat lengths, bf16 base",
    "large": "68 M parameters, 152k vocabulary, chat lengths, bf16 base",
    "real": "SmolLM2-135M, dates in many languages, NF4 base",
    "text": "SmolLM2-135M, passages of Python's documentation as chats, NF4 base",
}
_EXAMPLES = {"small": 8, "large": 4, "real": 24, "text": 8}
"""Rows of one optimizer step."""
NAMES = tuple(_TITLES)


def make(name: str) -> Case:
    """The case of that name, its base and rows made where they are not there yet."""
    if name == "real":
        return Case(name=name, title=_TITLES[name], recipe=ROOT / "recipes" / "quickstart.yaml", weights="nf4")
    folder = FOLDER / f"bench-{name}"
    weights, base = ("nf4", FOLDER / "smollm2-135m-instruct") if name == "text" else ("bf16", folder / "base")
    if not (folder / "recipe.yaml").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if name in _SHAPES:
            _tiny_base().build(base, family="llama", tie_word_embeddings=True, max_position_embeddings=1024,
                               **_SHAPES[name])  # fmt: skip
            _chat_rows(folder / "rows.jsonl", base)
        else:
            made_rows.make(folder / "rows.jsonl", ROWS, seed=1)
        (folder / "recipe.yaml").write_text(_recipe(name, base, folder / "rows.jsonl"))
    return Case(name=name, title=_TITLES[name], recipe=folder / "recipe.yaml", weights=weights)


def _tiny_base() -> Any:
    spec = importlib.util.spec_from_file_location("make_tiny_base", ROOT / "data" / "make_tiny_base.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _chat_rows(path: Path, base: Path) -> None:
    """Rows of one exchange whose lengths in this base's tokens are drawn from the distribution, half of them answer."""
    from transformers import AutoTokenizer

    reads, chance = AutoTokenizer.from_pretrained(base, local_files_only=True), random.Random(20_251)
    ids = reads("\n".join(made_rows.passages()), add_special_tokens=False)["input_ids"]
    rows = []
    for _ in range(ROWS):
        length = min(LONGEST, max(SHORTEST, round(MEDIAN * chance.lognormvariate(0, SPREAD)))) - _FRAME
        answer = round(0.49 * (length + _FRAME))
        rows.append({"messages": [
            {"role": "user", "content": _cut(reads, ids, max(4, length - answer), chance)},
            {"role": "assistant", "content": _cut(reads, ids, answer, chance)},
        ]})  # fmt: skip
    made_rows.write(path, rows)


def _cut(reads: Any, ids: Sequence[int], length: int, chance: random.Random) -> str:
    start = chance.randrange(len(ids) - length)
    return str(reads.decode(ids[start : start + length])).strip() or "a"


def _recipe(name: str, base: Path, rows: Path) -> str:
    tree = {
        "model": str(base.relative_to(ROOT)),
        "quantize": {"weights": "nf4" if name == "text" else "bf16"},
        "adapter": {"method": "lora", "r": 16, "lora_alpha": 32},
        "data": {"train_path": str(rows.relative_to(ROOT)), "over_length": "drop"},
        "train": {
            "steps": 60, "examples_per_step": _EXAMPLES[name], "learning_rate": 2e-4, "schedule": "linear",
            "warmup": 3, "max_length": 1024, "seed": 7,
        },
        "tracker": "none", "output": f"runs/bench-{name}",
    }  # fmt: skip
    return json.dumps(tree, indent=1) + "\n"
