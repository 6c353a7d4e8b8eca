from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import model
from finetune.kernels import decoder_layer, lora_linear
from finetune.model import Policy
from finetune.objectives import sft
from tests import tiny

LENGTHS = (9, 14, 8, 3)
ALL = tiny.FIELDS["target_modules"]


def gradients(policy: Policy) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The summed loss of one pack, and the gradient of each trained tensor."""
    total = sft.loss(policy, sft.collate(tiny.samples(LENGTHS))).total
    trained = policy.trainable()
    return total, dict(zip(trained, torch.autograd.grad(total, list(trained.values())), strict=True))


def layers(policy: Policy) -> list[Any]:
    return list(policy.causal_lm.model.layers)


def unfused(policy: Policy) -> Policy:
    """The same model with transformers' own layers; attention, linears and head stay as they are."""
    for layer in layers(policy):
        kind = type(layer)
        assert issubclass(kind, decoder_layer._Layer)
        layer.__class__ = kind.__mro__[2]
    return policy


def copy(one: Policy, other: Policy) -> None:
    """Give ``other`` the adapter of ``one``."""
    with torch.no_grad():
        for name, value in other.trainable().items():
            value.copy_(one.trainable()[name])


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that a layer takes its own steps."""
    calls: list[int] = []
    real = decoder_layer._attended

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(decoder_layer, "_attended", counted)
    return calls


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["down_proj"], ["o_proj", "gate_proj"]])
def test_loss_and_gradients_equal_those_of_transformers_layers(
    family: str, targets: list[str], build_tiny: Callable[..., Path], tmp_path: Path, fused_calls: list[int]
) -> None:
    folder = build_tiny(tmp_path / family, family=family)
    one, found = gradients(tiny.adapt(tiny.exact(folder), target_modules=targets))
    assert len(fused_calls) == 2
    two, wanted = gradients(unfused(tiny.adapt(tiny.exact(folder), target_modules=targets)))
    assert len(fused_calls) == 2
    assert tiny.distance(one, two) < 1e-13
    assert found.keys() == wanted.keys()
    for name in found:
        assert tiny.distance(found[name], wanted[name]) < 1e-11, name


@pytest.mark.parametrize("weights", ["nf4", "int8"])
@pytest.mark.parametrize(("compute", "bound"), [("fp32", 1e-5), ("bf16", 5e-2)])
def test_on_a_packed_base(tiny_base: Path, weights: str, compute: str, bound: float) -> None:
    one, found = gradients(tiny.adapt(tiny.load(tiny_base, weights, compute)))
    two, wanted = gradients(unfused(tiny.adapt(tiny.load(tiny_base, weights, compute))))
    assert tiny.distance(one, two) < bound
    assert max(tiny.distance(found[name], wanted[name]) for name in found) < bound


def test_what_is_not_covered_goes_through_transformers_own(tiny_base: Path, fused_calls: list[int]) -> None:
    policy = tiny.adapt(tiny.load(tiny_base), use_dora=True)
    policy.model.train()
    assert sft.loss(policy, sft.collate(tiny.samples(LENGTHS))).total.isfinite()
    assert not fused_calls


def test_generation_goes_through_transformers_own(tiny_base: Path, fused_calls: list[int]) -> None:
    policy = tiny.adapt(tiny.load(tiny_base))
    with policy.evaluating():
        policy.generate([[5, 6, 7]], 3)
    assert not fused_calls


def test_other_activations_are_left_alone(build_tiny: Callable[..., Path], tmp_path: Path) -> None:
    policy = tiny.adapt(tiny.load(build_tiny(tmp_path / "gelu", hidden_act="gelu")))
    assert not any(isinstance(layer, decoder_layer._Layer) for layer in layers(policy))


def test_less_is_kept_for_the_backward_pass(tiny_base: Path) -> None:
    """Bytes that autograd holds between forward and backward, the packed base and masters aside."""

    def kept(policy: Policy) -> int:
        sizes = dict[int, int]()
        weights = {value.untyped_storage().data_ptr() for value in policy.model.parameters()}

        def note(value: torch.Tensor) -> torch.Tensor:
            place = value.untyped_storage()
            if place.data_ptr() not in weights:
                sizes[place.data_ptr()] = place.nbytes()
            return value

        with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
            total = sft.loss(policy, sft.collate(tiny.samples([40, 40]))).total
        held = sum(sizes.values())
        total.backward()
        return held

    one, two = kept(tiny.adapt(tiny.load(tiny_base))), kept(unfused(tiny.adapt(tiny.load(tiny_base))))
    assert one < 0.7 * two


def test_a_trained_norm_goes_through_transformers_own(tiny_base: Path, fused_calls: list[int]) -> None:
    policy = tiny.adapt(tiny.load(tiny_base))
    layers(policy)[0].input_layernorm.weight.requires_grad_(True)
    total, found = gradients(policy)
    assert len(fused_calls) == 1  # the other layer
    assert any("input_layernorm" in name for name in found)
    assert total.isfinite()


def test_without_the_adapter_it_is_the_base(tiny_base: Path, fused_calls: list[int]) -> None:
    base, adapted = tiny.load(tiny_base), tiny.adapt(tiny.load(tiny_base))
    batch = sft.collate(tiny.samples(LENGTHS))
    with base.evaluating(), adapted.evaluating(adapter=False):
        one, two = sft.loss(base, batch).total, sft.loss(adapted, batch).total
    assert len(fused_calls) == 4
    assert torch.equal(two, one)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_switched_off_it_is_transformers_and_pefts(
    family: str, build_tiny: Callable[..., Path], tmp_path: Path, fused_calls: list[int]
) -> None:
    folder = build_tiny(tmp_path / family, family=family)
    fast = tiny.adapt(tiny.load(folder, "nf4"))
    off = model.attach(tiny.load(folder, "nf4"), tiny.FIELDS, 0, kernels=False)
    copy(fast, off)
    assert not any(isinstance(module, lora_linear._Fused) for module in off.model.modules())
    one, found = gradients(fast)
    two, wanted = gradients(off)
    assert len(fused_calls) == 2
    assert tiny.distance(one, two) < 1e-6
    assert max(tiny.distance(found[name], wanted[name]) for name in found) < 1e-5


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks at it itself
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler for torch.compile")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_compiled_it_is_the_same(family: str, build_tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / family, family=family)
    plain = tiny.adapt(tiny.load(folder))
    made = model.attach(tiny.load(folder), tiny.FIELDS, 0, compiled=True)
    copy(plain, made)
    for lengths in (LENGTHS, (20, 3)):
        one, two = (sft.loss(policy, sft.collate(tiny.samples(lengths))).total for policy in (plain, made))
        assert tiny.distance(two, one) < 1e-6
        found, wanted = (
            torch.autograd.grad(total, list(policy.trainable().values()))
            for total, policy in ((two, made), (one, plain))
        )
        assert max(map(tiny.distance, found, wanted)) < 1e-5


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize(("offload", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.3)])
def test_recomputing_some_layers_keeps_the_bits(tiny_base: Path, count: int, offload: bool, dropout: float) -> None:
    plain = tiny.adapt(tiny.load(tiny_base, "nf4", "bf16"), lora_dropout=dropout)
    plain.model.train()
    torch.manual_seed(0)
    _, wanted = gradients(plain)
    policy = tiny.adapt(tiny.load(tiny_base, "nf4", "bf16"), lora_dropout=dropout)
    policy.recompute_layers(count, offload=offload)
    assert [layer.gradient_checkpointing for layer in layers(policy)] == [index < count for index in range(2)]
    policy.model.train()
    torch.manual_seed(0)
    _, found = gradients(policy)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
