"""Tokenizer + frozen base + adapter → Policy, and the way in and out of an adapter's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune import beginning, loading, methods
from finetune import tokenizer as tokenizers
from finetune.base import Base
from finetune.errors import ModelError
from finetune.kernels import (
    decoder_layer,
    frozen_linear,
    lora_linear,
    pointwise,
    trained_rows,
    varlen_attention,
    whole_module,
)
from finetune.loading import BaseForm, Change
from finetune.renderer import Renderer
from finetune.sampling import GREEDY, Sampling

_FILL = 64
"""On a CPU a pack is filled up to a multiple of so many tokens: oneDNN compiles a product for each number of rows that
it meets, 35 in a step, and the heap finds freed blocks of one size again, those of like size seldom."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A model and its tokenizer. With ``adapted`` false it is the base alone. ``start``: the weights of the adapter
    that the run began from, by the parameters' names; None where it began with a fresh one. ``teacher``: as of
    ``teacher``, what it is distilled from."""

    model: Any
    tokenizer: Any
    renderer: Renderer
    stop_token: str
    adapted: bool
    kernels: bool = True
    start: dict[str, torch.Tensor] | None = None
    teacher: Any = None

    @property
    def causal_lm(self) -> Any:
        """The transformers model below PEFT's wrapper (the same object where there is no adapter)."""
        return self.model.get_base_model() if self.adapted else self.model

    @property
    def head(self) -> torch.nn.Module:
        head: torch.nn.Module = self.causal_lm.get_output_embeddings()
        return head

    @property
    def scored(self) -> bool:
        """Whether it has a score head in place of a head over the vocabulary."""
        return hasattr(self.causal_lm, "score")

    def rate(self, states: torch.Tensor) -> torch.Tensor:
        """What the score head says of hidden states: [n, hidden] → [n], in fp32 or wider whatever the model is in."""
        weight: Any = whole_module.acting(self.causal_lm.score).weight
        wide = torch.promote_types(states.dtype, torch.float32)
        return torch.nn.functional.linear(states.to(wide), weight.to(wide)).squeeze(-1)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.causal_lm.model.rotary_emb.inv_freq.device  # weights may be read only when needed
        return device

    @property
    def positions(self) -> int:
        """The longest context that the model has been made for, in tokens."""
        longest: int = self.causal_lm.config.max_position_embeddings
        return longest

    def hidden(
        self, ids: torch.Tensor, positions: torch.Tensor, bounds: tuple[int, ...], cuts: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Last hidden states of packed samples. ids, positions: [1, tokens] → [1, tokens, hidden].

        ``cuts``: bounds between packs of several adapters, each to be computed as if it were alone.
        """
        tokens = ids.shape[1]
        if ids.device.type == "cpu" and cuts is None:
            ids, positions = (torch.nn.functional.pad(one, (0, -tokens % _FILL)) for one in (ids, positions))
        layout = varlen_attention.lay_out(bounds, ids.device, cuts or ())
        with self._packed(), self._offloading():
            output = self.causal_lm.model(input_ids=ids, position_ids=positions, use_cache=False, layout=layout)
        states: torch.Tensor = output.last_hidden_state
        return states[:, :tokens]

    def _packed(self) -> contextlib.AbstractContextManager[None]:
        return _attention(self.causal_lm, varlen_attention.register(plain=not self.kernels))

    def _offloading(self) -> contextlib.AbstractContextManager[Any]:
        if not getattr(self.causal_lm, "offload_inputs", False):
            return contextlib.nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")

    def recompute_layers(self, count: int | None = None, *, offload: bool = False) -> None:
        """Keep only the input of the first ``count`` layers (None: of all), and compute them again in the backward
        pass; with ``offload`` the inputs wait in the machine's memory."""
        # The backward pass runs after ``hidden`` has left its block; the layer must find the same attention again.
        settings = {"use_reentrant": False, "context_fn": lambda: (contextlib.nullcontext(), self._packed())}
        # Newer transformers warn at the old name, which goes in v6; older ones know no other.
        old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
        getattr(self.causal_lm, new if hasattr(self.causal_lm, new) else old)(settings)
        for layer in self.causal_lm.model.layers[count:] if count is not None else ():
            layer.gradient_checkpointing = False
        self.causal_lm.offload_inputs = offload

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    @contextlib.contextmanager
    def evaluating(self, *, adapter: bool = True) -> Iterator[None]:
        """No dropout and no gradients inside; with ``adapter`` false the model as the run found it answers: the base
        alone, or with the adapter that the run began from."""
        was_training = self.model.training
        self.model.eval()
        as_is = adapter or not self.adapted
        try:
            with torch.no_grad(), contextlib.nullcontext() if as_is else beginning.as_found(self.model, self.start):
                yield
        finally:
            self.model.train(was_training)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, streamer: Any = None,
        sampling: Sampling = GREEDY, numbers: Sequence[int] | None = None, with_stop: bool = False,
    ) -> list[list[int]]:  # fmt: skip
        """Answers to a batch of prompts, with or without the stop token. Call inside ``evaluating``.

        ``numbers``: which draw of the seed each answer is (its place in the batch). What ``streamer`` raises ends it.
        Penalties that the base's generation_config.json names do not count: greedy is the argmax of the logits.
        """
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        stops, drawn = self.stop_ids(), sampling.processors(range(len(prompts)) if numbers is None else numbers)
        dense = frozen_linear.held_dense(self.model) if ids.device.type == "cpu" else contextlib.nullcontext()
        with dense, frozen_linear.contiguous_input(self.head):
            out = self.causal_lm.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, use_cache=True,
                eos_token_id=stops, pad_token_id=pad, temperature=None, top_p=None, top_k=None, streamer=streamer,
                logits_processor=drawn, repetition_penalty=None, no_repeat_ngram_size=None,
            )  # fmt: skip
        return [_until(row, stops, with_stop) for row in out[:, longest:].tolist()]

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the turn's stop token first, then what the model itself names."""
        named = self.causal_lm.generation_config.eos_token_id
        more = named if isinstance(named, list) else [named] if named is not None else []
        first = self.tokenizer.convert_tokens_to_ids(self.stop_token)
        return [first, *[token for token in more if token != first]]


def _until(ids: list[int], stops: list[int], with_stop: bool) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + with_stop]


@contextlib.contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    """Packed passes use the varlen kernel; generation keeps the attention that the model was loaded with."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def load_base(
    base: Base, form: BaseForm, progress: Callable[[int, int], None] | None = None, change: Change | None = None
) -> Policy:
    """The base alone, ready to answer. Raises as ``loading.load``, whose ``progress`` and ``change`` these are."""
    return policy_of(base, loading.load(base, form, progress, change))


def stream_base(base: Base, form: BaseForm, change: Change | None = None) -> Policy:
    """The base alone, read layer by layer at each forward pass: for a machine that it does not fit."""
    return policy_of(base, loading.streamed(base, form, change))


def policy_of(base: Base, model: Any) -> Policy:
    """A loaded base, ready to answer."""
    decoder_layer.fuse(model)  # also without an adapter, so that a model with and without one is computed alike
    tokenizer = tokenizers.of(base)
    renderer = Renderer(tokenizer, base.stop_token, piecewise=base.piecewise)
    return Policy(model=model, tokenizer=tokenizer, renderer=renderer, stop_token=base.stop_token, adapted=False)


def attach(
    policy: Policy, fields: dict[str, Any], seed: int, *, method: str = "lora", kernels: bool = True,
    compiled: bool = False,
) -> Policy:  # fmt: skip
    """A fresh adapter on the base. Its start depends on ``seed`` alone; its weights are fp32 masters.

    Without ``kernels`` every pass is computed as transformers and PEFT do it; ``compiled``: their pointwise parts.
    """
    torch.manual_seed(seed)
    try:
        model = methods.put_on(policy.model, methods.config(method, fields, scored=policy.scored))
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, ImportError) as error:
        what, fix = f"PEFT cannot attach the adapter: {error}", "see `finetune plan` for targets"
        raise ModelError(what, "adapter", fix) from None
    return _adapted(policy, model, kernels=kernels, compiled=compiled)


def _adapted(policy: Policy, model: Any, *, kernels: bool = True, compiled: bool = False) -> Policy:
    if kernels:
        lora_linear.fuse(model)
    ways = pointwise.compiled() if compiled else pointwise.PLAIN
    decoder_layer.fuse(model, ways if kernels else None)
    trained_rows.settle(model)
    whole_module.widen(model, policy.causal_lm.dtype)
    return replace(policy, model=model, adapted=True, kernels=kernels)


def attach_saved(policy: Policy, folder: Path) -> Policy:
    """The base with an adapter folder in PEFT's format; every key must be used, and none may be left over.

    Raises:
        ModelError: keys that match nothing, or places that the file has no weights for.
    """
    from peft import PeftConfig
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    config.base_model_name_or_path = policy.model.name_or_path  # its digests were compared; the folder may have moved
    try:
        model = methods.put_on(policy.model, config)
    except Exception as error:  # noqa: BLE001 - what a strange config leads to there
        raise ModelError(f"PEFT cannot attach it: {error}", str(folder), "fetch the adapter again") from None
    adapted = _adapted(policy, model)
    load_adapter(model, load_file(folder / "adapter_model.safetensors"), folder)
    return adapted


def start_from(policy: Policy, folder: Path) -> Policy:
    """A freshly attached adapter with the weights of that folder, which stay known. Raises as ``load_adapter``."""
    from safetensors.torch import load_file

    load_adapter(policy.model, load_file(folder / "adapter_model.safetensors"), folder)
    return replace(policy, start={name: value.detach().clone() for name, value in policy.trainable().items()})


def load_adapter(model: Any, weights: dict[str, torch.Tensor], source: Path) -> None:
    """Copy adapter weights into the model. Names must agree both ways."""
    from peft import set_peft_model_state_dict

    own = adapter_weights(model)
    unknown, absent = sorted(set(weights) - set(own)), sorted(set(own) - set(weights))
    if unknown or absent:
        first = unknown[0] if unknown else absent[0]
        what = f"{len(unknown)} adapter tensors fit nothing and {len(absent)} places get none, the first is {first}"
        raise ModelError(what, str(source), "this adapter belongs to another base or was altered")
    shapes = [name for name in own if own[name].shape != weights[name].shape]
    if shapes:
        what = f"{shapes[0]} is {list(weights[shapes[0]].shape)} where the base needs {list(own[shapes[0]].shape)}"
        raise ModelError(what, str(source), "this adapter belongs to another base")
    set_peft_model_state_dict(model, weights)


def adapter_weights(model: Any) -> dict[str, torch.Tensor]:
    """The adapter's tensors under PEFT's file names, in a fixed order, on the CPU."""
    from peft import get_peft_model_state_dict

    # False: a LoRA on the head is no reason to save the head itself.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    # Copies: Lily's layers share matrices, of which a file has each by itself.
    return {name: state[name].detach().to("cpu", copy=True).contiguous() for name in sorted(state)}


def adapter_config(model: Any, base_name: str) -> dict[str, Any]:
    """PEFT's ``adapter_config.json``, with sets sorted so that equal runs write equal bytes."""
    config = methods.stored(model.peft_config["default"])
    return config | {"base_model_name_or_path": base_name, "inference_mode": True}
