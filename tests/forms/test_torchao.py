"""int8 by torchao: its own numbers, through this project's layers; without it, one message that names the extra."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finetune import forms, loading
from finetune.kernels.frozen_linear import PackedLinear, dense_weight
from tests import runs, tiny
from tests.runs import OUTPUT, adapter_digest, merge_run, train

WORD = "torchao_int8"
needed = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@needed
@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
def test_a_layer_acts_as_torchaos_own_tensor(compute: str, tiny_base: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    dtype, stored = loading.DTYPES[compute], load_file(tiny_base / "model.safetensors")
    policy = tiny.load(tiny_base, WORD, compute)
    layers = {name: one for name, one in policy.model.named_modules() if isinstance(one, PackedLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight = stored[f"{name}.weight"].to(dtype)
        theirs = torch.nn.Sequential(torch.nn.Linear(*reversed(weight.shape), bias=False).to(dtype))
        theirs[0].weight.data = weight.clone()
        quantize_(theirs, Int8WeightOnlyConfig())
        wanted = theirs[0].weight.dequantize()
        assert wanted.dtype == dtype
        assert not torch.equal(wanted, weight)
        assert torch.equal(dense_weight(layer, dtype), wanted)
        # What a merge replays from the folder, row block by row block, is what the layer multiplies with.
        blocks = [forms.get(WORD).replay(WORD, part, double=True) for part in weight.split(24)]
        assert torch.equal(torch.cat(blocks), wanted)
    assert all(value.any() for value in tiny.gradient_of(tiny.adapt(policy), tiny.samples([5, 9])).values())


@needed
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_trained_resumed_and_merged(
    compute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path
) -> None:
    runs.furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, "base")
    sets = (f"quantize.weights={WORD}", f"quantize.compute={compute}")
    assert train(*sets).code == 0
    runs.train_in_two(*sets, out=Path("runs/two"))
    assert adapter_digest(Path("runs/two")) == adapter_digest()
    assert "torchao" in json.loads((OUTPUT / "identity.json").read_text())["environment"]
    runs.awake(OUTPUT / "adapter")
    said = merge_run("--base", "replayed")
    assert said.code == 0, said.err
    note = json.loads(Path("merged/finetune.json").read_text())
    assert note["quantised_as"] == WORD
    assert note["proof"]["mean_kl"] < 1e-3


def test_without_it_the_extra_is_named_before_anything_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Path
) -> None:
    runs.furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_base, "base")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torchao" else find(name))
    refused = train(f"quantize.weights={WORD}")
    assert refused.code == 5
    assert "pip install 'finetune-qwen[torchao]'" in refused.err
    assert "r.yaml:3:3" in refused.err or "quantize.weights" in refused.err
    assert not OUTPUT.exists()


def test_the_plan_counts_a_byte_a_weight(tiny_base: Path) -> None:
    from finetune import base, budget

    shape = base.inspect(tiny_base).shape
    rest = shape.parameters() - shape.linear_parameters()
    counted = budget.weight_bytes(WORD, True, "bf16", shape, "cpu")
    assert counted == pytest.approx(shape.linear_parameters() * (1 + 4 / shape.hidden) + 2 * rest, abs=2)
