"""What TRL's GKD says without on-policy samples: losses of fixed logits, and loss and gradient of a tiny model's batch.

    python tests/vectors/distill/make.py     # writes trl.json beside this file; needs trl, and finetune on the path

``generalized_jsd_loss`` and ``compute_loss`` of its trainer run as they are, the latter on a stand-in for the trainer.
 TRL's beta is 0 for KL(teacher || model) and 1 for KL(model || teacher). Its trainer keeps its temperature for
sampling and leaves that of the loss at 1: here the loss is given one.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CASES = {
    "forward_kl": (0.0, 1.0), "reverse_kl": (1.0, 1.0), "jsd": (0.5, 1.0), "forward_kl warm": (0.0, 2.0),
    "reverse_kl cool": (1.0, 0.7), "jsd uneven": (0.1, 0.9),
}  # fmt: skip
"""Name → TRL's beta, and the temperature."""


def other() -> ModuleType:
    """The script of the preference objectives' vectors: its base, its rows and how it wakes an adapter."""
    spec = importlib.util.spec_from_file_location("vectors_of_preferences", HERE.parent / "objectives" / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def logits(rows: int = 5, vocabulary: int = 11) -> dict[str, list[list[float]]]:
    """Student's and teacher's, made of sines so that no library draws them."""
    return {
        who: [[round(3 * math.sin(seed + 1.7 * row * vocabulary + 0.9 * at * at), 6) for at in range(vocabulary)]
              for row in range(rows)]
        for who, seed in (("student", 0.3), ("teacher", 1.1))
    }  # fmt: skip


def of_fixed() -> dict[str, list[float]]:
    """Each position's divergence by TRL."""
    import torch
    from trl.experimental.gkd import GKDTrainer

    given = {who: torch.tensor(value) for who, value in logits().items()}
    return {
        name: [
            float(GKDTrainer.generalized_jsd_loss(
                given["student"][None, at : at + 1], given["teacher"][None, at : at + 1], beta=beta, temperature=t,
                reduction="sum",
            ))
            for at in range(len(given["student"]))
        ]
        for name, (beta, t) in CASES.items()
    }  # fmt: skip


def of_model(folder: Path) -> dict[str, dict[str, float]]:
    """Mean loss of a padded batch and the 2-norm of the adapter's gradient; the teacher is the bare base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl.experimental.gkd import GKDTrainer

    made, told = other(), {}
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, (beta, t) in CASES.items():
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).train()
        made.wake(model)
        trainer = SimpleNamespace(
            teacher_model=teacher, beta=beta, temperature=t, use_liger_gkd_loss=False, use_liger_loss=False,
            generalized_jsd_loss=functools.partial(GKDTrainer.generalized_jsd_loss, temperature=t),
        )  # fmt: skip
        loss = GKDTrainer.compute_loss(trainer, model, batch(made.rows()))
        loss.backward()
        squares = sum(float((p.grad.double() ** 2).sum()) for p in model.parameters() if p.grad is not None)
        told[name] = {"loss": float(loss.detach()), "gradient": math.sqrt(squares)}
    return told


def batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The chosen answers of the pairs, each after its prompt of one token, padded on the right."""
    import torch

    texts = [row["prompt_ids"] + row["chosen_ids"] for row in rows]
    width = max(map(len, texts))
    ids, mask = torch.zeros(len(texts), width, dtype=torch.long), torch.zeros(len(texts), width)
    labels = torch.full((len(texts), width), -100)
    for at, (text, row) in enumerate(zip(texts, rows, strict=True)):
        ids[at, : len(text)], mask[at, : len(text)] = torch.tensor(text), 1
        labels[at, len(row["prompt_ids"]) : len(text)] = torch.tensor(row["chosen_ids"])
    prompts = torch.tensor([row["prompt_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels, "prompts": prompts}


def make() -> dict[str, Any]:
    made = other()
    with tempfile.TemporaryDirectory() as scratch:
        digest = made.base(Path(scratch) / "base")
        told = of_model(Path(scratch) / "base")
    names = ("trl", "torch", "transformers", "peft")
    return {
        "versions": {name: version(name) for name in names}, "base": digest, "fixed": logits() | {"losses": of_fixed()},
        "rows": made.rows(), "model": told,
    }  # fmt: skip


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(ROOT))
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in make().items()]
    (HERE / "trl.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
