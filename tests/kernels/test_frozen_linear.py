from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file

from finetune import loading, loop
from finetune.forms import bitsandbytes as bnb_form
from finetune.forms.bitsandbytes import FrozenLinear4bit, FrozenLinear8bit
from finetune.kernels import frozen_linear
from finetune.kernels.frozen_linear import dense_weight, held_dense
from finetune.model import Policy
from finetune.objectives import sft
from tests import tiny

# (weights, double quantisation)
FORMS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False)]
COMPUTES = ["bf16", "fp32"]
Load = Callable[..., Policy]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, build_tiny: Callable[..., Path]) -> dict[str, Path]:
    """qwen2 has biases on q, k and v; llama has none. Widths that no block of 64 fits evenly into each row of."""
    root, odd = tmp_path_factory.mktemp("families"), {"intermediate_size": 104}
    return {family: build_tiny(root / family, family=family, **odd) for family in ("qwen2", "llama")}


def packed(policy: Policy) -> Iterator[tuple[str, Any]]:
    """Every quantised linear, by the name that it has in the base."""
    for name, module in policy.causal_lm.named_modules():
        if isinstance(module, (FrozenLinear4bit, FrozenLinear8bit)):
            yield name.removesuffix(".base_layer"), module


def by_hand(layer: Any) -> torch.Tensor:
    """The weight in fp32 from its codes, by the papers' definitions (QLoRA, section 3; LLM.int8, section 2.1)."""
    codes = layer.weight.data
    if isinstance(layer, FrozenLinear8bit):
        return codes.float() * layer.weight.SCB[:, None] / 127
    state = layer.weight.quant_state
    nibbles = torch.stack([codes.reshape(-1) >> 4, codes.reshape(-1) & 15], dim=1).reshape(-1).long()
    scales = state.absmax
    if state.nested:
        inner = state.state2
        blocks = torch.arange(len(scales)) // inner.blocksize
        scales = inner.code[scales.long()] * inner.absmax[blocks] + state.offset
    flat = state.code[nibbles][: state.shape.numel()]
    return (flat * scales[torch.arange(len(flat)) // state.blocksize]).reshape(state.shape)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize(("form", "double"), FORMS)
def test_dense_weight_is_what_the_codes_say(bases: dict[str, Path], form: str, double: bool, compute: str) -> None:
    dtype = loading.DTYPES[compute]
    layers = dict(packed(tiny.load(bases["qwen2"], form, compute, double=double)))
    assert len(layers) == 14
    for layer in layers.values():
        found = dense_weight(layer, dtype)
        assert found.dtype == dtype
        # bf16 holds 8 bits: a last digit of fp32 may fall on the other side of a rounding edge.
        torch.testing.assert_close(found, by_hand(layer).to(dtype), rtol=1e-6 if compute == "fp32" else 2**-7, atol=0)
        if form == "int8":
            theirs = bnb.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB).to(dtype)
        else:
            theirs = bnb.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        torch.testing.assert_close(found, theirs, rtol=1e-6 if compute == "fp32" else 2**-7, atol=0)
        assert form == "int8" or torch.equal(found, theirs)


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize(("form", "double"), FORMS)
def test_replay_of_the_shard_is_the_live_weight(
    bases: dict[str, Path], family: str, form: str, double: bool, compute: str
) -> None:
    stored = load_file(bases[family] / "model.safetensors")
    dtype = loading.DTYPES[compute]
    layers = dict(packed(tiny.load(bases[family], form, compute, double=double)))
    assert len(layers) == 14
    for name, layer in layers.items():
        anew = bnb_form.replay(form, stored[f"{name}.weight"].to(dtype), double=double)
        assert anew.dtype == dtype
        assert torch.equal(anew, dense_weight(layer, dtype)), name


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize(("form", "double"), FORMS)
def test_forward_and_backward_are_the_dense_product(
    bases: dict[str, Path], form: str, double: bool, compute: str
) -> None:
    dtype = loading.DTYPES[compute]
    for _, layer in packed(tiny.load(bases["qwen2"], form, compute, double=double)):
        x = torch.randn(2, 3, layer.in_features, dtype=dtype, requires_grad=True)
        y = layer(x)
        assert y.dtype == dtype
        plain = torch.nn.functional.linear(x, dense_weight(layer, dtype))
        assert torch.equal(y, plain if layer.bias is None else plain + layer.bias)
        slope = torch.randn_like(y)
        assert torch.equal(torch.autograd.grad(y, x, slope)[0], slope @ dense_weight(layer, dtype))


@pytest.mark.parametrize("compute", COMPUTES)
@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize(("form", "double"), FORMS)
def test_evaluation_leaves_gradients_and_weights_as_they_were(
    bases: dict[str, Path], family: str, form: str, double: bool, compute: str
) -> None:
    policy = tiny.adapt(tiny.load(bases[family], form, compute, double=double))
    examples = tiny.samples([5, 9])
    before = tiny.gradient_of(policy, examples)
    assert all(value.any() for value in before.values())
    held = {name: (layer.weight.data.clone(), dense_weight(layer, torch.float32)) for name, layer in packed(policy)}

    def unharmed() -> None:
        assert tiny.same(tiny.gradient_of(policy, examples), before)
        for name, layer in packed(policy):
            assert torch.equal(layer.weight.data, held[name][0])
            assert torch.equal(dense_weight(layer, torch.float32), held[name][1])

    with policy.evaluating():
        sft.loss(policy, sft.collate(tiny.samples([1 + 1])))  # one prediction: the shape of a step of generation
        policy.causal_lm(torch.tensor([[7]]))
    unharmed()
    with policy.evaluating(adapter=False):
        policy.generate([[1, 2, 3], [4]], max_new_tokens=3)
    unharmed()
    with held_dense(policy.model):
        unharmed()
    unharmed()


@pytest.mark.parametrize(("form", "double"), FORMS)
def test_training_changes_no_base_weight(bases: dict[str, Path], form: str, double: bool) -> None:
    policy = tiny.adapt(tiny.load(bases["qwen2"], form, "bf16", double=double))
    names = {name for name, value in policy.causal_lm.named_parameters() if not value.requires_grad}
    before = {name: value.data.clone() for name, value in policy.causal_lm.named_parameters() if name in names}
    dense = {name: dense_weight(layer, torch.float32) for name, layer in packed(policy)}
    optimizer = tiny.adamw(policy, 0.1)
    plan = tiny.course([(0, 1), (1, 0), (0, 1)], peak_rate=0.1)
    assert len(list(loop.run(policy, sft, tiny.samples([6, 11]), plan, optimizer))) == 3
    after = {name: value.data for name, value in policy.causal_lm.named_parameters() if name in names}
    assert tiny.same(before, after)
    assert tiny.same(dense, {name: dense_weight(layer, torch.float32) for name, layer in packed(policy)})


def test_held_weights_serve_inside_and_go_afterwards(bases: dict[str, Path]) -> None:
    policy = tiny.load(bases["qwen2"], "nf4", "bf16")
    _, layer = next(packed(policy))
    x = torch.randn(1, layer.in_features, dtype=torch.bfloat16)
    outside = layer(x)
    with held_dense(policy.model):
        assert dense_weight(layer, torch.bfloat16) is layer.held_dense
        assert torch.equal(layer(x), outside)
    assert all(layer.held_dense is None for _, layer in packed(policy))
    with pytest.raises(RuntimeError, match="mat1 and mat2"), held_dense(policy.model):
        layer(x[:, 1:])
    assert all(layer.held_dense is None for _, layer in packed(policy))


def test_freeze_takes_every_quantised_layer_and_no_other(bases: dict[str, Path]) -> None:
    policy = tiny.load(bases["qwen2"], "nf4", "bf16")
    names = {name for name, _ in packed(policy)}
    assert len(names) == 14
    assert all("_proj" in name for name in names)
    assert type(policy.head) is torch.nn.Linear
    bnb_form.freeze(policy.model)
    assert {name for name, _ in packed(policy)} == names


@pytest.mark.parametrize(("weights", "double"), FORMS)
def test_a_shown_linear_has_the_weight_as_it_acts_and_computes_with_it(
    weights: str, double: bool, bases: dict[str, Path]
) -> None:
    policy = tiny.load(bases["qwen2"], weights, double=double)
    held = {name: dense_weight(layer, torch.float32) for name, layer in packed(policy)}
    layers = dict(packed(policy))
    ids = torch.arange(3, 40)[None]
    before = policy.causal_lm(input_ids=ids).logits
    frozen_linear.show(policy.model)
    frozen_linear.show(policy.model)  # again changes nothing
    for name, weight in held.items():
        shown = policy.causal_lm.get_submodule(name)
        assert type(shown) is frozen_linear.ShownLinear
        assert torch.equal(shown.weight, weight)
        with pytest.raises((AttributeError, KeyError)):
            shown.weight = torch.nn.Parameter(weight)
    assert torch.equal(policy.causal_lm(input_ids=ids).logits, before)
    frozen_linear.hide(policy.model)
    assert all(policy.causal_lm.get_submodule(name) is layer for name, layer in layers.items())
