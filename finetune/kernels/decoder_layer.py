"""A decoder layer of the Llama kind (Llama, Qwen2, Qwen3) as a few steps of autograd, for packed samples.

    attention part: norm → query, key, value | rotary | attention | output linear
    MLP part:       norm → gate, up → SwiGLU → down

``|`` parts the steps. Kept for the backward pass: the input of each part, query, key, value and the attention's result,
gate and up; the norms and the product of gate and up are formed again from those. transformers owns the module, PEFT
its adapters. A layer with anything that ``lora_linear`` does not cover, and every forward pass of generation, goes
through transformers' own code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from finetune.kernels import lora_linear, rms_norm, rope, varlen_attention
from finetune.kernels.lora_linear import Sites
from finetune.kernels.pointwise import PLAIN, Pointwise

_KINDS = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


@dataclass(frozen=True)
class Norm:
    """A frozen norm and how it is computed."""

    weight: torch.Tensor
    eps: float
    pointwise: Pointwise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pointwise.norm(x, self.weight, self.eps)  # type: ignore[no-any-return]

    def backward(self, x: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
        return self.pointwise.norm_backward(x, self.weight, self.eps, grad)  # type: ignore[no-any-return]


class _NormedLinears(torch.autograd.Function):
    """Norm, then linears of its result. Keeps the input and x Aᵀ."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Norm, sites: Sites, *ab: torch.Tensor) -> Any:
        outputs, inner = lora_linear.forward(norm.forward(x), sites, ab)
        ctx.save_for_backward(x, inner, *ab)
        ctx.sites, ctx.norm = sites, norm
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, inner, *ab = ctx.saved_tensors
        rows = ctx.norm.forward(x) if lora_linear.trains_a(ab) else None
        need_x = ctx.needs_input_grad[0]
        grad, to_ab = lora_linear.backward(grads, rows, inner, ctx.sites, ab, need_x=need_x)
        if grad is not None:
            grad = ctx.norm.backward(x, grad)
        return (grad, None, None, *to_ab)


class _Mlp(torch.autograd.Function):
    """x + down(swiglu(gate(norm(x)), up(norm(x)))). ``sites``: gate, up, down."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Norm, sites: Sites, *ab: torch.Tensor) -> torch.Tensor:
        cut = _cut(sites)
        (gate, up), inner = lora_linear.forward(norm.forward(x), sites[:2], ab[:cut])
        (y,), inner_down = lora_linear.forward(norm.pointwise.product(gate, up), sites[2:], ab[cut:])
        ctx.save_for_backward(x, gate, up, inner, inner_down, *ab)
        ctx.sites, ctx.norm = sites, norm
        return y.add_(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, gate, up, inner, inner_down, *ab = ctx.saved_tensors
        cut, norm = _cut(ctx.sites), ctx.norm
        product = norm.pointwise.product(gate, up) if lora_linear.trains_a(ab[cut:]) else None
        slope, to_down = lora_linear.backward([grad], product, inner_down, ctx.sites[2:], ab[cut:], need_x=True)
        assert slope is not None
        del product
        slopes = norm.pointwise.product_backward(gate, up, slope)
        del slope
        rows = norm.forward(x) if lora_linear.trains_a(ab[:cut]) else None
        need_x = ctx.needs_input_grad[0]
        to_x, to_ab = lora_linear.backward(slopes, rows, inner, ctx.sites[:2], ab[:cut], need_x=need_x)
        if to_x is not None:
            to_x = norm.backward(x, to_x).add_(grad)
        return (to_x, None, None, *to_ab, *to_down)


def _cut(sites: Sites) -> int:
    """How many of the A and B belong to gate and up."""
    return len(lora_linear.matrices(sites[:2]))


class _Layer:
    """Mixed into transformers' decoder layers. Without ``pointwise`` they are as they were."""

    pointwise: Pointwise | None

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        attention, mlp = self.self_attn, self.mlp
        layers = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
                  mlp.gate_proj, mlp.up_proj, mlp.down_proj)  # fmt: skip
        norms = [self.input_layernorm, self.post_attention_layernorm]
        norms += [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
        packed = not args and kwargs.get("layout") is not None and kwargs.get("past_key_values") is None
        sites = [lora_linear.site(layer) for layer in layers] if packed and self.pointwise else [None]
        adapted = any(not hasattr(norm, "variance_epsilon") or norm.weight.requires_grad for norm in norms)
        if None in sites or adapted:
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc,no-any-return]
        x = hidden_states[0] + _attended(self, hidden_states[0], sites[:4], kwargs)
        norm = _norm(self.post_attention_layernorm, self.pointwise)
        y = _Mlp.apply(x, norm, sites[4:], *lora_linear.matrices(sites[4:]))  # type: ignore[no-untyped-call]
        return y[None]  # type: ignore[no-any-return]


def _norm(module: Any, pointwise: Pointwise) -> Norm:
    return Norm(module.weight, module.variance_epsilon, pointwise)


def _attended(layer: Any, x: torch.Tensor, sites: Sites, arguments: dict[str, Any]) -> torch.Tensor:
    """The attention part, [tokens, hidden] → [tokens, hidden]."""
    attention, pointwise = layer.self_attn, layer.pointwise
    norm = _norm(layer.input_layernorm, pointwise)
    found = _NormedLinears.apply(x, norm, sites[:3], *lora_linear.matrices(sites[:3]))  # type: ignore[no-untyped-call]
    query, key, value = (states.view(1, len(x), -1, attention.head_dim) for states in found)
    if hasattr(attention, "q_norm"):
        ways = pointwise.norm, pointwise.norm_backward
        query, key = rms_norm.norm(query, attention.q_norm, ways), rms_norm.norm(key, attention.k_norm, ways)
    cos, sin = arguments["position_embeddings"]
    query, key = rope.rotate(query, cos, sin, pointwise.turned), rope.rotate(key, cos, sin, pointwise.turned)
    attended, _ = varlen_attention.packed(
        attention, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None, scaling=attention.scaling,
        layout=arguments["layout"], position_ids=arguments.get("position_ids"),
        sliding_window=getattr(attention, "sliding_window", None),
    )  # fmt: skip
    (y,) = lora_linear.apply(attended.reshape(len(x), -1), sites[3:])
    return y


def compute_as(example: Any, layer: Any) -> None:
    """Let a layer that was fused be computed as another one of its kind."""
    if isinstance(layer, _Layer):
        layer.pointwise = example.pointwise


def fuse(model: torch.nn.Module, pointwise: Pointwise | None = PLAIN) -> None:
    """Give every decoder layer that this knows its fused steps, in place; with None, take them away."""
    for module in model.modules():
        if isinstance(module, _Layer):
            module.pointwise = pointwise
        kind = type(module)
        if kind.__name__ in _KINDS and module.self_attn.config.hidden_act == "silu":  # type: ignore[union-attr]
            module.__class__ = type(f"Fused{kind.__name__}", (_Layer, kind), {"pointwise": pointwise})
