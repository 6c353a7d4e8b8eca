"""What TRL's own trainers say: losses of fixed log-probabilities, and losses and gradients of a tiny model's batch.

    python tests/vectors/objectives/make.py     # writes trl.json beside this file; needs trl, and finetune on the path

The functions of TRL's trainers run as they are, on a stand-in that holds the settings that they read; no dataset, no
optimizer and no collator of theirs is needed for that but KTO's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
BETA, GAMMA, SMOOTHING = 0.3, 0.6, 0.2
REWARD = {"plain": {}, "margin": {"margin": 0.4}, "centred": {"margin": 0.4, "centre": 0.1}}
WEIGHTS = {"desirable_weight": 1.2, "undesirable_weight": 0.7}
DPO = {
    "sigmoid": {"loss": "sigmoid"},
    "sigmoid normalised": {"loss": "sigmoid_norm"},
    "ipo": {"loss": "ipo"},
    "hinge": {"loss": "hinge"},
    "robust": {"loss": "robust"},
}


def rows() -> list[dict[str, Any]]:
    """Prompts and answers of several lengths as ids; every chosen answer has five tokens, so that a mean over tokens is
    a mean over pairs (TRL's ORPO takes the former); one token of prompt, which its loss would train otherwise."""
    made = []
    for index in range(4):
        prompt = [3 + index]
        chosen = [(7 * index + 5 * place + 11) % 250 for place in range(5)]
        rejected = [(13 * index + 3 * place + 40) % 250 for place in range(3 + index)]
        made.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    return made


def labelled() -> list[dict[str, Any]]:
    """Rows with a label; TRL's mismatched answers are those of the row before, as its dataset step makes them."""
    made = []
    for index in range(5):
        prompt = [(17 * index + place) % 250 for place in range(4 + index)]
        answer = [(40 * index + 7 * place + 85) % 250 for place in range(3 + index % 3)]
        made.append({"prompt_ids": prompt, "completion_ids": answer, "label": index % 2 == 0})
    for index, row in enumerate(made):
        row["KL_completion_ids"] = made[index - 1]["completion_ids"]
    return made


def fixed() -> dict[str, list[list[float]]]:
    """Per pair: log-probabilities of both texts by the model and by the reference, and their numbers of tokens."""
    found = [[-4.0 - 1.3 * i, -9.5 + 2.1 * i] for i in range(5)]
    origin = [[-4.6 - 1.1 * i, -8.0 + 1.4 * i] for i in range(5)]
    sizes = [[5.0, 7.0], [6.0, 4.0], [3.0, 3.0], [9.0, 2.0], [4.0, 8.0]]
    return {"found": found, "origin": origin, "sizes": sizes}


def _stand_in(**settings: Any) -> SimpleNamespace:
    import torch

    same = lambda value: value  # noqa: E731 - one process: gathering is nothing
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=same, gather_for_metrics=same, unwrap_model=same)
    plain = {
        "accelerator": accelerator, "args": SimpleNamespace(gradient_checkpointing_kwargs=None), "ld_alpha": None,
        "aux_loss_enabled": False, "f_divergence_type": "reverse_kl", "use_weighting": False, "ref_model": None,
        "precompute_ref_logps": False, "loss_weights": [1.0], "_total_train_tokens": 0, "_tp_size": 1, "alpha": 0.0,
        "_metrics": {"train": defaultdict(list), "eval": defaultdict(list)}, "model": SimpleNamespace(training=True),
        "is_encoder_decoder": False, "pad_token_id": 0, "padding_value": 0, "label_smoothing": 0.0, "beta": BETA,
    }  # fmt: skip
    return SimpleNamespace(**(plain | settings))


def of_fixed() -> dict[str, list[float]]:
    """Each pair's loss by TRL, from the fixed log-probabilities; smoothing where only the reference knows it: none."""
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    values = {name: torch.tensor(value) for name, value in fixed().items()}
    found, means = values["found"], values["found"] / values["sizes"]
    told = {f"dpo {name}": _dpo_fixed(values, settings["loss"]) for name, settings in DPO.items()}
    cpo = _stand_in(loss_type="simpo", simpo_gamma=GAMMA)
    told["simpo"] = CPOTrainer.cpo_loss(cpo, means[:, 0], means[:, 1])[0].tolist()
    smoothed = _stand_in(loss_type="sigmoid", label_smoothing=SMOOTHING)
    ratios = found - values["origin"]
    told["dpo smoothed"] = CPOTrainer.cpo_loss(smoothed, ratios[:, 0], ratios[:, 1])[0].tolist()
    odds = ORPOTrainer.odds_ratio_loss(_stand_in(), means[:, 0], means[:, 1])[0]
    told["orpo"] = (-means[:, 0] - odds).tolist()
    return told


def _dpo_fixed(values: dict[str, Any], loss: str) -> list[float]:
    """TRL's DPO, a pair at a time: it tells the mean alone."""
    import torch
    from trl import DPOTrainer

    each = []
    for found, origin, sizes in zip(values["found"], values["origin"], values["sizes"], strict=True):
        width = int(sizes.max()) + 1
        mask = torch.zeros(2, width, dtype=torch.long)
        for side in (0, 1):
            mask[side, 1 : 1 + int(sizes[side])] = 1
        per_token = mask[:, 1:] * (found / sizes)[:, None]
        zeros = torch.zeros_like(per_token)
        said = SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        trainer = _stand_in(loss_types=[loss], label_smoothing=SMOOTHING, precompute_ref_logps=True)
        inputs = {
            "input_ids": mask, "attention_mask": mask, "completion_mask": mask, "ref_chosen_logps": origin[:1],
            "ref_rejected_logps": origin[1:],
        }  # fmt: skip
        each.append(float(DPOTrainer._compute_loss(trainer, lambda said=said, **_: said, inputs, False)))
    return each


def wake(model: Any) -> None:
    """Give every matrix of the adapter values that its name decides."""
    import torch

    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            if ".lora_" in name or ".modules_to_save." in name:
                seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)) * 0.1)


def base(folder: Path) -> str:
    """The tests' tiny base, made into ``folder``; the digest of its weights."""
    spec = importlib.util.spec_from_file_location("make_tiny_base", ROOT / "data" / "make_tiny_base.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.build(folder)
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def of_model(folder: Path) -> dict[str, dict[str, float]]:
    """Mean loss of a batch and the 2-norm of the adapter's gradient, by TRL's trainers over the tiny base in fp32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl import DPOTrainer, KTOTrainer
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
    from trl.trainer.utils import add_fused_lm_head

    outputs = ("log_probs", "entropy", "mean_logits", "is_top1")
    told: dict[str, dict[str, float]] = {}

    def fresh(fused: bool) -> Any:
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model = get_peft_model(plain, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        wake(model)
        if fused:
            add_fused_lm_head(model.get_base_model(), outputs=outputs)
        return model.train()

    def note(name: str, model: Any, loss: Any) -> None:
        loss.backward()
        squares = sum(float((p.grad.double() ** 2).sum()) for p in model.parameters() if p.grad is not None)
        told[name] = {"loss": float(loss), "gradient": math.sqrt(squares)}

    batch = DataCollatorForPreference(pad_token_id=0)(rows())
    for name, settings in DPO.items():
        model = fresh(True)
        trainer = _stand_in(loss_types=[settings["loss"]], label_smoothing=SMOOTHING, model=model)
        note(f"dpo {name}", model, DPOTrainer._compute_loss(trainer, model, dict(batch), False))
    model = fresh(True)
    trainer = _stand_in(loss_type="kto", calculate_KL=True, model=model, **WEIGHTS)
    trainer._compute_kl_logps = lambda who, inputs: KTOTrainer._compute_kl_logps(trainer, who, inputs)
    unpaired = DataCollatorForUnpairedPreference(pad_token_id=0)(labelled())
    note("kto", model, KTOTrainer._compute_loss(trainer, model, unpaired, False))
    told["kto"]["kl"] = trainer._metrics["train"]["kl"][0]
    older = _older(rows())
    for name, kind, settings in (
        ("orpo", ORPOTrainer, {}),
        ("simpo", CPOTrainer, {"loss_type": "simpo", "simpo_gamma": GAMMA, "cpo_alpha": 0.0}),
    ):
        model = fresh(False)
        trainer = _stand_in(model=model, **settings)
        for method in ("concatenated_forward", "odds_ratio_loss", "cpo_loss"):
            if hasattr(kind, method):
                setattr(trainer, method, getattr(kind, method).__get__(trainer))
        trainer.concatenated_inputs, trainer.get_batch_logps = kind.concatenated_inputs, kind.get_batch_logps
        note(name, model, kind.get_batch_loss_metrics(trainer, model, older)[0])
    return told


def of_reward(folder: Path) -> dict[str, dict[str, float]]:
    """The same by TRL's RewardTrainer, over the tiny base with a score head, with its own figures."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification
    from trl import RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    told = {}
    for name, settings in REWARD.items():
        # No id of its texts: where padding is a token that they end with, the reward is read before it.
        plain = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32, pad_token_id=300
        )
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        asked = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="SEQ_CLS")
        model = get_peft_model(plain, asked)
        wake(model)
        pairs = [
            {side: pair["prompt_ids"] + pair[side] for side in ("chosen_ids", "rejected_ids")}
            | ({"margin": settings["margin"]} if "margin" in settings else {})
            for pair in rows()
        ]
        batch = DataCollatorForPreference(pad_token_id=300)(pairs)
        trainer = _stand_in(model=model, args=SimpleNamespace(center_rewards_coefficient=settings.get("centre")))
        loss = RewardTrainer.compute_loss(trainer, model.train(), batch)
        loss.backward()
        squares = sum(float((p.grad.double() ** 2).sum()) for p in model.parameters() if p.grad is not None)
        said = {key: trainer._metrics["train"][key][0] for key in ("accuracy", "margin", "mean_reward")}
        told[name] = {"loss": float(loss.detach()), "gradient": math.sqrt(squares), **said}
    return told


def _older(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch of TRL's older trainers: ids, mask and labels of either text."""
    import torch

    found = {}
    for side in ("chosen", "rejected"):
        texts = [pair["prompt_ids"] + pair[f"{side}_ids"] for pair in pairs]
        width = max(map(len, texts))
        for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            values = torch.full((len(texts), width), fill)
            for row, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
                cut = len(pair["prompt_ids"])
                said = {"input_ids": text, "attention_mask": [1] * len(text), "labels": [-100] * cut + text[cut:]}
                values[row, : len(text)] = torch.tensor(said[name])
            found[f"{side}_{name}"] = values
    return found


def make() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        digest = base(Path(scratch) / "base")
        told = of_model(Path(scratch) / "base")
        scored = of_reward(Path(scratch) / "base")
    names = ("trl", "torch", "transformers", "peft")
    return {
        "versions": {name: version(name) for name in names}, "settings": {
            "beta": BETA, "gamma": GAMMA, "label_smoothing": SMOOTHING, **WEIGHTS,
        }, "base": digest, "fixed": fixed() | {"losses": of_fixed()}, "rows": rows(), "labelled": labelled(),
        "model": told, "reward": scored,
    }  # fmt: skip


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.path.insert(0, str(ROOT))
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in make().items()]
    (HERE / "trl.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
