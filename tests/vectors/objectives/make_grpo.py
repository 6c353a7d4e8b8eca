"""What TRL's GRPOTrainer makes of fixed completions and rewards: advantages, loss and gradient, over a tiny model.

    python tests/vectors/objectives/make_grpo.py     # writes grpo.json beside this file; needs trl, and this package

The trainer is a real one. Only its generation and its reward functions are exchanged for fixed completions and rewards;
it pads, masks, takes advantages, old and reference log-probabilities, and computes the loss as it does in training.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GROUP, LONGEST, MOVED = 4, 8, 1.3
"""Completions to a prompt; tokens of the longest; what B is multiplied by between sampling and a later update."""
WEIGHTS = [1.0, 0.25]
PLAIN: dict[str, Any] = {
    "loss": "dapo", "beta": 0.0, "epsilon": 0.2, "epsilon_high": None, "scale_rewards": "group", "iterations": 1,
    "mask_truncated_completions": False, "use_bias_correction_kl": True, "temperature": 1.0,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "dapo": {},
    "grpo": {"loss": "grpo"},
    "dr_grpo": {"loss": "dr_grpo", "scale_rewards": "none"},
    "grpo with kl": {"loss": "grpo", "beta": 0.3},
    "dapo with plain kl": {"beta": 0.3, "use_bias_correction_kl": False},
    "dapo again": {"iterations": 2, "epsilon": 0.05, "epsilon_high": 0.1},
    "grpo again with kl": {"loss": "grpo", "iterations": 2, "epsilon": 0.05, "beta": 0.3},
    "dr_grpo again": {"loss": "dr_grpo", "iterations": 2, "epsilon": 0.03, "scale_rewards": "batch"},
    "cut answers left out": {"mask_truncated_completions": True},
    "cut answers left out of grpo": {"mask_truncated_completions": True, "loss": "grpo", "beta": 0.3},
    "warm": {"temperature": 0.7, "loss": "grpo", "beta": 0.3},
}


def settings(kind: str) -> dict[str, Any]:
    return PLAIN | KINDS[kind]


def rows(end: int) -> list[dict[str, Any]]:
    """Prompts, each with a group of completions of several lengths; two are cut off; one group earns all the same."""
    made = []
    for prompt in range(3):
        ids = [(17 * prompt + 5 * place + 3) % 250 for place in range(3 + 2 * prompt)]
        answers, rewards = [], []
        for number in range(GROUP):
            cut = (prompt + number) % 5 == 4
            length = LONGEST if cut else 2 + (prompt + 2 * number) % 5
            answer = [(29 * prompt + 31 * number + 7 * place + 11) % 250 for place in range(length)]
            answers.append(answer if cut else [*answer[:-1], end])
            rewards.append([1.0, 1.0] if prompt == 2 else [float(number % 2), 0.5 * (number % 3)])
        made.append({"prompt": ids, "answers": answers, "rewards": rewards})
    return made


def older() -> Any:
    spec = importlib.util.spec_from_file_location("vectors_of_trl", HERE / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def move(model: Any) -> None:
    """A later update: B is another one than when the completions were sampled."""
    import torch

    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".lora_B" in name:
                value.mul_(MOVED)


def told(kind: str, folder: Path, wake: Any) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    asked = settings(kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = rows(tokenizer.eos_token_id)
    config = GRPOConfig(
        output_dir=str(folder / "out"), per_device_train_batch_size=3 * GROUP, num_generations=GROUP, bf16=False,
        max_completion_length=LONGEST, use_cpu=True, report_to=[], loss_type=asked["loss"], beta=asked["beta"],
        epsilon=asked["epsilon"], epsilon_high=asked["epsilon_high"], scale_rewards=asked["scale_rewards"],
        num_iterations=asked["iterations"], temperature=asked["temperature"], reward_weights=WEIGHTS,
        mask_truncated_completions=asked["mask_truncated_completions"], gradient_checkpointing=False,
        use_bias_correction_kl=asked["use_bias_correction_kl"],
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        reward_funcs=[lambda **_: [], lambda **_: []], args=config, processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 12),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )  # fmt: skip
    wake(trainer.model)
    trainer.model.train()
    prompts = [row["prompt"] for row in given for _ in range(GROUP)]
    answers = [answer for row in given for answer in row["answers"]]
    rewards = torch.tensor([each for row in given for each in row["rewards"]])
    trainer._generate = lambda _: (prompts, answers, None, ["" for _ in answers], None, {}, None, None)
    trainer._calculate_rewards = lambda *_: rewards
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._generate_and_score_completions([{"prompt": "a"}] * len(answers))
    if asked["iterations"] > 1:
        assert "old_per_token_logps" in inputs
        move(trainer.model)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    squares = sum(float((p.grad.double() ** 2).sum()) for p in trainer.model.parameters() if p.grad is not None)
    figures = {name: values[-1] for name, values in trainer._metrics["train"].items() if values}
    return {
        "loss": loss.item(), "gradient": math.sqrt(squares), "advantages": inputs["advantages"].tolist(),
        "figures": {name: figures[name] for name in ("reward", "kl", "clip_ratio/region_mean") if name in figures},
    }  # fmt: skip


def make() -> dict[str, Any]:
    from transformers import AutoTokenizer

    script = older()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "base"
        digest = script.base(folder)
        end = AutoTokenizer.from_pretrained(folder).eos_token_id
        found = {kind: told(kind, folder, script.wake) for kind in KINDS}
    names = ("trl", "torch", "transformers", "peft")
    return {
        "versions": {name: version(name) for name in names}, "base": digest, "end": end, "rows": rows(end),
        "told": found,
    }  # fmt: skip


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in make().items()]
    (HERE / "grpo.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
