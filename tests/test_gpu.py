"""What only a CUDA card can show. Run by ``make test-gpu``; on a machine without one every test says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune.cli import main_in_process
from finetune.kernels import flash_attention, varlen_attention
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card on this machine: not run"),
]


@pytest.fixture
def recipe(tmp_path: Path, build_tiny: Callable[..., Path], dates: Path) -> Callable[..., list[str]]:
    """Arguments of a run of tiny.yaml on a base of its own."""
    base = build_tiny(tmp_path / "base")
    root = Path(__file__).resolve().parents[1]

    def arguments(name: str, **keys: object) -> list[str]:
        settings = {
            "model": base, "output": tmp_path / name, "data.train_path": dates / "train.jsonl",
            "data.eval_path": dates / "eval.jsonl", **keys,
        }  # fmt: skip
        sets = [f"--set={key.replace('__', '.')}={value}" for key, value in settings.items()]
        return ["train", str(root / "recipes" / "tiny.yaml"), *sets]

    return arguments


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("weights", ["nf4", "fp4", "int8", "bf16", "fp32"])
def test_every_base_form_trains_and_merges(recipe: Callable[..., list[str]], tmp_path: Path, weights: str) -> None:
    compute = "fp32" if weights == "fp32" else "bf16"
    double = {} if weights in ("nf4", "fp4") else {"quantize__double": "true"}
    assert main_in_process(recipe("run", quantize__weights=weights, quantize__compute=compute, **double)) == 0
    course = losses(tmp_path / "run")
    assert course[-1] < course[0]
    assert main_in_process(["merge", str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0


def test_repeat_and_resume_are_bit_identical(recipe: Callable[..., list[str]], tmp_path: Path) -> None:
    weights = "adapter/adapter_model.safetensors"
    for name in ("one", "two"):
        assert main_in_process(recipe(name)) == 0
    assert (tmp_path / "one" / weights).read_bytes() == (tmp_path / "two" / weights).read_bytes()
    constant = {"train__schedule": "constant"}
    assert main_in_process(recipe("whole", **constant)) == 0
    assert main_in_process(recipe("parts", train__steps=6, **constant)) == 0
    assert main_in_process([*recipe("parts", **constant), "--extend"]) == 0
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "parts" / weights).read_bytes()


@pytest.mark.parametrize("kind", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit", "lora_fa", "riemannian"])
def test_every_optimizer_resumes_bit_identical(recipe: Callable[..., list[str]], tmp_path: Path, kind: str) -> None:
    """Rank 1024: tensors large enough for 8-bit states, and for bitsandbytes to page them (from 100,000 values)."""
    keys = {"train__optimizer": kind, "train__schedule": "constant", "adapter__r": 1024, "quantize__weights": "bf16"}
    keys |= {"adapter__modules_to_save": "[lm_head]", "adapter__lora_alpha": 1024}
    if kind in ("lora_fa", "riemannian"):
        keys |= {"adapter__r": 8, "adapter__lora_alpha": 8}
    assert main_in_process(recipe("whole", **keys)) == 0
    assert main_in_process(recipe("parts", train__steps=6, **keys)) == 0
    assert main_in_process([*recipe("parts", **keys), "--extend"]) == 0
    weights = "adapter/adapter_model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "parts" / weights).read_bytes()
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0]


def test_the_original_qwen_layout_trains_and_goes_back(
    recipe: Callable[..., list[str]], tmp_path: Path, build_tiny: Callable[..., Path]
) -> None:
    from tests import qwen1

    base = qwen1.build(tmp_path / "qwen1", build_tiny)
    assert main_in_process(recipe("run", model=base, quantize__compute="bf16")) == 0
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    for layout in ("native", "original"):
        out = tmp_path / layout
        assert main_in_process(["merge", str(tmp_path / "run"), "--out", str(out), "--layout", layout]) == 0


def test_fp16_scales_its_loss(recipe: Callable[..., list[str]], tmp_path: Path) -> None:
    assert main_in_process(recipe("run", quantize__compute="fp16")) == 0
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss_scale"] > 1


def test_card_gives_the_processors_losses(
    recipe: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main_in_process(recipe("card", quantize__weights="fp32")) == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main_in_process(recipe("processor", quantize__weights="fp32")) == 0
    for card, processor in zip(losses(tmp_path / "card"), losses(tmp_path / "processor"), strict=True):
        assert card == pytest.approx(processor, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("heads", "width"), [((8, 2), 64), ((4, 4), 128)])
def test_packed_attention_equals_the_reference(dtype: torch.dtype, heads: tuple[int, int], width: int) -> None:
    """Through torch's flash attention where it passes its trial, through dense kernels where not: it says which."""
    bounds, device = (0, 37, 64, 65, 300), torch.device("cuda")
    drawn = torch.Generator(device).manual_seed(0)
    states = [
        torch.randn(1, count, 300, width, generator=drawn, device=device).to(dtype).requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    ]
    print(f"{dtype}: flash {flash_attention.works(device, dtype, *heads, width)}")
    fast = varlen_attention.attend(*states, varlen_attention.lay_out(bounds, device))
    wide = [one.detach().double().cpu().requires_grad_() for one in states]
    slow = varlen_attention.reference(*wide, bounds)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert tiny.distance(fast.cpu(), slow) < bound
    slope = torch.randn(slow.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = torch.autograd.grad(fast, states, slope.to(device, dtype))
    for one, two in zip(found, torch.autograd.grad(slow, wide, slope), strict=True):
        assert tiny.distance(one.cpu(), two) < bound
