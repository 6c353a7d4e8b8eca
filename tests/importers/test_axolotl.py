"""axolotl's settings, and its defaults as its package says them."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import importers
from tests.importers import facts
from tests.importers.conftest import Imported, plan, rows
from tests.runs import finetune

BARE = """\
base_model: base
adapter: lora
lora_r: 8
lora_alpha: 16
lora_target_linear: true
learning_rate: 1e-4
micro_batch_size: 2
gradient_accumulation_steps: 2
datasets:
  - path: train.jsonl
    type: chat_template
"""


def bare(text: str, *arguments: str, cut: str = "") -> Imported:
    Path("c.yaml").write_text(BARE.replace(cut, "") + text)
    return Imported("c.yaml", *arguments)


def test_the_example_has_the_same_meaning(place: Path) -> None:
    found = Imported("axolotl.yaml")
    assert found.json["trainer"] == "axolotl"
    expected = {
        "model": "base", "quantize.weights": "nf4", "adapter.r": 16, "adapter.lora_alpha": 32,
        "adapter.lora_dropout": 0.1, "adapter.target_modules": "all-linear", "train.max_length": 256,
        "data.over_length": "drop", "train.epochs": 10, "train.examples_per_step": 2, "train.learning_rate": 3e-4,
        "train.schedule": "cosine", "train.weight_decay": 0.01, "train.optimizer": "paged_adamw_8bit",
        "data.eval_fraction": 0.2, "train.warmup": 3, "train.save_every": 5, "evaluate.every": 10,
        "train.keep_last": 4, "train.seed": 42, "tracker": "wandb", "data.train_on": "assistant",
    }  # fmt: skip
    assert {key: found.values[key] for key in expected} == expected
    assert found.recipe is not None
    assert found.recipe.quantize.double
    assert plan()["steps"] == 100  # 20 of 25 rows, ten times, two a step


def test_slips_that_are_dropped_without_a_word_are_said(place: Path) -> None:
    found = Imported("axolotl.yaml")
    assert "did you mean 'gradient_accumulation_steps'?" in found.about("gradient_acumulation_steps")
    assert "did you mean 'field_messages'?" in found.about("datasets")


def test_defaults_are_those_of_its_package() -> None:
    schemas = facts.source("axolotl") / "utils" / "schemas"
    training = facts.defaults(schemas / "training.py", "HyperparametersConfig")
    config, peft = facts.defaults(schemas / "config.py", "AxolotlInputConfig"), facts.defaults(schemas / "peft.py")
    read = {
        "micro_batch_size": 1, "gradient_accumulation_steps": 1, "num_epochs": 1.0, "lr_scheduler": "cosine",
        "optimizer": "adamw_torch_fused", "weight_decay": 0.0, "train_on_inputs": False, "max_grad_norm": None,
    }  # fmt: skip
    assert {key: training[key] for key in read} == read
    read = {"sequence_len": 512, "val_set_size": 0.0, "excess_length_strategy": None, "bf16": "auto", "strict": False}
    assert {key: config[key] for key in read} == read
    assert (peft["lora_dropout"], peft["lora_r"], peft["lora_alpha"]) == (0.0, None, None)
    builders = (schemas.parents[1] / "core" / "builders" / "base.py").read_text(encoding="utf-8")
    assert "min(int(0.03 * total_num_steps), 100)" in builders
    assert '"save_strategy"] = "epoch"' in builders


def test_the_known_keys_are_its_packages() -> None:
    schemas = facts.source("axolotl") / "utils" / "schemas"
    known = set(importers.known("axolotl"))
    for file, names in {
        "training.py": ["HyperparametersConfig", "JaggedLRConfig"], "config.py": ["AxolotlInputConfig"],
        "peft.py": ["LoraConfig"], "model.py": ["ModelInputConfig", "ModelOutputConfig"],
        "integrations.py": ["WandbConfig", "MLFlowConfig"],
    }.items():  # fmt: skip
        assert set(facts.defaults(schemas / file, *names)) - known == set()
    sets = facts.defaults(schemas / "datasets.py", "SFTDataset", "DPODataset", "KTODataset")
    assert set(sets) == set(importers.known("axolotl.datasets"))


@pytest.mark.parametrize(
    ("rows_here", "text", "warmup"),
    [
        (25, "num_epochs: 1\n", 0),  # 7 steps, 3 % of them
        (100, "num_epochs: 2\n", 2),  # 50 steps: 1 becomes 2
        (100, "num_epochs: 400\n", 100),  # never more than 100
        (25, "warmup_ratio: 0.5\n", 3),
        (25, "warmup_steps: 1\n", 2),
        (25, "warmup_steps: 5\nlr_scheduler: constant\n", 0),
        (25, "warmup_steps: 5\nlr_scheduler: constant_with_warmup\n", 5),
    ],
)
def test_warm_up_is_its_own_arithmetic(place: Path, rows_here: int, text: str, warmup: int) -> None:
    rows(Path("train.jsonl"), rows_here)
    assert bare(text).values["train.warmup"] == warmup


def test_saves_and_evaluations_in_parts_of_a_pass(place: Path) -> None:
    assert bare("num_epochs: 2\n").values["train.save_every"] == 7
    Path("recipe.yaml").unlink()
    found = bare("num_epochs: 2\nval_set_size: 5\nevals_per_epoch: 2\nsave_steps: 0.5\n")
    assert (found.values["data.eval_fraction"], found.values["evaluate.every"]) == (0.2, 3)
    assert found.values["train.save_every"] == 5
    assert plan()["steps"] == 10


def test_devices_and_packs(place: Path) -> None:
    found = bare("sample_packing: true\nsequence_len: 128\nmax_steps: 4\nwarmup_steps: 2\n", "--devices", "2")
    assert found.values["train.tokens_per_step"] == 2 * 2 * 2 * 128
    assert "packs of 128 tokens" in found.about("micro_batch_size")
    assert "average_tokens_across_devices" in found.about("micro_batch_size")


@pytest.mark.parametrize(
    ("kind", "format_name", "columns"),
    [
        ("type: alpaca", "alpaca", {}),
        ("type: completion\n    field: body", "text", {"text": "body"}),
        ("type: chat_template\n    field_messages: dialog", "chat", {"messages": "dialog"}),
        ("type: chat_template\n    field_messages: conversations", "sharegpt", {}),
        ("type: sharegpt", "sharegpt", {}),
        ("type:\n      field_instruction: q\n      field_output: a", "alpaca", {"instruction": "q", "output": "a"}),
        ("type: input_output", "auto", {}),
    ],
)
def test_declared_types_become_formats(place: Path, kind: str, format_name: str, columns: dict[str, str]) -> None:
    Path("c.yaml").write_text(BARE.replace("type: chat_template", kind))
    found = Imported("c.yaml")
    assert found.recipe is not None
    assert (found.recipe.data.format, found.recipe.data.columns) == (format_name, columns)
    if format_name in ("alpaca", "text", "auto"):
        assert found.about("datasets") or found.about("datasets", "lost")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("rl: grpo\n", "rl: grpo is not taken over: its rewards are Python functions"),
        ("rl: dpo\nsample_packing: true\n", "sample_packing: does not go with rl: dpo there"),
        ("load_in_4bit: true\nload_in_8bit: true\n", "cannot be true beside load_in_4bit"),
        ("val_set_size: 0.1\ntest_datasets:\n  - path: more.jsonl\n", "cannot be given together with test_datasets"),
        ("val_set_size: 25\n", "val_set_size: holds out all 25 rows"),
        ("saves_per_epoch: 2\nsave_steps: 5\n", "cannot be given together with save_steps"),
        ("lora_dropout: 1.5\n", "lora_dropout (here adapter.lora_dropout): must be"),
    ],
)
def test_contradictions_are_refused(place: Path, text: str, what: str) -> None:
    rows(Path("more.jsonl"), 3)
    Path("c.yaml").write_text(BARE + text)
    said = finetune("import", "c.yaml")
    assert (said.code, what in said.err) == (2, True), said.err
    assert not Path("recipe.yaml").exists()


@pytest.mark.parametrize("line", ["adapter: lora\n", "lora_r: 8\n", "lora_alpha: 16\n", "learning_rate: 1e-4\n"])
def test_what_it_has_no_default_for_must_be_there(place: Path, line: str) -> None:
    Path("c.yaml").write_text(BARE.replace(line, ""))
    said = finetune("import", "c.yaml")
    assert said.code == 2
    assert line.split(":")[0] in said.err


def test_the_best_step_and_an_early_end(place: Path) -> None:
    text = "num_epochs: 2\nval_set_size: 5\neval_steps: 2\nsave_steps: 4\n"
    found = bare(f"{text}load_best_model_at_end: true\nearly_stopping_patience: 3\nmetric_for_best_model: eval_f1\n")
    assert (found.values["evaluate.keep"], found.values["evaluate.early_stopping_patience"]) == ("best", 3)
    assert "eval_f1" in found.about("metric_for_best_model", "lost")
    plan()
    Path("recipe.yaml").unlink()
    without = Imported("c.yaml") if Path("c.yaml").write_text(BARE + "load_best_model_at_end: true\n") else None
    assert without is not None
    assert "evaluate.every" in without.about("load_best_model_at_end", "lost")
