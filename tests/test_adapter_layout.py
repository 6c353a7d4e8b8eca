"""Adapters between the layouts: PEFT computes the same on the other side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from finetune import adapter_file, adapter_layout, loading
from finetune import base as bases
from finetune.errors import ModelError
from tests import qwen1, runs

Build = Callable[..., Path]
IDS = torch.tensor([[5, 250, 17, 80, 44, 3, 120, 9, 201, 66, 12, 7]])


class Fused(nn.Module):
    """The three projections as the original has them: one linear, whose output is cut in three."""

    def __init__(self, linears: list[nn.Linear]) -> None:
        super().__init__()
        rows = sum(linear.out_features for linear in linears)
        self.c_attn = nn.Linear(linears[0].in_features, rows)
        with torch.no_grad():
            self.c_attn.weight.copy_(torch.cat([linear.weight for linear in linears]))
            self.c_attn.bias.copy_(torch.cat([linear.bias for linear in linears]))


class Original(nn.Module):
    """A native model under the original's module names, for PEFT to find: what an adapter of 2023 was trained on.

    Each projection is taken from the fused linear's output, so that an adapter on ``c_attn`` acts on all three.
    """

    def __init__(self, native: Any) -> None:
        super().__init__()
        self.config = native.config
        self.native = [native]
        self.transformer = nn.Module()
        self.transformer.wte = native.model.embed_tokens
        self.transformer.h = nn.ModuleList()
        self.lm_head = native.lm_head
        for layer in native.model.layers:
            block, attention = nn.Module(), layer.self_attn
            fused = Fused([attention.q_proj, attention.k_proj, attention.v_proj])
            block.attn = fused
            block.attn.c_proj = attention.o_proj
            block.mlp = nn.Module()
            block.mlp.w1, block.mlp.w2 = layer.mlp.up_proj, layer.mlp.gate_proj
            block.mlp.c_proj = layer.mlp.down_proj
            self.transformer.h.append(block)
            for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
                setattr(attention, name, Third(fused, index))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        native = self.native[0]
        for layer, block in zip(native.model.layers, self.transformer.h, strict=True):
            layer.self_attn.o_proj, layer.mlp.up_proj = block.attn.c_proj, block.mlp.w1
            layer.mlp.gate_proj, layer.mlp.down_proj = block.mlp.w2, block.mlp.c_proj
        native.model.embed_tokens, native.lm_head = self.transformer.wte, self.lm_head
        logits: torch.Tensor = native(ids).logits
        return logits

    def prepare_inputs_for_generation(self) -> None:
        """PEFT asks for it on causal models."""


class Third(nn.Module):
    def __init__(self, fused: Fused, index: int) -> None:
        super().__init__()
        self.fused, self.index = [fused], index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fused[0].c_attn(x).chunk(3, dim=-1)[self.index]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, build_tiny: Build) -> Path:
    return qwen1.build(tmp_path_factory.mktemp("qwen1") / "base", build_tiny, dtype="float32")


def native(base: Path) -> Any:
    form = loading.BaseForm(weights="fp32", double=False, compute="fp32", device="cpu")
    return loading.load(bases.inspect(base), form)


def awake(model: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
            elif value.requires_grad and "lora_A" not in name:
                value.mul_(1 + 0.1 * torch.randn(value.shape, generator=generator))


def logits(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        out = model(IDS)
    return out if isinstance(out, torch.Tensor) else out.logits


ORIGINAL: dict[str, dict[str, Any]] = {
    "the published kit's": {"target_modules": ["c_attn", "attn.c_proj", "w1", "w2"]},
    "all": {"target_modules": ["c_attn", "c_proj", "w1", "w2"]},
    "rsLoRA": {"target_modules": ["c_attn", "w2"], "use_rslora": True},
    "DoRA": {"target_modules": ["c_attn", "w1"], "use_dora": True},
    "one layer": {"target_modules": ["c_attn", "w1"], "layers_to_transform": [1], "layers_pattern": "h"},
    "with embedding and head": {"target_modules": ["c_attn"], "modules_to_save": ["wte", "lm_head"]},
}


@pytest.mark.parametrize("fields", ORIGINAL.values(), ids=ORIGINAL)
def test_an_adapter_of_the_original_acts_the_same_on_the_native_model(
    fields: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    model = get_peft_model(Original(native(base)), LoraConfig(r=4, lora_alpha=6, **fields))
    awake(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "given")
    said = runs.finetune("convert", str(tmp_path / "given"), str(tmp_path / "native"), "--to", "native")
    assert said.code == 0, said.err
    found = PeftModel.from_pretrained(native(base), str(tmp_path / "native"))
    assert float((wanted - logits(native(base))).abs().max()) > 0.1
    assert float((logits(found) - wanted).abs().max()) <= 1e-4
    # And back: the same tensors under the same names, at the old rank.
    said = runs.finetune("convert", str(tmp_path / "native"), str(tmp_path / "back"), "--to", "original")
    assert said.code == 0, said.err
    given = load_file(tmp_path / "given" / "adapter_model.safetensors")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert set(back) == set(given)
    assert all(torch.equal(back[name], given[name]) for name in given)
    again = PeftModel.from_pretrained(Original(native(base)), str(tmp_path / "back"))
    assert float((logits(again) - wanted).abs().max()) <= 1e-5


NATIVE: dict[str, dict[str, Any]] = {
    "all linears": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    "two of three": {"target_modules": ["q_proj", "v_proj"]},
    "attention out alone": {"target_modules": ["o_proj"]},
    "rsLoRA": {"target_modules": ["q_proj", "k_proj", "up_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"],
        "rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"v_proj": 20, "layers.0.self_attn.q_proj": 3},
    },
    "DoRA": {"target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"], "use_dora": True},
    "trained tokens": {
        "target_modules": ["q_proj", "gate_proj"],
        "trainable_token_indices": {"embed_tokens": [7, 9], "lm_head": [7, 9]},
    },
}


@pytest.mark.parametrize("fields", NATIVE.values(), ids=NATIVE)
def test_a_native_adapter_acts_the_same_on_the_original_names(
    fields: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    model = get_peft_model(native(base), LoraConfig(r=4, lora_alpha=6, **fields))
    awake(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "given", save_embedding_layers=False)
    said = runs.finetune("convert", str(tmp_path / "given"), str(tmp_path / "original"), "--to", "original")
    assert said.code == 0, said.err
    assert "ranks" in said.out
    assert "became" in said.out
    found = PeftModel.from_pretrained(Original(native(base)), str(tmp_path / "original"))
    assert float((logits(found) - wanted).abs().max()) <= 1e-4
    config = json.loads((tmp_path / "original" / "adapter_config.json").read_text())
    assert config["use_rslora"] is False


def test_a_pickled_adapter_is_read_by_the_child_alone(base: Path, tmp_path: Path) -> None:
    model = get_peft_model(Original(native(base)), LoraConfig(r=4, lora_alpha=6, target_modules=["c_attn"]))
    model.save_pretrained(tmp_path / "given")
    weights = load_file(tmp_path / "given" / "adapter_model.safetensors")
    torch.save(weights, tmp_path / "given" / "adapter_model.bin")
    (tmp_path / "given" / "adapter_model.safetensors").unlink()
    said = runs.finetune("convert", str(tmp_path / "given"), str(tmp_path / "out"), "--to", "native")
    assert said.code == 0, said.err


def _adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


A, B = torch.ones(2, 8), torch.ones(8, 2)


@pytest.mark.parametrize(
    ("tensors", "config", "what"),
    [
        ({}, {"peft_type": "PREFIX_TUNING"}, "this is no LoRA adapter"),
        ({"base_model.model.transformer.h.0.mlp.w1.lora_A.weight": A}, {}, "instead of a LoRA pair"),
        (
            {f"base_model.model.transformer.h.0.mlp.w9.lora_{k}.weight": v for k, v in (("A", A), ("B", B))},
            {},
            "is no module of the original Qwen",
        ),
        (
            {f"base_model.model.model.layers.0.mlp.up_proj.lora_{k}.weight": v for k, v in (("A", A), ("B", B))},
            {},
            "in the native layout already",
        ),
    ],
)
def test_what_is_no_such_adapter_is_refused(
    tensors: dict[str, torch.Tensor], config: dict[str, Any], what: str, tmp_path: Path
) -> None:
    folder = _adapter(tmp_path / "given", tensors or {"x": A}, **config)
    said = runs.finetune("convert", str(folder), str(tmp_path / "out"), "--to", "native")
    assert (said.code, what in said.err) == (4, True), said.err
    assert not (tmp_path / "out").exists()


W1 = "base_model.model.transformer.h.0.mlp.w1"
FUSED = "base_model.model.transformer.h.0.attn.c_attn"


@pytest.mark.parametrize(
    ("pair", "config", "what"),
    [
        ((W1, A, B), {"lora_alpha": "x"}, "lora_alpha is 'x'"),
        ((W1, A, B), {"lora_alpha": None}, "lora_alpha is None"),
        ((W1, A, B), {"alpha_pattern": [1]}, "alpha_pattern is no mapping"),
        ((W1, A, B), {"alpha_pattern": {"(": 1}}, "which is no pattern"),
        ((W1, A, B), {"trainable_token_indices": {"foo": [1]}}, "names 'foo'"),
        ((W1, A, B), {"bias": "all"}, "bias is 'all'"),
        ((W1, A, B), {"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ((W1, A, B), {"layer_replication": [[0, 1]]}, "layer_replication"),
        ((W1, A, torch.ones(8, 3)), {}, "which are no pair"),
        ((FUSED, A, torch.ones(8, 2)), {}, "which are no pair"),
        ((W1, A * float("nan"), B), {}, "not finite"),
        ((W1, A.to(torch.int64), B), {}, "not finite or not fractions"),
    ],
)
def test_odd_adapters_are_one_message(
    pair: tuple[str, torch.Tensor, torch.Tensor], config: dict[str, Any], what: str, tmp_path: Path
) -> None:
    name, a, b = pair
    folder = _adapter(tmp_path / "given", {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, **config)
    said = runs.finetune("convert", str(folder), str(tmp_path / "out"), "--to", "native")
    assert (said.code, said.err.count("\n"), what in said.err) == (4, 1, True), said.err
    assert not (tmp_path / "out").exists()


def test_a_damaged_file_and_an_unknown_linear_are_one_message(tmp_path: Path) -> None:
    folder = _adapter(tmp_path / "given", {"base_model.model.model.layers.0.mlp.zz_proj.lora_A.weight": A,
                                           "base_model.model.model.layers.0.mlp.zz_proj.lora_B.weight": B})  # fmt: skip
    said = runs.finetune("convert", str(folder), str(tmp_path / "out"), "--to", "original")
    assert (said.code, "is no linear of the native model" in said.err) == (4, True)
    (folder / "adapter_model.safetensors").write_bytes(b"junk")
    said = runs.finetune("convert", str(folder), str(tmp_path / "out"), "--to", "original")
    assert (said.code, "cannot be read" in said.err) == (4, True)


def test_key_value_heads_that_differ_cannot_be_fused(tmp_path: Path) -> None:
    update = adapter_file.Update(A, B, 1.0)
    narrow = adapter_file.Update(A, torch.ones(4, 2), 1.0)
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    adapter = adapter_file.Adapter(updates=dict(zip(names, (update, narrow), strict=True)))
    with pytest.raises(ModelError, match="differ in width"):
        adapter_layout.to_original(adapter, tmp_path)
