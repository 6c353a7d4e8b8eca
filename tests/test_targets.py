"""What the plan says an adapter touches is what PEFT touches; what PEFT passes over in silence is refused by line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import base as bases
from finetune import model, recipe, targets
from finetune.decoder import DecoderShape
from finetune.errors import RecipeError
from finetune.recipe import Located
from tests import runs, tiny

Build = Callable[..., Path]


def _located(*overrides: str) -> Located:
    return recipe.locate(Path("r.yaml"), ["quantize.weights=fp32", "quantize.compute=fp32", *overrides])


def _shape(folder: Path) -> DecoderShape:
    return bases.inspect(folder).shape


def _peft(folder: Path, fields: dict[str, Any]) -> tuple[set[str], int]:
    """(modules with a LoRA, trainable parameters) as the installed PEFT has it."""
    fields = fields if fields.get("target_modules") not in (None, "all-linear") else fields | {"target_modules": None}
    if fields["target_modules"] is None:
        fields = fields | {"target_modules": tiny.FIELDS["target_modules"]}
    policy = model.attach(tiny.load(folder), fields, seed=0)
    adapted = {
        name.removeprefix("base_model.model.")
        for name, module in policy.model.named_modules()
        if hasattr(module, "lora_A")
    }
    return adapted, sum(value.numel() for value in policy.trainable().values())


SELECTIONS = {
    "default": [],
    "all-linear": ["adapter.target_modules=all-linear"],
    "list": ["adapter.target_modules=[q_proj, down_proj]"],
    "longer name": ["adapter.target_modules=[self_attn.q_proj, layers.1.mlp.up_proj]"],
    "regex": [r"adapter.target_modules='.*\.1\.(self_attn|mlp)\.(q|up)_proj'"],
    "regex with the head": ["adapter.target_modules='.*(_proj|lm_head)'"],
    "exclude list": ["adapter.exclude_modules=[k_proj, v_proj]"],
    "exclude regex": [r"adapter.exclude_modules='.*layers\.0.*'"],
    "all-linear, exclude": ["adapter.target_modules=all-linear", "adapter.exclude_modules=[o_proj]"],
    "one layer": ["adapter.layers_to_transform=1"],
    "layers": ["adapter.layers_to_transform=[0]", "adapter.target_modules=[q_proj, v_proj]"],
    "layers by pattern": ["adapter.layers_to_transform=[1]", "adapter.layers_pattern=layers"],
    "rank pattern": ["adapter.rank_pattern={q_proj: 2, '0.mlp.up_proj': 7, 'layers.1.*down_proj': 1}"],
    "DoRA": ["adapter.use_dora=true"],
    "DoRA, rank pattern": ["adapter.use_dora=true", "adapter.rank_pattern={v_proj: 9}"],
    "whole head": ["adapter.modules_to_save=[lm_head]"],
    "whole norms": ["adapter.modules_to_save=[norm]"],
    "whole linear with bias": ["adapter.modules_to_save=[q_proj]"],
    "whole embedding": ["adapter.modules_to_save=[embed_tokens, lm_head]", "adapter.target_modules=[q_proj]"],
}


@pytest.mark.parametrize("overrides", SELECTIONS.values(), ids=SELECTIONS)
def test_the_table_is_what_peft_adapts(work: Path, overrides: list[str]) -> None:
    located, shape = _located(*overrides), _shape(work / "base")
    found = targets.select(located, shape)
    names = {name for name in targets.modules(shape) if targets.selected(name, located.recipe.adapter.fields)}
    adapted, trained = _peft(work / "base", located.recipe.adapter.fields)
    assert names == adapted
    assert sum(one.parameters for one in found.tensors) == trained
    assert {target.module: target.count for target in found.targets} == {
        kind: sum(name.endswith(kind) for name in names) for kind in {name.rpartition(".")[2] for name in names}
    }
    weights = shape.tensors()
    for target in found.targets:
        members = [weights[f"{name}.weight"] for name in names if name.endswith(target.module)]
        assert set(members) == {target.shape}
        assert target.base_parameters == sum(a * b for a, b in members)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("tied", [False, True])
def test_other_families(family: str, tied: bool, build_tiny: Build, work: Path) -> None:
    shutil.rmtree(work / "base")
    build_tiny(work / "base", family=family, tie_word_embeddings=tied)
    located = _located("adapter.modules_to_save=[norm]")
    found = targets.select(located, _shape(work / "base"))
    assert sum(one.parameters for one in found.tensors) == _peft(work / "base", located.recipe.adapter.fields)[1]


def test_every_module_name_is_known(work: Path) -> None:
    """A pattern is held against what PEFT holds it against."""
    found = {name for name, _ in tiny.load(work / "base").model.named_modules()} - {""}
    assert set(targets.modules(_shape(work / "base"))) == found


REFUSED = {
    "a regex that takes containers": (r"adapter.target_modules='.*self_attn.*'", "target_modules",
                                      "the pattern also matches model.layers.0.self_attn, which is no linear"),
    "a regex that takes the embedding": ("adapter.target_modules='.*(q_proj|embed_tokens)'", "target_modules",
                                         "the pattern also matches model.embed_tokens, which is no linear"),
    "a regex that takes norms": ("adapter.target_modules='.*(q_proj|norm)'", "target_modules",
                                  "the pattern also matches model.layers.0.input_layernorm, which is no linear"),
    "a layer that is not there": ("adapter.target_modules=[layers.7.mlp.up_proj, q_proj]", "target_modules",
                                  "'layers.7.mlp.up_proj' matches no module of this model"),
    "a layer beyond the last": ("adapter.layers_to_transform=[0, 2]", "layers_to_transform",
                                "layer 2 is beyond the model's 2"),
    "everything excluded": ("adapter.exclude_modules='.*'", "target_modules", "the selection matches no module"),
    "an idle rank pattern": ("adapter.rank_pattern={'layers.9.mlp.up_proj': 2}", "rank_pattern",
                             "'layers.9.mlp.up_proj' matches no module that gets an adapter"),
    "an idle alpha pattern": ("adapter.alpha_pattern={'layers.9.mlp.up_proj': 2}", "alpha_pattern",
                              "'layers.9.mlp.up_proj' matches no module that gets an adapter"),
    "a norm of another family": ("adapter.modules_to_save=[q_norm]", "modules_to_save",
                                 "'q_norm' matches no module of this model"),
}  # fmt: skip


@pytest.mark.parametrize(("override", "key", "what"), REFUSED.values(), ids=REFUSED)
def test_what_would_do_nothing_or_fail_later_is_refused(work: Path, override: str, key: str, what: str) -> None:
    said = runs.finetune("plan", "r.yaml", "--set", override)
    assert said.code == 2
    assert f" adapter.{key}: {what}" in said.err
    assert len(said.err.splitlines()) == 1
    assert not Path("runs").exists()


def test_a_whole_packed_linear_is_refused(work: Path) -> None:
    for weights in ("nf4", "fp4", "int8"):
        said = runs.finetune("plan", "r.yaml", "--set", f"quantize.weights={weights}", "--set",
                             "adapter.modules_to_save=[down_proj]")  # fmt: skip
        assert said.code == 2
        assert f"down_proj is held as {weights}, and only full-precision modules can be trained whole" in said.err


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_whole_tied_embeddings_are_refused_by_line(name: str, build_tiny: Build, work: Path) -> None:
    shutil.rmtree(work / "base")
    build_tiny(work / "base", tie_word_embeddings=True)
    text = runs.RECIPE.replace("  lora_alpha: 8\n", f"  lora_alpha: 8\n  modules_to_save: [{name}]\n")
    (work / "r.yaml").write_text(text)
    said = runs.finetune("plan", "r.yaml")
    assert said.code == 2
    assert said.err.startswith(f"recipe: r.yaml:9:3: adapter.modules_to_save: {name} shares its weights with another")
    _config_untied(work / "base")


def _config_untied(folder: Path) -> None:
    """The same recipe passes where config and weights say that they are apart."""
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert runs.finetune("plan", "r.yaml").code == 0


def test_a_lora_on_a_tied_head_is_refused(build_tiny: Build, work: Path) -> None:
    """S13: the merged head would be the embedding, too."""
    shutil.rmtree(work / "base")
    build_tiny(work / "base", tie_word_embeddings=True)
    with pytest.raises(RecipeError, match="matches lm_head, whose weights are the embedding's own"):
        targets.select(_located("adapter.target_modules='.*(_proj|lm_head)'"), _shape(work / "base"))


def test_a_misspelt_target_is_refused_by_line(work: Path) -> None:
    text = runs.RECIPE.replace("  lora_alpha: 8\n", "  lora_alpha: 8\n  target_modules: [q_proj, vproj]\n")
    (work / "r.yaml").write_text(text)
    said = runs.finetune("plan", "r.yaml")
    assert said.code == 2
    assert said.err.startswith("recipe: r.yaml:9:")
    assert "did you mean 'v_proj'?" in said.err


@pytest.mark.parametrize("overrides", SELECTIONS.values(), ids=SELECTIONS)
def test_all_that_is_trained_has_fp32_masters(work: Path, overrides: list[str]) -> None:
    """S16: of bf16 masters hardly any entry would ever move."""
    fields = _located(*overrides).recipe.adapter.fields
    fields = fields | {"target_modules": fields["target_modules"] or tiny.FIELDS["target_modules"]}
    if fields["target_modules"] == "all-linear":
        fields = fields | {"target_modules": tiny.FIELDS["target_modules"]}
    policy = model.attach(tiny.load(work / "base", "bf16", "bf16"), fields, seed=0)
    assert {value.dtype for value in policy.trainable().values()} == {torch.float32}
    example = tiny.samples([9, 5])
    assert all(bool(value.isfinite().all()) for value in tiny.gradient_of(policy, example).values())
