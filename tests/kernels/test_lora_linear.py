from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import bnb as peft_bnb
from peft.tuners.lora import layer as peft_layer
from torch.func import functional_call

from finetune import model
from finetune.forms import bitsandbytes
from finetune.kernels import lora_linear
from finetune.kernels.frozen_linear import dense_weight
from finetune.kernels.lora_linear import Site, reference
from tests import tiny
from tests.tiny import distance

IN, OUT = 64, 96
FORMS = ["plain", "nf4", "fp4", "int8"]


def base_linear(form: str, bias: bool, compute: torch.dtype) -> torch.nn.Module:
    """A frozen linear in that form, as loading makes it."""
    torch.manual_seed(0)
    plain = torch.nn.Linear(IN, OUT, bias=bias, dtype=compute)
    if form == "plain":
        return plain.requires_grad_(False)
    if form == "int8":
        packed: Any = Linear8bitLt(IN, OUT, bias=bias, has_fp16_weights=False)
    else:
        packed = Linear4bit(IN, OUT, bias=bias, compute_dtype=compute, quant_type=form)
    packed.load_state_dict(plain.state_dict())
    return packed.to("cpu").to(compute).requires_grad_(False) if bias else packed.to("cpu").requires_grad_(False)


class Net(torch.nn.Module):
    """Two layers by the names that the tests adapt them under."""

    def __init__(self, form: str, bias: bool, compute: torch.dtype) -> None:
        super().__init__()
        self.q_proj = base_linear(form, bias, compute)
        self.k_proj = base_linear(form, bias, compute)


def adapted(form: str, *, bias: bool = False, compute: torch.dtype = torch.float32, **fields: Any) -> Any:
    """The two fused LoRA layers of a small PEFT model, with B drawn so that they do something."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj"]} | fields
    model = get_peft_model(Net(form, bias, compute), LoraConfig(**settings))
    bitsandbytes.freeze(model)
    lora_linear.fuse(model)
    generator = torch.Generator().manual_seed(1)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            value.data.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    return model.base_model.model


def pefts_own(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """PEFT's forward of the same layer, on the same base."""
    kinds = (peft_bnb.Linear4bit, peft_bnb.Linear8bitLt, peft_layer.Linear)
    kind = next(kind for kind in kinds if isinstance(layer, kind))
    result: torch.Tensor = kind.forward(layer, x)
    return result


def parts(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def inputs(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*(shape or (3, 5)), IN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def slopes(output: torch.Tensor, wanted: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return torch.autograd.grad(output, wanted, slope.to(output.dtype))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 5), (7,)])
def test_fp64_equals_the_reference(form: str, bias: bool, shape: tuple[int, ...]) -> None:
    compute = torch.float64 if form == "plain" else torch.float32
    layer = adapted(form, bias=bias, compute=compute).q_proj
    for value in parts(layer):
        value.data = value.data.double()
    x, (a, b) = inputs(torch.float64, *shape), parts(layer)
    fast = layer(x)
    slow = reference(x, dense_weight(layer.base_layer, torch.float64), a, b, 2.0)
    if bias:
        slow = slow + layer.base_layer.bias.double()
    assert fast.dtype == torch.float64
    assert distance(fast, slow) < 1e-13
    for one, two in zip(slopes(fast, [x, a, b]), slopes(slow, [x, a, b]), strict=True):
        assert distance(one, two) < 1e-13


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_equals_the_truth_and_pefts_own(form: str, bias: bool, dtype: torch.dtype, bound: float) -> None:
    layer = adapted(form, bias=bias, compute=dtype).q_proj
    x, (a, b) = inputs(dtype), parts(layer)
    assert a.dtype == b.dtype == torch.float32
    fast, peft = layer(x), pefts_own(layer, x)
    wide = [value.detach().double().requires_grad_() for value in (x, a, b)]
    truth = reference(wide[0], dense_weight(layer.base_layer, torch.float64), wide[1], wide[2], 2.0)
    if bias:
        truth = truth + layer.base_layer.bias.double()
    assert fast.dtype == peft.dtype == dtype
    assert distance(fast, truth) < bound
    assert distance(fast, peft) < 2 * bound
    ours, theirs, true = slopes(fast, [x, a, b]), slopes(peft, [x, a, b]), slopes(truth, wide)
    for one, two, three in zip(ours, theirs, true, strict=True):
        assert one.dtype == two.dtype
        assert distance(one, three) < bound
        assert distance(one, two) < 2 * bound


@pytest.mark.parametrize(("fields", "scaling"), [({"use_rslora": True}, 4.0), ({}, 2.0), ({"lora_alpha": 3}, 0.75)])
def test_scaling(fields: dict[str, Any], scaling: float) -> None:
    layer = adapted("plain", **fields).q_proj
    x, (a, b) = inputs(torch.float32), parts(layer)
    assert distance(layer(x), reference(x, layer.base_layer.weight, a, b, scaling)) < 1e-6


def test_rank_and_alpha_by_pattern() -> None:
    net = adapted("plain", rank_pattern={"k_proj": 2}, alpha_pattern={"k_proj": 6})
    assert [parts(layer)[0].shape[0] for layer in (net.q_proj, net.k_proj)] == [4, 2]
    x = inputs(torch.float32)
    for layer, scaling in ((net.q_proj, 2.0), (net.k_proj, 3.0)):
        assert distance(layer(x), reference(x, layer.base_layer.weight, *parts(layer), scaling)) < 1e-6


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that the fused step runs."""
    calls: list[int] = []
    real = lora_linear._LoraMatmul.apply

    def counted(*args: Any) -> torch.Tensor:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(lora_linear._LoraMatmul, "apply", counted)
    return calls


@pytest.mark.parametrize("form", FORMS)
def test_dropout_acts_in_training_only(form: str, fused_calls: list[int]) -> None:
    layer = adapted(form, lora_dropout=0.5).q_proj
    x = inputs(torch.float32)
    layer.train()
    torch.manual_seed(5)
    dropped = layer(x)
    torch.manual_seed(5)
    assert torch.equal(dropped, layer(x))
    assert not torch.equal(dropped, layer(x))
    assert len(fused_calls) == 3
    layer.eval()
    assert distance(layer(x), pefts_own(layer, x)) < 1e-6
    assert not torch.equal(layer(x), dropped)


def test_dropout_by_its_definition() -> None:
    """The adapter, and it alone, sees x times a mask over the share that is kept, which the gradients pass too."""
    site = Site(base=None, scaling=2.0, a=None, b=None, dropout=0.25, seed=11)
    mask = site.dropped(torch.ones(3, IN, dtype=torch.float64))
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.75}
    assert abs(site.dropped(torch.ones(400, 500)).mean() - 1) < 0.01
    layer = adapted("plain", compute=torch.float64).q_proj
    for value in parts(layer):
        value.data = value.data.double()
    x, (a, b) = inputs(torch.float64, 3), parts(layer)
    kept = Site(base=layer.base_layer, scaling=2.0, a=a, b=b, dropout=0.25, seed=11)
    (fast,) = lora_linear.apply(x, [kept])
    slow = x @ layer.base_layer.weight.T + 2.0 * (x * mask) @ a.T @ b.T
    assert distance(fast, slow) < 1e-13
    for one, two in zip(slopes(fast, [x, a, b]), slopes(slow, [x, a, b]), strict=True):
        assert distance(one, two) < 1e-13


def test_linears_with_one_input_go_through_together() -> None:
    net = adapted("plain", compute=torch.float64, rank_pattern={"k_proj": 2})
    for value in [*parts(net.q_proj), *parts(net.k_proj)]:
        value.data = value.data.double()
    x, sites = inputs(torch.float64), [lora_linear.site(layer) for layer in (net.q_proj, net.k_proj)]
    sites.insert(1, lora_linear.site(net.q_proj.base_layer))  # one without an adapter between them
    together = lora_linear.apply(x, sites)
    alone = [net.q_proj(x), net.q_proj.base_layer(x), net.k_proj(x)]
    wanted = [x, *parts(net.q_proj), *parts(net.k_proj)]
    for one, two in zip(together, alone, strict=True):
        assert distance(one, two) < 1e-14
    for one, two in zip(slopes(torch.cat(together, -1), wanted), slopes(torch.cat(alone, -1), wanted), strict=True):
        assert distance(one, two) < 1e-13


@pytest.mark.parametrize("form", FORMS)
def test_masks_of_different_linears_are_their_own(form: str) -> None:
    net = adapted(form, lora_dropout=0.5)
    net.train()
    seeds = {lora_linear.site(layer).seed for layer in (net.q_proj, net.k_proj)}
    assert len(seeds) == 2


@pytest.mark.parametrize("form", FORMS)
def test_dora_goes_through_peft(form: str, fused_calls: list[int]) -> None:
    layer = adapted(form, use_dora=True).q_proj
    x = inputs(torch.float32)
    output = layer(x)
    assert torch.equal(output, pefts_own(layer, x))
    w, (a, b) = dense_weight(layer.base_layer, torch.float32), parts(layer)
    direction = w + 2.0 * b @ a
    length = layer.lora_magnitude_vector["default"].weight
    assert distance(output, x @ (length[:, None] * direction / direction.norm(dim=1, keepdim=True)).T) < 1e-5
    assert not fused_calls


@pytest.mark.parametrize("form", FORMS)
def test_disabled_adapter_is_the_base(form: str, fused_calls: list[int]) -> None:
    layer = adapted(form, bias=True).q_proj
    x = inputs(torch.float32)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.equal(layer(x), pefts_own(layer, x))
    layer.enable_adapters(True)
    assert not torch.equal(layer(x), layer.base_layer(x))
    assert len(fused_calls) == 1


def test_trained_bias_of_the_adapter_goes_through_peft(fused_calls: list[int]) -> None:
    layer = adapted("plain", lora_bias=True, bias=True).q_proj
    layer.lora_B["default"].bias.data.fill_(1.0)
    x, (a, b) = inputs(torch.float32), parts(layer)
    expected = reference(x, layer.base_layer.weight, a, b, 2.0) + layer.base_layer.bias + 2.0
    assert distance(layer(x), expected) < 1e-6
    assert not fused_calls


def test_two_adapters_go_through_peft(fused_calls: list[int]) -> None:
    layer = adapted("plain").q_proj
    layer.update_layer("second", 4, lora_alpha=4, config=LoraConfig(r=4, lora_alpha=4))
    layer.set_adapter(["default", "second"])
    x = inputs(torch.float32)
    assert torch.equal(layer(x), pefts_own(layer, x))
    layer.set_adapter(["second"])
    assert distance(layer(x), pefts_own(layer, x)) < 1e-6
    assert len(fused_calls) == 1


def test_merged_layer_adds_nothing_more(fused_calls: list[int]) -> None:
    layer = adapted("plain").q_proj
    x = inputs(torch.float32)
    before = layer(x)
    layer.merge()
    assert distance(layer(x), before) < 1e-6
    assert len(fused_calls) == 1


@pytest.mark.parametrize("form", ["plain", "nf4", "int8"])
def test_gradcheck(form: str) -> None:
    layer = adapted(form, r=2, compute=torch.float64 if form == "plain" else torch.float32).q_proj
    x, (a, b) = inputs(torch.float64, 2), (value.detach().double().requires_grad_() for value in parts(layer))

    def output(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        named = {"lora_A.default.weight": a, "lora_B.default.weight": b}
        result: torch.Tensor = functional_call(layer, named, (x,))
        return result

    assert torch.autograd.gradcheck(output, (x, a, b), fast_mode=True)


def test_input_without_gradient_gets_none() -> None:
    layer = adapted("nf4").q_proj
    x = inputs(torch.float32).detach()
    a, b = slopes(layer(x), list(parts(layer)))
    one, two = slopes(layer(x.clone().requires_grad_()), list(parts(layer)))
    assert torch.equal(a, one)
    assert torch.equal(b, two)


@pytest.mark.parametrize(("method", "fields"), [("unilora", {"r": 4}), ("gralora", {"r": 8, "alpha": 16})])
def test_another_methods_linear_at_rest_is_not_taken_for_a_frozen_one(
    method: str, fields: dict[str, Any], tiny_base: Path
) -> None:
    """Some of PEFT's layers are linears themselves, and while nothing in them is trained they look like the base's."""
    policy = model.attach(tiny.load(tiny_base), fields | {"target_modules": ["q_proj", "up_proj"]}, 0, method=method)
    with torch.no_grad():
        for value in policy.trainable().values():
            value.add_(0.1)
    policy.model.requires_grad_(False)
    ids = torch.arange(5, 30)[None]
    with policy.evaluating():
        states = policy.hidden(ids, torch.arange(25)[None], (0, 25))
        expected = policy.causal_lm.model(input_ids=ids).last_hidden_state
    with policy.evaluating(adapter=False):
        alone = policy.causal_lm.model(input_ids=ids).last_hidden_state
    assert tiny.distance(states, expected) < 1e-5
    assert tiny.distance(alone, expected) > 1e-2
