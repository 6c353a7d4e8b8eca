"""Tokenizer + frozen base + adapter → Policy, and the way in and out of an adapter's weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.base import Base
from finetune.dataset import Renderer
from finetune.errors import EnvironmentFault, ModelError
from finetune.kernels import frozen_linear, lora_linear, varlen_attention, whole_module
from finetune.tokenizer import load_tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class BaseForm:
    """How the frozen base is held. ``weights``: nf4, fp4, int8, bf16, fp16, fp32; ``compute``: bf16, fp16, fp32."""

    weights: str
    double: bool
    compute: str
    device: str


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A model and its tokenizer. With ``adapted`` false it is the base alone."""

    model: Any
    tokenizer: Any
    renderer: Renderer
    stop_token: str
    adapted: bool

    @property
    def causal_lm(self) -> Any:
        """The transformers model below PEFT's wrapper (the same object where there is no adapter)."""
        return self.model.get_base_model() if self.adapted else self.model

    @property
    def head(self) -> torch.nn.Module:
        head: torch.nn.Module = self.causal_lm.get_output_embeddings()
        return head

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.causal_lm.parameters()).device
        return device

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor, bounds: tuple[int, ...]) -> torch.Tensor:
        """Last hidden states of packed samples. ids, positions: [1, tokens] → [1, tokens, hidden]."""
        with _attention(self.causal_lm, varlen_attention.register()):
            output = self.causal_lm.model(input_ids=ids, position_ids=positions, use_cache=False, segment_bounds=bounds)
        states: torch.Tensor = output.last_hidden_state
        return states

    def recompute_layers(self) -> None:
        """Keep each layer's input only, and compute the layer again in the backward pass."""
        packed = varlen_attention.register()
        # The backward pass runs after ``hidden`` has left its block; the layer must find the same attention again.
        settings = {
            "use_reentrant": False,
            "context_fn": lambda: (contextlib.nullcontext(), _attention(self.causal_lm, packed)),
        }
        # Newer transformers warn at the old name, which goes in v6; older ones know no other.
        old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"
        getattr(self.causal_lm, new if hasattr(self.causal_lm, new) else old)(settings)

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    @contextlib.contextmanager
    def evaluating(self, *, adapter: bool = True) -> Iterator[None]:
        """No dropout and no gradients inside; with ``adapter`` false the base answers alone."""
        was_training = self.model.training
        self.model.eval()
        without = self.model.disable_adapter() if self.adapted and not adapter else contextlib.nullcontext()
        try:
            with torch.no_grad(), without:
                yield
        finally:
            self.model.train(was_training)

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, streamer: Any = None) -> list[list[int]]:
        """Greedy answers to a batch of prompts, without the stop token. Call inside ``evaluating``."""
        longest = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        stops = self.stop_ids()
        dense = frozen_linear.held_dense(self.model) if ids.device.type == "cpu" else contextlib.nullcontext()
        with dense, _contiguous_input(self.head):
            out = self.causal_lm.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, use_cache=True,
                eos_token_id=stops, pad_token_id=pad, temperature=None, top_p=None, top_k=None, streamer=streamer,
            )  # fmt: skip
        return [_until(row, stops) for row in out[:, longest:].tolist()]

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the turn's stop token first, then what the model itself names."""
        named = self.causal_lm.generation_config.eos_token_id
        more = named if isinstance(named, list) else [named] if named is not None else []
        first = self.tokenizer.convert_tokens_to_ids(self.stop_token)
        return [first, *[token for token in more if token != first]]


def _until(ids: list[int], stops: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


@contextlib.contextmanager
def _contiguous_input(head: torch.nn.Module) -> Iterator[None]:
    """The last position of every prompt is a strided view, for which torch on a CPU multiplies row by row with a copy
    of the whole head each: 50 rows of a 49k vocabulary copied 2.8 GB.
    """
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _attention(model: Any, name: str) -> Iterator[None]:
    """Packed passes use the varlen kernel; generation keeps the attention that the model was loaded with."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def load_base(base: Base, form: BaseForm) -> Policy:
    """The frozen base in the wanted form, every weight checked to be there and finite.

    Raises:
        ModelError: tensors missing, of another shape, or not finite.
        EnvironmentFault: the device's memory is too small.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            base.folder,
            dtype=DTYPES[form.compute if form.weights not in DTYPES else form.weights],
            quantization_config=_quantization(form),
            device_map={"": form.device},
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError as error:
        raise EnvironmentFault(f"out of memory while loading the base: {error}", str(base.folder), "see plan") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"the base does not load: {error}", str(base.folder), "run `finetune plan`") from None
    problems = {key: sorted(map(str, report[key])) for key in ("missing_keys", "mismatched_keys") if report.get(key)}
    if problems:
        raise ModelError(f"the base did not load whole: {problems}", str(base.folder), "fetch it again")
    if form.weights in DTYPES and form.compute != form.weights:
        model = model.to(DTYPES[form.compute])
    model.requires_grad_(False)
    frozen_linear.freeze(model)
    _refuse_non_finite(model, base.folder)
    model.config.use_cache = False
    tokenizer = load_tokenizer(base.folder)
    renderer = Renderer(tokenizer, base.stop_token)
    return Policy(model=model, tokenizer=tokenizer, renderer=renderer, stop_token=base.stop_token, adapted=False)


def _quantization(form: BaseForm) -> Any:
    from transformers import BitsAndBytesConfig

    if form.weights in ("nf4", "fp4"):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=form.weights,
            bnb_4bit_use_double_quant=form.double,
            bnb_4bit_compute_dtype=DTYPES[form.compute],
        )
    return BitsAndBytesConfig(load_in_8bit=True) if form.weights == "int8" else None


def _refuse_non_finite(model: torch.nn.Module, folder: Path) -> None:
    """A NaN in the base would train on silently. (A quantised block or row that held one has a NaN scale.)"""
    for name, value in model.named_parameters():
        for numbers in _numbers(value):
            if numbers.is_floating_point() and not bool(torch.isfinite(numbers).all()):
                raise ModelError(f"tensor {name} holds NaN or infinity", str(folder), "fetch the base again")


def _numbers(value: Any) -> tuple[torch.Tensor, ...]:
    """What of a parameter can be NaN: its scales where it is quantised (their own where those are too), else itself."""
    state = getattr(value, "quant_state", None)
    if state is not None:
        # The offset is the mean of the scales: one NaN among them is lost in their codes but not in their mean.
        return (state.offset, state.state2.absmax) if state.nested else (state.absmax,)
    rows = getattr(value, "SCB", None)
    return (value,) if rows is None else (rows,)


def attach(policy: Policy, fields: dict[str, Any], seed: int) -> Policy:
    """A fresh adapter on the base. Its start depends on ``seed`` alone; its weights are fp32 masters."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    try:
        model = get_peft_model(policy.model, LoraConfig(task_type="CAUSAL_LM", **fields))
    except ValueError as error:
        raise ModelError(
            f"PEFT cannot attach the adapter: {error}", "adapter", "see `finetune plan` for targets"
        ) from None
    return _adapted(policy, model)


def _adapted(policy: Policy, model: Any) -> Policy:
    lora_linear.fuse(model)
    whole_module.widen(model, policy.causal_lm.dtype)
    return Policy(
        model=model, tokenizer=policy.tokenizer, renderer=policy.renderer, stop_token=policy.stop_token, adapted=True
    )


def attach_saved(policy: Policy, folder: Path) -> Policy:
    """The base with an adapter folder in PEFT's format; every key must be used, and none may be left over.

    Raises:
        ModelError: keys that match nothing, or places that the file has no weights for.
    """
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    config = LoraConfig.from_pretrained(folder)
    config.inference_mode = False
    model = get_peft_model(policy.model, config)
    adapted = _adapted(policy, model)
    load_adapter(model, load_file(folder / "adapter_model.safetensors"), folder)
    return adapted


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
    return {name: state[name].detach().to("cpu").contiguous() for name in sorted(state)}


def adapter_config(model: Any, base_name: str) -> dict[str, Any]:
    """PEFT's ``adapter_config.json``, with sets sorted so that equal runs write equal bytes."""
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base_name, "inference_mode": True}
    return {key: _plain(value) for key, value in sorted(config.items())}


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return getattr(value, "value", value)
