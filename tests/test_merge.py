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
from finetune import manifest, merge, model, pipeline, proof
from finetune.base import Base
from finetune.errors import ModelError
from finetune.kernels import frozen_linear
from finetune.model import BaseForm, Policy
from finetune.terminal import Terminal
from tests import runs, tiny
from tests.runs import OUTPUT, finetune

Build = Callable[..., Path]
MERGED = Path("merged")


def _merge(*options: str, out: Path = MERGED, run: Path = OUTPUT) -> runs.Said:
    return finetune("merge", str(run), "--out", str(out), *options)


def _awake(adapter: Path) -> None:
    """Give a barely trained adapter weights that matter, all of them, and a manifest that holds."""
    weights = load_file(adapter / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(11)
    for name in sorted(weights):
        noise = torch.randn(weights[name].shape, generator=generator)
        if "lora_B" in name:
            weights[name] = noise * 0.05
        elif "lora_A" not in name:  # DoRA's lengths, whole modules
            weights[name] = weights[name] * (1 + 0.1 * noise)
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    files = [path for path in adapter.iterdir() if path.name != manifest.NAME]
    manifest.write(adapter, manifest.digests(files))


def _peft_merge(folder: Path, adapter: Path, form: BaseForm) -> dict[str, torch.Tensor]:
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
    _awake(OUTPUT / "adapter")
    said = _merge()
    assert said.code == 0, said.err
    note = json.loads((MERGED / "finetune.json").read_text())
    assert note["proof"]["mean_kl"] <= 1e-3

    # Every stored weight is PEFT's own, rounded once to the base's dtype.
    found = bases.inspect(MERGED)
    prepared, files = pipeline.opened(OUTPUT)
    run, live = pipeline.live(prepared, files, Terminal(quiet=True))
    wanted = _peft_merge(work / "base", OUTPUT / "adapter", run.form())
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
    assert (
        proof.compare(_own_logits(live, IDS)[0].log_softmax(-1), plain[0].log_softmax(-1), "replayed").mean_kl <= 1e-3
    )
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
    _awake(OUTPUT / "adapter")
    prepared, files = pipeline.opened(OUTPUT)
    _, live = pipeline.live(prepared, files, Terminal(quiet=True))
    plain = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, str(OUTPUT / "adapter")).eval()
    with torch.no_grad():
        assert torch.allclose(plain(IDS).logits, _own_logits(live, IDS), atol=2e-4)


def test_the_merged_folder_is_whole(finished: Path) -> None:
    before = runs.snapshot(finished / "base")
    said = _merge()
    assert (said.code, said.err) == (0, "")
    assert "proof: mean KL" in said.out
    assert manifest.faults(MERGED) == []
    names = {path.name for path in MERGED.iterdir()}
    assert names == {path.name for path in Path("base").iterdir()} | {"finetune.json", "manifest.json"}
    note = json.loads((MERGED / "finetune.json").read_text())
    assert note["adapter_sha256"] == runs.adapter_digest()
    assert (note["base_choice"], note["quantised_as"], note["folded_tensors"]) == ("replayed", "nf4", 14)
    assert note["proof"]["holds"]
    assert set(json.loads((OUTPUT / "scores.json").read_text())) == {"before", "after", "merged"}
    assert runs.snapshot(finished / "base") == before


def test_the_merged_model_ends_its_answers(finished: Path) -> None:
    generation = Path("base/generation_config.json")
    tokenizer = model.load_tokenizer(Path("base"))
    stop, end = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    for given, wanted in ((end, [stop, end]), ([end, stop], [stop, end]), (None, [stop])):
        source = {"eos_token_id": given} if given is not None else {}
        merge_source = finished / "source"
        shutil.rmtree(merge_source, ignore_errors=True)
        shutil.copytree("base", merge_source)
        (merge_source / generation.name).write_text(json.dumps({**source, "temperature": 0.7, "do_sample": True}))
        target = finished / "out"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        merge.copy_files(bases.inspect(merge_source), target)
        written = json.loads((target / generation.name).read_text())
        assert written == {"eos_token_id": wanted, "temperature": 0.7, "do_sample": True}


def test_the_same_merge_again_changes_nothing(finished: Path) -> None:
    assert _merge().code == 0
    before = runs.snapshot(MERGED)
    said = _merge()
    assert (said.code, said.err) == (0, "")
    assert "already: nothing to do" in said.out
    assert runs.snapshot(MERGED) == before
    assert _merge("--base", "original").code == 5  # another merge in the same place
    assert runs.snapshot(MERGED) == before


def test_the_same_merge_gives_the_same_weights(finished: Path) -> None:
    assert _merge().code == 0
    assert _merge(out=Path("again")).code == 0
    assert Path("again/model.safetensors").read_bytes() == (MERGED / "model.safetensors").read_bytes()


def test_other_content_in_the_way_is_kept(finished: Path) -> None:
    MERGED.mkdir()
    (MERGED / "thesis.doc").write_text("years")
    said = _merge()
    assert said.code == 5
    assert "something is there already" in said.err
    assert (MERGED / "thesis.doc").read_text() == "years"
    shutil.rmtree(MERGED)
    MERGED.write_text("a file")
    assert _merge().code == 5
    assert MERGED.read_text() == "a file"


def test_a_damaged_merge_is_not_taken_for_done(finished: Path) -> None:
    assert _merge().code == 0
    with (MERGED / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x42")
    assert _merge().code == 5


def test_leftovers_of_a_killed_merge_are_cleared(finished: Path) -> None:
    leftover = Path("merged.tmp-1")
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    assert _merge().code == 0
    assert not leftover.exists()


def test_into_the_published_weights(work: Path) -> None:
    """A 4-bit run moves by design when it is folded into weights that it never saw; a looser bound says nonsense only.

    The quantisation error of a random model is large, so the base here holds values that nf4 keeps nearly.
    """
    weights = load_file("base/model.safetensors")
    for name, value in weights.items():
        if name.endswith("_proj.weight"):
            weights[name] = frozen_linear.replay(value.float(), "nf4", True).to(value.dtype)
    save_file(weights, "base/model.safetensors", {"format": "pt"})
    assert runs.train().code == 0
    said = _merge("--base", "original")
    assert said.code == 0, said.err
    note = json.loads((MERGED / "finetune.json").read_text())
    assert (note["base_choice"], note["quantised_as"], note["proof"]["bound"]) == ("original", None, 0.1)
    adapter, config = load_file(OUTPUT / "adapter" / "adapter_model.safetensors"), {"scaling": 2.0}
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    wanted = (weights[f"{name}.weight"].float() + config["scaling"] * b @ a).to(torch.bfloat16)
    assert torch.equal(load_file(MERGED / "model.safetensors")[f"{name}.weight"], wanted)


@pytest.mark.parametrize("choice", ["replayed", "original"])
def test_a_wrong_fold_is_found_and_cannot_be_used(finished: Path, monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    _awake(OUTPUT / "adapter")
    real = merge._scaling
    monkeypatch.setattr(merge, "_scaling", lambda *arguments: 5 * real(*arguments))
    said = _merge("--base", choice)
    assert said.code == 1
    assert said.err.startswith("check failed: merged: the merged model differs: mean KL ")
    assert len(said.err.splitlines()) == 1
    assert not (MERGED / "config.json").exists()
    assert (MERGED / "config.json.unusable").exists()
    assert "merged" not in json.loads((OUTPUT / "scores.json").read_text())
    with pytest.raises(ModelError, match=r"no config\.json"):
        bases.inspect(MERGED)
    assert finetune("chat", str(MERGED)).code == 4
    monkeypatch.undo()
    monkeypatch.chdir(finished)
    assert _merge("--base", choice).code == 5  # what failed stays to be looked at


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_smaller_errors_are_found_too(finished: Path, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    _awake(OUTPUT / "adapter")
    real = merge._scaling
    monkeypatch.setattr(merge, "_scaling", lambda *arguments: factor * real(*arguments))
    assert _merge().code == 1


def test_a_base_that_is_not_replayed_is_found(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S10: the fold goes into weights that the run never saw."""
    monkeypatch.setattr(frozen_linear, "replay", lambda value, *_: value)
    assert _merge().code == 1


def test_one_flipped_bit_of_the_adapter_is_refused(finished: Path) -> None:
    path = OUTPUT / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)
    said = _merge()
    assert said.code == 4
    assert "adapter_model.safetensors is damaged (its digest differs)" in said.err
    assert not MERGED.exists()


def test_another_base_is_refused(finished: Path, build_tiny: Build) -> None:
    shutil.rmtree("base")
    build_tiny(Path("base"), seed=1)  # the same shapes, other weights: PEFT would load it without a word
    said = _merge()
    assert said.code == 4
    assert "the base is not the one that this run trained on" in said.err
    assert not MERGED.exists()


def test_changed_data_is_refused(finished: Path) -> None:
    with Path("eval.jsonl").open("a") as file:
        file.write(json.dumps(runs.chat("a", "b")) + "\n")
    said = _merge()
    assert said.code == 3
    assert "eval.jsonl: this file is not the one that the run began with" in said.err


def test_an_unfinished_run_is_refused(finished: Path) -> None:
    (OUTPUT / "finished.json").unlink()
    said = _merge()
    assert said.code == 4
    assert "this run is not finished" in said.err
    assert finetune("merge", "base", "--out", "merged").code == 4


def test_a_full_disk_is_refused_before_the_work(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune import hardware

    real = hardware.free_disk
    monkeypatch.setattr(hardware, "free_disk", lambda path: 1000 if "merged" in str(path) else real(path))
    said = _merge()
    assert said.code == 5
    assert "the merged model needs" in said.err
    assert not MERGED.exists()


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
            folded = merge.fold_tensor(shard[f"{name}.weight"], merge.Fold(replay=True), form, {})
            assert torch.equal(folded, frozen_linear.dense_weight(module, model.DTYPES[compute]).float()), name
