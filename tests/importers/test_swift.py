"""ms-swift's settings, as a script and as a file, and its defaults as its package says them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune import importers
from tests.importers import facts
from tests.importers.conftest import Imported, plan
from tests.runs import finetune


def test_the_script_has_the_same_meaning(place: Path) -> None:
    found = Imported("swift.sh")
    assert found.json["trainer"] == "swift"
    expected = {
        "model": "base", "quantize.weights": "bf16", "adapter.r": 8, "adapter.lora_alpha": 16,
        "adapter.lora_dropout": 0.05, "adapter.target_modules": "all-linear", "train.max_length": 512,
        "train.epochs": 4, "train.examples_per_step": 4, "train.learning_rate": 1e-4, "train.schedule": "cosine",
        "train.weight_decay": 0.1, "data.eval_fraction": 0.2, "train.warmup": 5, "train.save_every": 10,
        "evaluate.every": 10, "train.keep_last": 2, "train.seed": 42, "tracker": "none",
        "data.train_path": "train.jsonl", "output": "output",
    }  # fmt: skip
    assert {key: found.values[key] for key in expected} == expected
    assert "#500" in found.about("dataset", "lost")
    assert "0.95" in found.about("adam_beta2", "lost")
    assert "their beginning" in found.about("truncation_strategy")
    assert "ModelScope" in found.about("use_hf")
    assert "tuner_type" in found.about("train_type")
    assert plan()["steps"] == 20  # 20 of 25 rows, four times, four a step (two cards with two)


def test_the_file_says_the_same_as_the_script(place: Path) -> None:
    script = Imported("swift.sh").values
    Path("recipe.yaml").unlink()
    values = {
        "model": "base", "tuner_type": "lora", "dataset": ["train.jsonl"], "split_dataset_ratio": 0.2,
        "torch_dtype": "bfloat16", "num_train_epochs": 4, "per_device_train_batch_size": 2, "lora_rank": 8,
        "lora_alpha": 16, "target_modules": ["all-linear"], "gradient_accumulation_steps": 1, "eval_steps": 10,
        "save_steps": 10, "save_total_limit": 2, "max_length": 512, "truncation_strategy": "left",
        "output_dir": "output", "warmup_ratio": 0.25,
    }  # fmt: skip
    Path("c.json").write_text(json.dumps(values))
    assert Imported("c.json", "--devices", "2").values == script


def test_defaults_are_those_of_its_package() -> None:
    swift = facts.source("swift")
    base = facts.defaults(swift / "trainers" / "arguments.py", "TrainArgumentsMixin")
    read = {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": None, "weight_decay": 0.1,
        "adam_beta2": 0.95, "lr_scheduler_type": "cosine", "warmup_ratio": 0.0,
    }  # fmt: skip
    assert {key: base[key] for key in read} == read
    tuner = facts.defaults(swift / "arguments" / "tuner_args.py", "TunerArguments")
    assert (tuner["lora_rank"], tuner["lora_alpha"], tuner["lora_dropout"]) == (8, 32.0, 0.05)
    text = facts.defaults(swift / "arguments" / "base_args" / "template_args.py", "TemplateArguments")
    assert (text["max_length"], text["truncation_strategy"], text["loss_scale"]) == (None, None, "default")
    assert facts.defaults(swift / "arguments" / "base_args" / "data_args.py")["split_dataset_ratio"] == 0.0
    source = (swift / "trainers" / "arguments.py").read_text(encoding="utf-8")
    assert "math.ceil(16 / self.per_device_train_batch_size / world_size)" in source
    template = (swift / "arguments" / "base_args" / "template_args.py").read_text(encoding="utf-8")
    assert "self.truncation_strategy = 'delete'" in template


def test_the_known_keys_are_its_packages() -> None:
    swift = facts.source("swift")
    known = set(importers.known("swift"))
    files = [swift / "arguments" / name for name in ("sft_args.py", "tuner_args.py", "rlhf_args.py")]
    files += [swift / "arguments" / "base_args" / f"{part}_args.py" for part in ("model", "data", "template", "quant")]
    for file in files:
        assert set(facts.defaults(file)) - known == set()


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {"train.examples_per_step": 16, "train.max_length": 1024, "data.over_length": "drop"}),
        ("quant_method: bnb\nquant_bits: 4\n", {"quantize.weights": "nf4"}),
        ("quant_bits: 4\n", {"quantize.weights": "bf16"}),
        ("loss_scale: last_round\n", {"data.train_on": "last"}),
        ("loss_scale: all+ignore_empty_think\n", {"data.train_on": "all"}),
        ("truncation_strategy: split\nmax_length: 64\n", {"data.over_length": "split"}),
        ("split_dataset_ratio: 0.2\nsave_steps: 7\n", {"evaluate.every": 7}),
        ("torch_dtype: float16\n", {"quantize.compute": "fp16", "quantize.weights": "fp16"}),
    ],
)
def test_words_of_a_file(place: Path, text: str, values: dict[str, object]) -> None:
    Path("c.yaml").write_text("model: base\ndataset: train.jsonl\ntuner_type: lora\nlora_rank: 8\n" + text)
    found = Imported("c.yaml")
    assert {key: found.values[key] for key in values} == values


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("swift rlhf --rlhf_type gkd --model base --dataset x", "rlhf_type: gkd is not taken over: its model learns"),
        ("swift rlhf --rlhf_type dop --model base --dataset x", "rlhf_type: dop is no method that is known here"),
        ("swift sft --model base --dataset x --tuner_type full", "full trains what is no LoRA"),
        ("swift sft --model $HOME/base --dataset x", "only a shell knows what $HOME"),
        ("swift sft --model base --dataset $(ls)", "only a shell knows what $("),
        ("swift sft --model base --dataset `ls`", "only a shell knows what `ls`"),
        ("swift sft --model base --dataset x --quant_method bnb --quant_bits 5", "5 bits have no format here"),
        ("swift sft args.yaml", "name it: finetune import args.yaml"),
        ("swift infer --model base", "has no training command"),
        ("swift sft --model a\nswift sft --model b", "trains more than once (lines 2, 3)"),
        ("swift sft --model 'a", "is never closed"),
    ],
)
def test_scripts_that_are_refused(place: Path, line: str, what: str) -> None:
    Path("c.sh").write_text(f"#!/bin/sh\n{line}\n")
    said = finetune("import", "c.sh")
    assert (said.code, what in said.err) == (2, True), said.err
    assert not Path("recipe.yaml").exists()


def test_the_beginning_of_a_name_is_read_as_argparse_does(place: Path) -> None:
    Path("c.sh").write_text(
        "swift sft --model base --dataset train.jsonl --lora-ra 4 --max_length 64 --learning_rat 1e-3\n"
    )
    found = Imported("c.sh")
    assert found.values["adapter.r"] == 4
    assert found.values["train.learning_rate"] == 1e-3
