"""Merging: the folder that anybody loads answers as the model that was trained, for everything that can be trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import base as bases
from finetune import finished, loading, merge, model, proof, shards
from finetune.base import Base
from finetune.errors import ModelError
from finetune.fold import Fold, Folding, dithered
from finetune.kernels import frozen_linear
from finetune.loading import BaseForm
from finetune.model import Policy
from finetune.shards import Rows
from finetune.terminal import Terminal
from tests import runs, tiny
from tests.runs import MERGED, OUTPUT, awake, merge_run

Build = Callable[..., Path]


def _peftmerge_run(folder: Path, adapter: Path, form: BaseForm) -> dict[str, torch.Tensor]:
    """PEFT's own fold, in fp32, into the base as it was trained against."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    live = model.load_base(bases.inspect(folder), form)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, module in live.model.named_modules():
            if name.endswith("_proj"):
                plain.get_submodule(name).weight.copy_(frozen_linear.dense_weight(module, torch.float32))
    merged = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()
    return {name: value.detach() for name, value in merged.state_dict().items()}


def _logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What plain transformers computes from a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits


def _own_logits(policy: Policy, ids: torch.Tensor) -> torch.Tensor:
    with policy.evaluating():
        positions = torch.arange(ids.shape[1])[None]
        return policy.head(policy.hidden(ids, positions, (0, ids.shape[1])))


IDS = torch.tensor([[5, 250, 17, 80, 44, 3, 120, 9, 201, 66, 12, 7]])

Case = tuple[dict[str, Any], list[str]]
CASES: dict[str, Case] = {
    "LoRA nf4": ({}, []),
    "LoRA nf4, simple scales": ({}, ["quantize.double=false"]),
    "LoRA fp4": ({}, ["quantize.weights=fp4"]),
    "LoRA int8": ({}, ["quantize.weights=int8"]),
    "LoRA bf16 held, fp32 computed": ({}, ["quantize.weights=bf16"]),
    "LoRA fp32": ({}, ["quantize.weights=fp32"]),
    "rsLoRA": ({}, ["adapter.use_rslora=true"]),
    "DoRA": ({}, ["adapter.use_dora=true"]),
    "DoRA fp32": ({}, ["adapter.use_dora=true", "quantize.weights=fp32"]),
    "patterns": ({}, ["adapter.rank_pattern={q_proj: 2, '0.mlp.up_proj': 7}",
                      "adapter.alpha_pattern={v_proj: 3, '1.mlp.down_proj': 20}"]),
    "rsLoRA with patterns": ({}, ["adapter.use_rslora=true", "adapter.rank_pattern={q_proj: 2}",
                                  "adapter.alpha_pattern={q_proj: 3}"]),
    "some modules": ({}, ["adapter.target_modules=[q_proj, down_proj]", "adapter.layers_to_transform=[1]"]),
    "head": ({}, ["adapter.target_modules='.*(_proj|lm_head)'"]),
    "whole modules": ({}, ["adapter.modules_to_save=[lm_head, embed_tokens, norm]"]),
    "whole linear": ({}, ["adapter.modules_to_save=[v_proj]", "quantize.weights=fp32"]),
    "sharded": ({"max_shard_size": "60KB"}, []),
    "tied": ({"tie_word_embeddings": True}, []),
    "Qwen3": ({"family": "qwen3"}, []),
    "Qwen3 tied": ({"family": "qwen3", "tie_word_embeddings": True}, []),
    "Llama": ({"family": "llama"}, []),
    "Llama tied, with biases": ({"family": "llama", "tie_word_embeddings": True, "attention_bias": True}, []),
    "fp32 base": ({"dtype": "float32"}, []),
    "fp32 base held as bf16": ({"dtype": "float32"}, ["quantize.weights=bf16"]),
    "fp16 base": ({"dtype": "float16"}, []),
}  # fmt: skip


@pytest.mark.parametrize(("base", "overrides"), CASES.values(), ids=CASES)
def test_the_merged_folder_is_the_trained_model(
    base: dict[str, Any], overrides: list[str], work: Path, build_tiny: Build
) -> None:
    if base:
        shutil.rmtree(work / "base")
        build_tiny(work / "base", **base)
    assert runs.train("train.steps=1", "evaluate.metrics=[loss]", "tracker=none", *overrides).code == 0
    awake(OUTPUT / "adapter")
    said = merge_run()
    assert said.code == 0, said.err
    note = json.loads((MERGED / "finetune.json").read_text())
    assert note["proof"]["mean_kl"] <= 1e-3

    # Every stored weight is PEFT's own, rounded once to the base's dtype.
    found = bases.inspect(MERGED)
    prepared, files = finished.open_run(OUTPUT, Terminal(quiet=True))
    run, live = finished.live(prepared, files, Terminal(quiet=True))
    wanted = _peftmerge_run(work / "base", OUTPUT / "adapter", run.form())
    stored = {name: value for shard in found.shards for name, value in load_file(MERGED / shard).items()}
    source = bases.inspect(work / "base")
    assert {name: (t.shape, t.shard, t.dtype) for name, t in found.tensors.items()} == {
        name: (t.shape, t.shard, t.dtype) for name, t in source.tensors.items()
    }
    for name, value in stored.items():
        rounded = wanted[name].to(value.dtype).float()
        step = torch.finfo(value.dtype).eps * rounded.abs().clamp(min=1e-3)
        assert bool(((value.float() - rounded).abs() <= 2 * step).all()), name

    # Plain transformers and our own loading of the folder agree, and so does the live model as far as rounding lets it.
    plain = _logits(MERGED, IDS)
    own = model.load_base(found, BaseForm(weights="fp32", double=False, compute="fp32", device="cpu"))
    assert torch.allclose(_own_logits(own, IDS), plain, atol=2e-4)
    assert proof.compare(_own_logits(live, IDS)[0].log_softmax(-1), plain[0].log_softmax(-1), 1e-3).holds
    bare = _own_logits(tiny.load(work / "base"), IDS)[0].log_softmax(-1)
    assert float((bare.exp() * (bare - plain[0].log_softmax(-1))).sum(-1).mean()) > 1e-2, "the adapter does too little"


@pytest.mark.parametrize(
    "overrides", [[], ["adapter.use_rslora=true"], ["adapter.use_dora=true"], ["adapter.modules_to_save=[lm_head]"]]
)
def test_plain_peft_reads_the_adapter(work: Path, overrides: list[str]) -> None:
    """The folder's own format: same logits as ours on a base that is held as trained (here in fp32)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert runs.train("train.steps=1", "quantize.weights=fp32", "evaluate.metrics=[loss]", *overrides).code == 0
    awake(OUTPUT / "adapter")
    prepared, files = finished.open_run(OUTPUT, Terminal(quiet=True))
    _, live = finished.live(prepared, files, Terminal(quiet=True))
    plain = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, str(OUTPUT / "adapter")).eval()
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits, _own_logits(live, IDS), atol=2e-4)


@pytest.fixture(scope="module")
def adapter(trained: Path) -> tuple[Base, dict[str, torch.Tensor], dict[str, Any]]:
    folder = trained / OUTPUT / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    return bases.inspect(trained / "base"), load_file(folder / "adapter_model.safetensors"), config


FORM = BaseForm(weights="nf4", double=True, compute="fp32", device="cpu")
KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
Adapter = tuple[Base, dict[str, torch.Tensor], dict[str, Any]]


def test_the_plan_lists_every_change(adapter: Adapter) -> None:
    base, weights, config = adapter
    plan = merge.make_plan(base, FORM, weights, config, replayed=True)
    assert plan.lines() == ["14 tensors get their LoRA update, 0 are replaced whole; 14 are replayed as nf4"]
    used = {key for fold in plan.folds.values() for key in (fold.lora_a, fold.lora_b)}
    assert used == set(weights)
    assert {fold.scaling for fold in plan.folds.values()} == {2.0}
    original = merge.make_plan(base, FORM, weights, config, replayed=False)
    assert original.lines()[0].endswith("the base is taken as published")
    assert not any(fold.replay for fold in original.folds.values())
    few = {key: value for key, value in weights.items() if "layers.1.mlp.up_proj" in key}
    partly = merge.make_plan(base, FORM, few, config, replayed=True)
    assert sum(fold.replay for fold in partly.folds.values()) == 14  # an untouched linear was 4-bit, too


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda w: {k.replace("up_proj", "upp_proj"): v for k, v in w.items()}, "fits no tensor of the base"),
        (lambda w: {k.removeprefix("base_model."): v for k, v in w.items()}, "fits no tensor of the base"),
        (lambda w: {k: v for k, v in w.items() if k != KEY}, "has only half of its LoRA pair"),
        (lambda w: w | {"base_model.model.score.weight": torch.zeros(1)}, "score.weight fits no tensor of the base"),
        (lambda w: {}, "the adapter is empty"),
    ],
)
def test_every_adapter_tensor_must_find_its_place(
    adapter: Adapter, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], what: str
) -> None:
    base, weights, config = adapter
    with pytest.raises(ModelError, match=what):
        merge.make_plan(base, FORM, change(dict(weights)), config, replayed=True)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda w: {k.replace("up_proj", "upp_proj"): v for k, v in w.items()}, "4 adapter tensors fit nothing and 4 "),
        (lambda w: {k: v for k, v in w.items() if k != KEY}, "1 places get none"),
        (lambda w: w | {KEY: torch.zeros(3, 64)}, r"up_proj.lora_A.weight is \[4, 64\]|where the base needs"),
    ],
)
def test_loading_an_adapter_whose_names_do_not_agree_is_refused(
    finished: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], what: str
) -> None:
    """S14: PEFT passes over all of these with a warning at most; the effect would be half an adapter, or none."""
    path = OUTPUT / "adapter" / "adapter_model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
    with pytest.raises(ModelError, match=what):
        model.attach_saved(tiny.load(Path("base"), "nf4"), OUTPUT / "adapter")


@pytest.mark.parametrize("weights", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("compute", ["bf16", "fp16", "fp32"])
def test_the_replayed_weight_is_the_loaded_one(
    weights: str, stored: torch.dtype, compute: str, build_tiny: Build, tmp_path: Path
) -> None:
    """Bit for bit, also after evaluation passes, for which some libraries repack a live layer (S9)."""
    folder = build_tiny(tmp_path / "base", dtype=str(stored).removeprefix("torch."), num_hidden_layers=1)
    form = BaseForm(weights=weights, double=True, compute=compute, device="cpu")
    live = model.load_base(bases.inspect(folder), form)
    with live.evaluating():
        live.generate([[5, 6, 7]], 2)
    shard = load_file(folder / "model.safetensors")
    for name, module in live.model.named_modules():
        if name.endswith("_proj"):
            folded = _folded(shard[f"{name}.weight"], Fold(replay=True), form, {})
            assert torch.equal(folded, frozen_linear.dense_weight(module, loading.DTYPES[compute]).float()), name


def _folded(base: torch.Tensor, fold: Fold, form: BaseForm, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """A tensor as it is folded before it is rounded."""
    folding = Folding(folds={"x": fold}, form=form, weights=weights)
    rows = Rows(shape=tuple(base.shape), read=lambda start, stop: base[start:stop])
    return torch.cat(list(folding.rows("x", rows, torch.float32)))


@pytest.mark.parametrize("weights", ["nf4", "fp4", "int8", "bf16"])
@pytest.mark.parametrize("columns", [64, 96, 70])  # 70: a quantisation block lies across rows
def test_row_blocks_fold_as_the_whole(weights: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What memory allows at a time changes no number: double quantisation alone sees beyond a block."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    base = (drawn(200, columns) * 0.02).bfloat16()
    adapter = {"a": drawn(4, columns), "b": drawn(200, 4), "m": drawn(200), "r": drawn(2, columns), "w": drawn(200, 3)}
    form = BaseForm(weights=weights, double=True, compute="fp32", device="cpu")
    lora = {"lora_a": "a", "lora_b": "b", "scaling": 0.5}
    folds = {
        "replay": Fold(replay=True),
        "LoRA": Fold(**lora),
        "replay, LoRA": Fold(replay=True, **lora),
        "DoRA": Fold(replay=True, magnitude="m", **lora),
        "rows": Fold(rows="r", row_ids=(199, 3)),
        "whole": Fold(replacement="w"),
    }
    for name, fold in folds.items():
        whole = _folded(base, fold, form, adapter)
        with monkeypatch.context() as patched:
            patched.setattr(shards, "_BLOCK", 1)
            assert Rows(shape=(200, columns), read=None).bounds() == [(0, 64), (64, 128), (128, 192), (192, 200)]
            blocks = _folded(base, fold, form, adapter)
        assert torch.allclose(blocks, whole, rtol=1e-6, atol=1e-7), name
        assert "LoRA" in name or name == "DoRA" or torch.equal(blocks, whole), name


def test_an_update_below_a_step_of_bf16_is_not_swallowed() -> None:
    """At the width of 14B: weights on bf16's grid, an update of less than half a step each."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(64, 5120, generator=generator) * 0.02).bfloat16()
    update = (torch.randn(64, 4, generator=generator) @ torch.randn(4, 5120, generator=generator)) * 1e-5
    wanted = base.float() + update

    def kept(rounded: torch.Tensor) -> float:
        """The share of the update that the rounded sum still holds, along the update."""
        return float(((rounded.float() - base.float()) * update).sum() / update.square().sum())

    assert kept(wanted.bfloat16()) < 0.8

    found = dithered(wanted.clone(), "model.layers.0.mlp.up_proj.weight")
    assert abs(kept(found) - 1) < 0.02
    # Neighbours only, the same bytes each time, and what is on the grid stays.
    step = (wanted.bfloat16().float().abs() * 2**-7).clamp(min=1e-30)
    assert bool(((found.float() - wanted).abs() <= step).all())
    assert torch.equal(found, dithered(wanted.clone(), "model.layers.0.mlp.up_proj.weight"))
    assert not torch.equal(found, dithered(wanted.clone(), "model.layers.1.mlp.up_proj.weight"))
    assert torch.equal(dithered(base.float(), "x"), base)
    # Nothing to round, or nearly nothing: next to zero a draw must not reach the other sign, or what is no number.
    for value in (0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 3e38, float("inf")):
        found = dithered(torch.full((999,), value), "x").float()
        assert bool(((found == value) | ((found - value).abs() <= max(abs(value) * 2**-7, 1e-40))).all()), value


def test_a_correction_is_the_nearest_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """What quantising did to a matrix, added at a low rank: never farther from the replayed one, at full rank it."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(200, 96, generator=generator) * 0.02
    form = BaseForm(weights="nf4", double=True, compute="fp32", device="cpu")
    replayed = _folded(base, Fold(replay=True), form, {})
    change = replayed - base
    values = torch.linalg.svdvals(change)
    state = torch.get_rng_state()
    for rank in (1, 8, 32):
        left = torch.linalg.norm(replayed - _folded(base, Fold(correct=rank), form, {}))
        best = values[rank:].norm()  # Eckart and Young
        assert float(best) <= float(left) * 1.0001 <= float(best) * 1.05, rank
    assert torch.allclose(_folded(base, Fold(correct=96), form, {}), replayed, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)
    adapter = {"a": torch.randn(4, 96, generator=generator), "b": torch.randn(200, 4, generator=generator)}
    lora = Fold(correct=8, lora_a="a", lora_b="b", scaling=0.5)
    without = _folded(base, Fold(correct=8), form, {})
    assert torch.allclose(_folded(base, lora, form, adapter), without + 0.5 * adapter["b"] @ adapter["a"], atol=1e-5)
    monkeypatch.setattr(shards, "_BLOCK", 1)
    assert torch.allclose(_folded(base, lora, form, adapter), without + 0.5 * adapter["b"] @ adapter["a"], atol=1e-5)
