"""TRL's SFTTrainer and transformers' Trainer, both with PEFT: what one writes after reading their documentation.

``trl``         SFTTrainer at its defaults (padded, activations recomputed).
``trl-best``    SFTTrainer with ``padding_free`` and without gradient checkpointing.
``trl-packed``  SFTTrainer with ``packing`` (its rows are dealt anew) and without gradient checkpointing.
``hf``          Trainer over a padded batch, without gradient checkpointing.

TRL turns the adapter of a quantised base to bf16, Trainer leaves PEFT's fp32: both are left as they are.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from benchmarks.contestants.job import Job, Watch, load_plain, refuse_repacked


class SameRates:
    """Mixed into a Trainer: the recipe's learning rate of every step, since transformers counts warm-up from zero."""

    rates: list[float]

    def create_scheduler(self: Any, num_training_steps: int, optimizer: Any = None) -> Any:
        peak = self.args.learning_rate
        rates = [rate / peak for rate in self.rates]
        # The last call comes after the last step and asks for a rate that nothing uses.
        self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda step: rates[min(step, len(rates) - 1)])
        return self.lr_scheduler


class Laps(TrainerCallback):  # type: ignore[misc]  # transformers gives no types here
    """Reads the watch after every step."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.watch.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.watch.lap()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs:
            self.watch.losses.append(logs["loss"])


def _shared(job: Job, folder: str) -> dict[str, Any]:
    """What the recipe fixes for everyone, in transformers' words."""
    return {
        "output_dir": folder, "per_device_train_batch_size": len(job.steps[0]), "gradient_accumulation_steps": 1,
        "max_steps": len(job.steps), "learning_rate": max(job.rates), "weight_decay": 0.0,
        "max_grad_norm": job.max_grad_norm, "bf16": job.compute == "bf16", "use_cpu": not torch.cuda.is_available(),
        "seed": job.seed, "train_sampling_strategy": "sequential", "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip


def _rows(job: Job, *, masked: bool) -> Dataset:
    samples = [sample for step in job.steps for sample in step]
    rows = [{"input_ids": sample["ids"], "labels": sample["labels"]} for sample in samples]
    return Dataset.from_list(
        [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows] if masked else rows
    )


WINDOW = 1024
"""TRL's own default of a packed row's length."""
OPTIONS: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl-best": {"padding_free": True, "max_length": None, "gradient_checkpointing": False},
    "trl-packed": {"packing": True, "max_length": WINDOW, "gradient_checkpointing": False},
}


def trl_trainer(job: Job, folder: str, watch: Watch, name: str) -> Trainer:
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]  # exported lazily

    class Sft(SameRates, SFTTrainer):
        rates = job.rates

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if name == "trl-packed":
                watch.tokens.append(int(inputs["input_ids"].numel()))
            return super().training_step(model, inputs, *args, **kwargs)

    shared = _shared(job, folder)
    if name == "trl-packed":  # as many packed rows in a step as hold about the same tokens
        tokens = sum(len(sample["ids"]) for step in job.steps for sample in step)
        shared["per_device_train_batch_size"] = max(1, round(tokens / len(job.steps) / WINDOW))
    torch.manual_seed(job.seed)
    return Sft(
        model=load_plain(job),
        args=SFTConfig(**shared, **OPTIONS[name]),
        train_dataset=_rows(job, masked=False),
        processing_class=AutoTokenizer.from_pretrained(job.base, local_files_only=True),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **job.lora),
        callbacks=[Laps(watch)],
    )


def hf_trainer(job: Job, folder: str, watch: Watch) -> Trainer:
    class Plain(SameRates, Trainer):  # type: ignore[misc]
        rates = job.rates

    tokenizer = AutoTokenizer.from_pretrained(job.base, local_files_only=True)
    base = load_plain(job)
    torch.manual_seed(job.seed)
    return Plain(
        model=get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **job.lora)),
        args=TrainingArguments(**_shared(job, folder), gradient_checkpointing=False),
        train_dataset=_rows(job, masked=True),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        callbacks=[Laps(watch)],
    )


def main(name: str, job: Job) -> None:
    watch = Watch(job.skip, job.turns)
    with tempfile.TemporaryDirectory() as folder:
        trainer = hf_trainer(job, folder, watch) if name == "hf" else trl_trainer(job, folder, watch, name)
        trainer.train()
    refuse_repacked(trainer.model)
    adapters = {str(value.dtype) for value in trainer.model.parameters() if value.requires_grad}
    watch.finish(job, recompute=trainer.args.gradient_checkpointing, adapter_dtype=sorted(adapters))


if __name__ == "__main__":
    main(sys.argv[2], Job.read(sys.argv[1]))
