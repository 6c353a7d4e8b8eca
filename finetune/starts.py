"""How a LoRA begins where that takes the base's weights or the recipe's rows: PiSSA, OLoRA, EVA, CorDA, LoRA-GA.

PEFT makes the matrices. Where these do not add up to nothing it takes them out of the base, W - s B₀A₀ rounded to the
base's number format, and re-quantises a packed one. Here the base stays as it is, and the start is taken off beside it
by a second adapter that is frozen: W + s (B A - B₀A₀), exact on every base. What leaves the run is that sum as one
plain LoRA of twice the rank, which fits the untouched base. A start is made once and kept in the run's folder: made
again on another machine it could differ, and a resumed run with it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from finetune import checkpoint, manifest, methods, model
from finetune.dataset import Example
from finetune.errors import EnvironmentFault, ModelError
from finetune.kernels import frozen_linear
from finetune.model import Policy
from finetune.plan import Plan
from finetune.recipe import adapter_methods
from finetune.runfolder import json_bytes

FOLDER = "start"
"""Where a run keeps how it began."""
FROZEN = "start"
"""The name of the second adapter."""
_ROWS, _TOKENS = 64, 4096
"""At most so many of the run's first samples, and of their tokens, are what a start is made of."""
_PASSES = 50
_OF_START = ("eva_config", "corda_config", "lora_ga_config")


def is_made(method: str, fields: dict[str, Any]) -> bool:
    """Whether the adapter begins with more than a draw of random numbers."""
    return method == "lora" and adapter_methods.start_of(fields) in (*adapter_methods.OFF_BASE, "eva")


def refuse_to_make(method: str, chosen: Plan) -> None:
    """Raise EnvironmentFault where several processes would each have to make the start."""
    folder = Path(chosen.output) / FOLDER
    if is_made(method, chosen.adapter_fields) and not folder.is_dir():
        what = f"{chosen.adapter_fields['init_lora_weights']} is made by one process, for all"
        raise EnvironmentFault(what, str(folder), "take one process to step 1 (--until 1), then go on with several")


def plain(fields: dict[str, Any]) -> dict[str, Any]:
    """The same adapter with PEFT's usual start, which changes no base."""
    return fields | {"init_lora_weights": True} | {key: None for key in _OF_START if key in fields}


def attach(
    folder: Path, policy: Policy, fields: dict[str, Any], seed: int, samples: Sequence[Example], **how: Any
) -> Policy:
    """The adapter on the base as it begins, made or as ``folder`` keeps it; ``how`` as of ``model.attach``.

    Raises:
        ModelError: the folder is damaged, or PEFT cannot make this start.
    """
    if not folder.is_dir():
        checkpoint.write_folder(folder, _made(policy, fields, seed, samples))
    elif faults := manifest.faults(folder):
        raise ModelError(faults[0], str(folder), "take it from a backup, or begin again with another `output:`")
    kept = checkpoint.read_adapter(folder)
    taken = {**plain(fields), "rank_pattern": {}, "alpha_pattern": {}}
    taken = {key: kept.config.get(key, value) for key, value in taken.items()}  # EVA moves ranks about
    begun = model.attach(policy, taken, seed, **how)
    model.load_adapter(begun.model, kept.weights, folder)
    if adapter_methods.start_of(fields) in adapter_methods.OFF_BASE:
        _take_off(begun.model, taken)
    return begun


def _take_off(adapted: Any, fields: dict[str, Any]) -> None:
    """Beside each pair the same pair again, frozen and with the opposite sign."""
    beside = {"lora_dropout": 0.0, "modules_to_save": None, "trainable_token_indices": None}
    adapted.add_adapter(FROZEN, methods.config("lora", fields | beside))
    for layer in _layers(adapted):
        layer.set_adapter(["default", FROZEN])
        layer.scaling[FROZEN] = -layer.scaling["default"]
        for matrices in (layer.lora_A, layer.lora_B):
            matrices[FROZEN].weight.data = matrices["default"].weight.data.clone()
            matrices[FROZEN].weight.requires_grad_(False)


def _layers(adapted: Any) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in adapted.modules() if isinstance(module, LoraLayer)]


def result(adapted: Any, base_name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The adapter's tensors and config as they leave a run: with a start beside it, one plain LoRA of twice the rank.

    s (B A - B₀A₀) = s [B, -B₀] [A; A₀], with alpha and rank doubled; rsLoRA's √r goes into B.
    """
    weights, config = model.adapter_weights(adapted), model.adapter_config(adapted, base_name)
    if FROZEN not in adapted.peft_config:
        return weights, config
    for name, layer in adapted.named_modules():
        if getattr(layer, "lora_A", None) is None or FROZEN not in layer.lora_A:
            continue
        factor = layer.r["default"] ** 0.5 if config["use_rslora"] else 1.0
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        first = {
            key: getattr(layer, part)[FROZEN].weight.detach().cpu() for key, part in ((a, "lora_A"), (b, "lora_B"))
        }
        weights[a] = torch.cat([weights[a], first[a]]).contiguous()
        weights[b] = (torch.cat([weights[b], -first[b]], dim=1) * factor).contiguous()
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = {word: 2 * value for word, value in (config.get(key) or {}).items()}
    return weights, config | {"r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"], "use_rslora": False}


def _made(policy: Policy, fields: dict[str, Any], seed: int, samples: Sequence[Example]) -> dict[str, bytes]:
    """The files of a start: PEFT's folder of an adapter that was not trained."""
    word = fields["init_lora_weights"]
    if word == "lora_ga" and not fields.get("lora_ga_config"):  # of all, PEFT wants only this one to be given
        fields = fields | {"lora_ga_config": {"direction": "ArB2r"}}
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of how much memory EVA takes, and where LoRA-GA's hooks sit
            adapted = _begun(policy, fields, _first(samples))
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ModelError(f"PEFT cannot begin with {word}: {error}", "adapter.init_lora_weights", "use true") from None
    weights, config = model.adapter_weights(adapted), model.adapter_config(adapted, "")
    frozen_linear.hide(adapted.unload())
    settings = config | {"init_lora_weights": True} | dict.fromkeys(_OF_START)
    return {checkpoint.ADAPTER: save(weights, {"format": "pt"}), checkpoint.CONFIG: json_bytes(settings)}


def _begun(policy: Policy, fields: dict[str, Any], rows: list[Example]) -> Any:
    """PEFT's model with the matrices that the adapter begins with, over an unchanged base."""
    from peft import get_peft_model

    word, asked = fields["init_lora_weights"], methods.config("lora", fields)
    if word == "corda":
        frozen_linear.show(policy.model)
        _corda(policy, asked, rows)
    elif word == "lora_ga":
        _lora_ga(policy, asked, rows)
    adapted = get_peft_model(policy.model, asked if word == "eva" else methods.config("lora", plain(fields)))
    if word == "eva":
        _eva(adapted, rows, policy.device)
        return adapted
    for layer in _layers(adapted):
        with _dense(layer.get_base_layer()):
            _begin(layer, word, asked)
    return adapted


def _begin(layer: Any, word: str, asked: Any) -> None:
    if word.startswith("pissa"):
        layer.pissa_init("default", word)
    elif word == "olora":
        layer.olora_init("default")
    elif word == "corda":
        layer.corda_init("default", word)
    else:
        layer.lora_ga_init("default", asked.lora_ga_config)


@contextlib.contextmanager
def _dense(layer: Any) -> Iterator[None]:
    """Inside, the layer holds its weight in fp32, and what happens to that is forgotten."""
    if isinstance(layer, frozen_linear.ShownLinear | frozen_linear.PackedLinear):  # nothing reaches what it holds
        yield
        return
    held = layer.weight
    try:
        layer.weight = torch.nn.Parameter(frozen_linear.dense_weight(layer, torch.float32).clone(), requires_grad=False)
        yield
    finally:
        layer.weight = held


def _first(samples: Sequence[Example]) -> list[Example]:
    """The first samples of a run, in the order of its sources."""
    found: list[Example] = []
    for at in range(min(_ROWS, len(samples))):
        if found and sum(len(one.ids) for one in found) + len(samples[at].ids) > _TOKENS:
            break
        found.append(samples[at])
    return found


def _batch(rows: Sequence[Example], device: torch.device) -> dict[str, torch.Tensor]:
    """Padded as transformers takes them; -100 where a token is only read. Each [rows, longest]."""
    longest = max(len(row.ids) for row in rows)

    def filled(values: Callable[[Example], list[int]], filling: int) -> torch.Tensor:
        return torch.tensor([values(row) + [filling] * (longest - len(row.ids)) for row in rows], device=device)

    return {
        "input_ids": filled(lambda row: list(row.ids), 0),
        "attention_mask": filled(lambda row: [1] * len(row.ids), 0),
        "labels": filled(
            lambda row: [t if w else -100 for t, w in zip(row.ids, row.weights, strict=True)], -100
        ),
    }  # fmt: skip


class _Passes:
    """The batches, again and again, as EVA asks for them; PEFT itself would go on for ever."""

    def __init__(self, batches: list[dict[str, torch.Tensor]]) -> None:
        self._batches, self._left = batches, _PASSES

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self._left -= 1
        if not self._left:
            raise ValueError(f"its directions did not settle in {_PASSES} passes over the first rows")
        return iter(self._batches)


def _eva(adapted: Any, rows: list[Example], device: torch.device) -> None:
    from peft.tuners.lora import initialize_lora_eva_weights

    half = -(-len(rows) // 2)
    batches = [_batch(part, device) for part in (rows[:half], rows[half:]) if part]
    initialize_lora_eva_weights(adapted, _Passes(batches), show_progress_bar=False)


def _corda(policy: Policy, asked: Any, rows: list[Example]) -> None:
    from peft.tuners.lora.corda import preprocess_corda

    @torch.no_grad()
    def run() -> None:
        for row in rows:
            policy.causal_lm(**_batch([row], policy.device))

    preprocess_corda(policy.causal_lm, asked, run_model=run)


def _lora_ga(policy: Policy, asked: Any, rows: list[Example]) -> None:
    from peft.tuners.lora.loraga import preprocess_loraga

    def step() -> None:
        for row in rows:
            policy.causal_lm(**_batch([row], policy.device)).loss.backward()

    if frozen_linear.is_packed(policy.model):
        raise ValueError("it takes gradients of full-precision weights, and this base is quantised")
    preprocess_loraga(policy.causal_lm, asked, step)
