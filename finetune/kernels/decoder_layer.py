"""A decoder layer of the Llama kind (Llama, Qwen2, Qwen3) as a few steps of autograd, for packed samples.

    attention part: norm → query, key, value | rotary | attention | output linear
    MLP part:       norm → gate, up → SwiGLU → down

``|`` parts the steps. Kept for the backward pass: the input of each part, query, key, value and the attention's result,
gate and up; the norms and the product of gate and up are formed again from those. transformers owns the module, PEFT
its adapters. A layer with anything that ``lora_linear`` does not cover, and every forward pass of generation, goes
through transformers' own code.
"""

from __future__ import annotations

from typing import Any

import torch

from finetune.kernels import lora_linear, rms_norm, rope, swiglu, varlen_attention
from finetune.kernels.lora_linear import Sites

_KINDS = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


class _NormedLinears(torch.autograd.Function):
    """Norm, then linears of its result. Keeps the input and x Aᵀ."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, sites: Sites, *ab: torch.Tensor) -> Any:
        outputs, inner = lora_linear.forward(rms_norm.forward(x, weight, eps), sites, ab)
        ctx.save_for_backward(x, weight, inner, *ab)
        ctx.sites, ctx.eps = sites, eps
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inner, *ab = ctx.saved_tensors
        rows = rms_norm.forward(x, weight, ctx.eps) if lora_linear.trains_a(ab) else None
        need_x = ctx.needs_input_grad[0]
        grad, to_ab = lora_linear.backward(grads, rows, inner, ctx.sites, ab, need_x=need_x)
        if grad is not None:
            grad = rms_norm.backward(x, weight, ctx.eps, grad)
        return (grad, None, None, None, *to_ab)


class _Mlp(torch.autograd.Function):
    """x + down(swiglu(gate(norm(x)), up(norm(x)))). ``sites``: gate, up, down."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, sites: Sites, *ab: torch.Tensor
    ) -> torch.Tensor:
        cut = _cut(sites)
        (gate, up), inner = lora_linear.forward(rms_norm.forward(x, weight, eps), sites[:2], ab[:cut])
        (y,), inner_down = lora_linear.forward(swiglu.forward(gate, up), sites[2:], ab[cut:])
        ctx.save_for_backward(x, weight, gate, up, inner, inner_down, *ab)
        ctx.sites, ctx.eps = sites, eps
        return y.add_(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, gate, up, inner, inner_down, *ab = ctx.saved_tensors
        cut = _cut(ctx.sites)
        product = swiglu.forward(gate, up) if lora_linear.trains_a(ab[cut:]) else None
        slope, to_down = lora_linear.backward([grad], product, inner_down, ctx.sites[2:], ab[cut:], need_x=True)
        assert slope is not None
        del product
        slopes = swiglu.backward(gate, up, slope)
        del slope
        rows = rms_norm.forward(x, weight, ctx.eps) if lora_linear.trains_a(ab[:cut]) else None
        need_x = ctx.needs_input_grad[0]
        to_x, to_ab = lora_linear.backward(slopes, rows, inner, ctx.sites[:2], ab[:cut], need_x=need_x)
        if to_x is not None:
            to_x = rms_norm.backward(x, weight, ctx.eps, to_x).add_(grad)
        return (to_x, None, None, None, *to_ab, *to_down)


def _cut(sites: Sites) -> int:
    """How many of the A and B belong to gate and up."""
    return len(lora_linear.matrices(sites[:2]))


class _Layer:
    """Mixed into transformers' decoder layers."""

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        attention, mlp = self.self_attn, self.mlp
        layers = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
                  mlp.gate_proj, mlp.up_proj, mlp.down_proj)  # fmt: skip
        norms = (self.input_layernorm.weight, self.post_attention_layernorm.weight)
        packed = kwargs.get("layout") is not None and kwargs.get("past_key_values") is None and not args
        sites = [lora_linear.site(layer) for layer in layers] if packed else [None]
        if None in sites or any(weight.requires_grad for weight in norms):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc,no-any-return]
        x = hidden_states[0] + _attended(self, hidden_states[0], sites[:4], kwargs)
        norm = self.post_attention_layernorm
        y = _Mlp.apply(x, norm.weight, norm.variance_epsilon, sites[4:], *lora_linear.matrices(sites[4:]))  # type: ignore[no-untyped-call]
        return y[None]  # type: ignore[no-any-return]


def _attended(layer: Any, x: torch.Tensor, sites: Sites, arguments: dict[str, Any]) -> torch.Tensor:
    """The attention part, [tokens, hidden] → [tokens, hidden]."""
    attention, norm = layer.self_attn, layer.input_layernorm
    found = _NormedLinears.apply(x, norm.weight, norm.variance_epsilon, sites[:3], *lora_linear.matrices(sites[:3]))  # type: ignore[no-untyped-call]
    query, key, value = (states.view(1, len(x), -1, attention.head_dim) for states in found)
    if hasattr(attention, "q_norm"):
        query, key = rms_norm.norm(query, attention.q_norm), rms_norm.norm(key, attention.k_norm)
    cos, sin = arguments["position_embeddings"]
    query, key = rope.rotate(query, cos, sin), rope.rotate(key, cos, sin)
    attended, _ = varlen_attention.packed(
        attention, query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), None, scaling=attention.scaling,
        layout=arguments["layout"], position_ids=arguments.get("position_ids"),
        sliding_window=getattr(attention, "sliding_window", None),
    )  # fmt: skip
    (y,) = lora_linear.apply(attended.reshape(len(x), -1), sites[3:])
    return y


def fuse(model: torch.nn.Module) -> None:
    """Give every decoder layer that this knows its fused steps, in place."""
    for module in model.modules():
        kind = type(module)
        if kind.__name__ in _KINDS and module.self_attn.config.hidden_act == "silu":  # type: ignore[union-attr]
            module.__class__ = type(f"Fused{kind.__name__}", (_Layer, kind), {})
