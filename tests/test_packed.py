"""Bases whose folders are packed: judged by their tensors' names and shapes, then walked the whole road."""

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
from finetune import budget, forms, loading, model
from finetune.base import Base
from finetune.errors import ModelError
from finetune.kernels.frozen_linear import PackedLinear, dense_weight
from finetune.loading import BaseForm
from finetune.shards import Reader
from tests import packing, runs, tiny
from tests.runs import MERGED, OUTPUT, adapter_digest, finetune, merge_run, train

CASES: dict[str, dict[str, Any]] = {
    "gptq": {"kind": "gptq"},
    "desc_act": {"kind": "gptq", "desc_act": True, "group": 48},
    "sym": {"kind": "gptq", "symmetric": True, "group": -1, "version": "gptq_v2"},
    "awq": {"kind": "awq"},
}
FIRST = "model.layers.0.self_attn.q_proj"
Packed = tuple[Path, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Packed]:
    """Each case's folder, and its matrices in fp64."""
    root = tmp_path_factory.mktemp("packed")
    return {name: (root / name, packing.pack_base(tiny_base, root / name, **how)) for name, how in CASES.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_packed_folder_is_a_base_of_matrices(case: str, folders: dict[str, Packed], tiny_base: Path) -> None:
    folder, dense = folders[case]
    found, plain = bases.inspect(folder), bases.inspect(tiny_base)
    assert {name: one.shape for name, one in found.tensors.items()} == {n: t.shape for n, t in plain.tensors.items()}
    assert "quantization_config" not in found.config
    assert found.shape.packing is not None
    assert any(f"packed by {CASES[case]['kind']}" in note for note in found.notes)
    with Reader(found) as reader:
        for name, wanted in dense.items():
            assert torch.equal(reader.tensor(name).double(), wanted), name
            rows = reader.streamed(name)
            assert torch.equal(rows.read(3, 17).double(), wanted[3:17])


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_a_live_layer_acts_as_its_matrix_rounded_once(case: str, compute: str, folders: dict[str, Packed]) -> None:
    folder, dense = folders[case]
    kind, dtype = CASES[case]["kind"], loading.DTYPES[compute]
    policy = tiny.load(folder, kind, compute)
    layers = {name: one for name, one in policy.model.named_modules() if isinstance(one, PackedLinear)}
    assert len(layers) == 14
    assert {f"{name}.weight" for name in layers} == set(dense)
    for name, layer in layers.items():
        wanted = dense[f"{name}.weight"].to(dtype)
        assert torch.equal(dense_weight(layer, dtype), wanted)
        assert torch.equal(layer.weight, wanted)
        # A merge replays it from the folder, rounded as it acts.
        assert torch.equal(forms.get(kind).replay(kind, wanted, double=True), wanted)
        # Wider activations change no number of it.
        assert torch.equal(dense_weight(layer, torch.float32), wanted.float())
    ids = torch.arange(3, 40)[None]
    logits = policy.causal_lm(input_ids=ids).logits
    plain = tiny.load(folder, compute, compute).causal_lm(input_ids=ids).logits
    if compute == "fp32":
        assert torch.equal(logits, plain)
    trainable = tiny.adapt(policy)
    assert all(value.any() for value in tiny.gradient_of(trainable, tiny.samples([5, 9])).values())


def test_a_tied_base_whose_other_tensors_are_fp16(build_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """As such folders are published: no bias, one matrix for embedding and head, and a float16 config."""
    source = build_tiny(tmp_path / "base", family="llama", tie_word_embeddings=True, dtype="float16")
    packing.pack_base(source, tmp_path / "packed", "gptq")
    policy = tiny.load(tmp_path / "packed", "gptq")
    assert not any(value.is_meta for value in policy.model.parameters())
    assert policy.head.weight is policy.causal_lm.get_input_embeddings().weight
    ids = torch.arange(3, 40)[None]
    plain = tiny.load(tmp_path / "packed", "fp32").causal_lm(input_ids=ids).logits
    assert torch.equal(policy.causal_lm(input_ids=ids).logits, plain)
    assert policy.generate([[1, 2, 3]], max_new_tokens=3) == tiny.load(tmp_path / "packed", "fp32").generate(
        [[1, 2, 3]], max_new_tokens=3
    )


@pytest.mark.parametrize("case", CASES)
def test_the_plan_counts_what_is_held(case: str, folders: dict[str, Packed]) -> None:
    found = bases.inspect(folders[case][0])
    kind = CASES[case]["kind"]
    policy = model.load_base(found, BaseForm(weights=kind, double=True, compute="bf16", device="cpu"))
    held = [one.held for one in policy.model.modules() if isinstance(one, PackedLinear)]
    bytes_held = sum(part.nbytes for one in held for part in (one.codes, one.zeros, one.scales))
    rest = {id(value): value.nbytes for value in policy.model.parameters() if value.is_floating_point()}
    counted = budget.weight_bytes(kind, True, "bf16", found.shape, "cpu")
    assert counted == pytest.approx(bytes_held + sum(rest.values()), rel=0.03)
    assert counted < 0.7 * budget.weight_bytes("bf16", True, "bf16", found.shape, "cpu")


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")


def _put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.__setitem__(f"{FIRST}.{name}", value)


FAULTS: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], None], str]] = {
    "no g_idx": ("gptq", lambda t: t.pop(f"{FIRST}.g_idx"), f"tensor {FIRST}.g_idx is missing"),
    "no zeros": ("awq", lambda t: t.pop(f"{FIRST}.qzeros"), f"tensor {FIRST}.qzeros is missing"),
    "3 bits": ("gptq", _put("qweight", torch.zeros(6, 64, dtype=torch.int32)), f"tensor {FIRST}.qweight is [6, 64]"),
    "the other's order": (
        "awq", _put("qweight", torch.zeros(8, 64, dtype=torch.int32)), f"tensor {FIRST}.qweight is [8, 64]",
    ),
    "other groups": ("gptq", _put("scales", torch.zeros(1, 64).half()), f"tensor {FIRST}.scales is [1, 64]"),
    "words of 64 bits": (
        "gptq", _put("qweight", torch.zeros(8, 64, dtype=torch.int64)), f"tensor {FIRST}.qweight is stored as I64",
    ),
    "not packed": ("gptq", _put("weight", torch.zeros(64, 64)), f"tensor {FIRST}.weight is not packed"),
    "a stranger": ("gptq", _put("qscale", torch.zeros(3)), f"tensor {FIRST}.qscale belongs to no part"),
    "a packed head": ("gptq", lambda t: t.__setitem__("lm_head.qweight", torch.zeros(1)), "tensor lm_head.qweight"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda name: name.replace(" ", "-"))
def test_a_malformed_folder_is_refused_by_the_tensors_name(
    fault: str, folders: dict[str, Packed], tmp_path: Path
) -> None:
    case, change, said = FAULTS[fault]
    folder = tmp_path / "base"
    shutil.copytree(folders[case][0], folder)
    changed(folder, change)
    with pytest.raises(ModelError) as caught:
        bases.inspect(folder)
    assert said in caught.value.faults[0].what
    assert caught.value.faults[0].fix


NUMBERS: dict[str, tuple[str, torch.Tensor, str]] = {
    "a group that is not there": ("g_idx", torch.full((64,), 2, dtype=torch.int32), "g_idx names group 2 of 2"),
    "a group below 0": ("g_idx", torch.full((64,), -1, dtype=torch.int32), "g_idx names group -1 of 2"),
    "scales that are no numbers": ("scales", torch.full((2, 64), float("nan")).half(), "scales hold NaN"),
}


@pytest.mark.parametrize("fault", NUMBERS, ids=lambda name: name.replace(" ", "-"))
def test_numbers_that_cannot_be_are_refused_when_read(fault: str, folders: dict[str, Packed], tmp_path: Path) -> None:
    last, value, said = NUMBERS[fault]
    folder = tmp_path / "base"
    shutil.copytree(folders["gptq"][0], folder)
    changed(folder, _put(last, value))
    with pytest.raises(ModelError) as caught:
        tiny.load(folder, "gptq")
    assert said in caught.value.faults[0].what
    assert FIRST in caught.value.faults[0].what


def test_a_mixture_that_config_denies_is_refused(folders: dict[str, Packed], tmp_path: Path, tiny_base: Path) -> None:
    """Full-precision weights under a packed config, and packed weights under one that says nothing of it."""
    for weights, config in ((tiny_base, folders["gptq"][0]), (folders["awq"][0], tiny_base)):
        folder = tmp_path / weights.name
        shutil.copytree(weights, folder)
        shutil.copyfile(config / "config.json", folder / "config.json")
        with pytest.raises(ModelError):
            bases.inspect(folder)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    runs.furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_recipe_must_name_the_form_that_lies_there(
    place: Path, folders: dict[str, Packed], tiny_base: Path
) -> None:
    shutil.copytree(folders["gptq"][0], "base")
    for word, said in (("nf4", "a second time"), ("torchao_int8", "a second time"), ("awq", "packed as gptq")):
        refused = train(f"quantize.weights={word}")
        assert refused.code == 2
        assert said in refused.err
        assert "write gptq" in refused.err
    assert "quantize.weights" in refused.err
    assert not OUTPUT.exists()
    shutil.rmtree("base")
    shutil.copytree(tiny_base, "base")
    assert "not packed as gptq" in train("quantize.weights=gptq").err


@pytest.mark.parametrize(("case", "compute"), [("gptq", "bf16"), ("desc_act", "fp32"), ("awq", "bf16")])
def test_trained_resumed_merged_and_proved(case: str, compute: str, place: Path, folders: dict[str, Packed]) -> None:
    kind = CASES[case]["kind"]
    shutil.copytree(folders[case][0], "base")
    digest = runs.snapshot(Path("base"))
    sets = (f"quantize.weights={kind}", f"quantize.compute={compute}")
    assert train(*sets).code == 0
    runs.train_in_two(*sets, out=Path("runs/two"))
    assert adapter_digest(Path("runs/two")) == adapter_digest()
    losses = [line["loss"] for line in runs.metrics()]
    assert losses[-1] < losses[0]
    runs.awake(OUTPUT / "adapter")
    said = merge_run("--json")
    assert said.code == 0, said.err
    assert f"14 are dequantised from {kind}" in said.err
    note = json.loads((MERGED / "finetune.json").read_text())
    assert (note["quantised_as"], note["base_choice"], note["choices"]) == (kind, "replayed", {})
    assert note["proof"]["mean_kl"] < 1e-3
    merged = bases.inspect(MERGED)
    assert merged.shape.packing is None
    assert merged.tensors[f"{FIRST}.weight"].dtype == "BF16"
    assert json.loads((MERGED / "config.json").read_text())["dtype"] == "bfloat16"
    _refuse_apart(merged, folders[case][1])
    assert finetune("prove", str(OUTPUT), str(MERGED)).code == 0
    assert runs.snapshot(Path("base")) == digest


def _refuse_apart(merged: Base, dense: dict[str, torch.Tensor]) -> None:
    """Beside the update, each merged matrix is the dequantised one, to the rounding of bf16."""
    weights = load_file(OUTPUT / "adapter" / "adapter_model.safetensors")
    with Reader(merged) as reader:
        for name, before in dense.items():
            a, b = (weights[f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight"] for x in "AB")
            wanted = before + 2 * (b.double() @ a.double())
            apart = (reader.tensor(name).double() - wanted).abs()
            # Rounded as it acts, to the nearest, and once more as it is written, up or down.
            assert bool((apart <= 2**-8 * before.abs() + 2**-7 * wanted.abs() + 1e-6).all()), name


def test_a_merge_that_forgets_the_update_is_refused(
    place: Path, folders: dict[str, Packed], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof sees it: the dequantised base alone is not the trained model."""
    from finetune import fold

    shutil.copytree(folders["awq"][0], "base")
    assert train("quantize.weights=awq").code == 0
    runs.awake(OUTPUT / "adapter")
    monkeypatch.setattr(fold, "_updated", lambda block, *_: (0.0, block))
    refused = merge_run()
    assert refused.code == 1
    assert "the merged model differs" in refused.err
    assert not (MERGED / "config.json").exists()
