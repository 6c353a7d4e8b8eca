"""Settings of other engines: what the plan says is what these files say, and the engines' own parsers take them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from finetune import engines
from tests.runs import ENVIRONMENT, finetune

SETS = (
    "--set",
    "quantize.compute=bf16",
    "--set",
    "train.examples_per_step=12",
    "--set",
    "train.micro_batch_tokens=400",
)


def written(*words: str, code: int = 0, processes: int = 2) -> str:
    said = finetune("plan", "r.yaml", "--processes", str(processes), *SETS, *words)
    assert said.code == code, said.err
    return said.err


def test_accelerate_reads_the_settings_of_fsdp(work: Path) -> None:
    written("--set", "train.shard=fsdp", "--fsdp-config", "fsdp.yaml")
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    text = Path("fsdp.yaml").read_text()
    config = load_config_from_file("fsdp.yaml")
    assert (config.num_processes, config.mixed_precision, config.distributed_type) == (2, "bf16", "FSDP")
    parsed = launch_command_parser().parse_args(["--config_file", "fsdp.yaml", "train.py"])
    parsed, _, _ = _validate_launch_command(parsed)
    assert parsed.use_fsdp
    assert parsed.fsdp_version == 2
    assert parsed.fsdp_transformer_layer_cls_to_wrap == "Qwen2DecoderLayer"
    assert "bnb_4bit_quant_storage=torch.bfloat16" in text
    assert "--launch accelerate --launch-config" in text
    assert set(yaml.safe_load(text)["fsdp_config"]) <= set(vars(parsed)), "no key that accelerate does not know"


def test_deepspeed_counts_the_rows_of_the_step(work: Path) -> None:
    written("--deepspeed-config", "zero3.json")
    made = json.loads(Path("zero3.json").read_text())
    assert made["train_batch_size"] == 12
    assert made["train_micro_batch_size_per_gpu"] == 3, "400 tokens hold three rows of 128"
    assert made["gradient_accumulation_steps"] == 2
    assert made["bf16"] == {"enabled": True}
    assert made["zero_optimization"]["stage"] == 3


def test_deepspeeds_own_parser_takes_them(work: Path) -> None:
    pytest.importorskip("deepspeed")
    written("--deepspeed-config", "zero3.json", processes=1)  # it counts the processes that are there
    code = (
        "import json, sys; from deepspeed.runtime.config import DeepSpeedConfig as C;"
        "found = C(json.load(open(sys.argv[1])));"
        "print(found.zero_optimization_stage, found.gradient_accumulation_steps, found.bfloat16_config.enabled)"
    )
    said = subprocess.run([sys.executable, "-c", code, "zero3.json"], env=ENVIRONMENT, capture_output=True, text=True)
    assert said.stdout.splitlines()[-1:] == ["3 4 True"], said.stderr[-2000:]


@pytest.mark.parametrize(
    ("words", "code", "what"),
    [
        (["--set", "train.examples_per_step=7"], 2, "7 rows do not divide among 2"),
        (["--set", "train.examples_per_step=null", "--set", "train.tokens_per_step=512"], 2, "counts tokens"),
    ],
)
def test_rows_that_do_not_divide_are_refused(work: Path, words: list[str], code: int, what: str) -> None:
    said = finetune("plan", "r.yaml", "--processes", "2", *words, "--deepspeed-config", "zero3.json")
    assert said.code == code
    assert what in said.err
    assert not Path("zero3.json").exists()


def test_nothing_is_overwritten(work: Path) -> None:
    Path("fsdp.yaml").write_text("mine")
    assert "fsdp.yaml: is there already" in written("--fsdp-config", "fsdp.yaml", code=5)
    assert Path("fsdp.yaml").read_text() == "mine"


def test_layers_are_named_as_transformers_names_them() -> None:
    import importlib

    for family in ("llama", "qwen1", "qwen2", "qwen3"):
        name = engines.layer(family)
        kind = name.removesuffix("DecoderLayer").lower()
        assert hasattr(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), name)
