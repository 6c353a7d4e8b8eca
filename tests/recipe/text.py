"""A good recipe to damage, and the faults that come of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import recipe
from finetune.errors import RecipeError

BASE = """\
model: Qwen/Qwen2.5-14B
quantize:
  weights: nf4
  double: true
adapter:
  method: lora
  r: 8
  lora_alpha: 16
data:
  train_path: train.jsonl
  eval_path: eval.jsonl
train:
  steps: 12
  examples_per_step: 8
  learning_rate: 2e-3
  schedule: linear
  warmup: 2
  max_length: 256
  seed: 7
evaluate:
  metrics: [loss, exact_match]
tracker: none
output: runs/tiny
"""


def faults_of(text: str | bytes, *overrides: str) -> list[str]:
    """The faults of a recipe text as whole lines; the file is called r.yaml."""
    Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        recipe.load(Path("r.yaml"), overrides)
    return [str(fault) for fault in caught.value.faults]
