"""One cell of the capability matrix: a method on a base in one number format, through the project's own rooms.

A verdict is ``works``, ``refused: reason`` (the project says so before it trains, or the question has no meaning), or
``fails: reason`` (it was tried, and this is what came).
"""

from __future__ import annotations

import functools
import io
import json
import math
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finetune import certify, forms, loading, manifest, merge, pipeline, shards, trained, whole
from finetune.errors import FinetuneError
from finetune.recipe import adapter_fields, adapter_methods, adapter_source, yamlfile
from finetune.terminal import Terminal
from finetune.trained import Trained

CHECKS = ("train", "resume", "merge", "export", "convert")
WORKS = "works"
STEPS, HALF = 8, 4
RATE = 0.01
_LEARNED = 0.005
"""Share of the first step's loss by which the last one's must be lower."""
_APART = 1e-3
"""Of the adapter's effect on the logits: what another program's arithmetic in fp32 may differ by."""
_EFFECT = 1e-3
"""Of the logits themselves: less than that an adapter must do to be judged by what it does."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the matrix: what a recipe says under ``adapter:``, small enough for the tiny base."""

    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    rate: float = RATE

    @property
    def name(self) -> str:
        """As ``adapter_methods.variants`` names it; fields that are not of those stand in full."""
        *_, (name, _) = adapter_methods.variants(self.method, self.fields)
        plain = {"r", "lora_alpha", "init_lora_weights", "use_rslora", "use_dora", "init_weights"}
        more = [f"{key}: {json.dumps(value)}" for key, value in self.fields.items() if key not in plain]
        return f"{name} {more[0]}" if self.method == "lora" and more else name


def _lora(rate: float = RATE, **fields: Any) -> Row:
    return Row(method="lora", fields={"r": 4, "lora_alpha": 8, **fields}, rate=rate)


_SMALL: dict[str, tuple[dict[str, Any], float]] = {
    "beft": ({}, 0.05),
    "boft": ({"boft_block_size": 4}, RATE),
    "c3a": ({"block_size": 16}, RATE),
    "deft": ({"r": 4}, RATE),
    "delora": ({"r": 4}, RATE),
    "fourierft": ({"n_frequency": 64}, RATE),
    "frod": ({}, RATE),
    "glora": ({"r": 4}, RATE),
    "gralora": ({"r": 8, "alpha": 16}, RATE),
    "hira": ({"r": 4}, RATE),
    "hra": ({"r": 4}, RATE),
    "ia3": ({}, 0.05),
    "lily": ({"r": 4}, RATE),
    "ln_tuning": ({}, 0.05),
    "loha": ({"r": 4}, RATE),
    "lokr": ({"r": 4}, RATE),
    "miss": ({"r": 8}, RATE),
    "oft": ({"oft_block_size": 16}, RATE),
    "osf": ({"effective_rank": 8}, RATE),
    "peanut": ({"r": 4}, RATE),
    "psoft": ({"r": 8, "psoft_alpha": 8}, RATE),
    "pvera": ({"r": 16}, 0.05),
    "randlora": ({"r": 8}, RATE),
    "road": ({"group_size": 16}, RATE),
    "shira": ({"r": 4}, RATE),
    "supertuning": ({"sparsity": 0.9}, RATE),
    "tinylora": ({"r": 2}, 0.02),
    "unilora": ({"r": 4}, 0.2),
    "vblora": ({"r": 4, "vector_length": 16, "num_vectors": 32}, RATE),
    "vera": ({"r": 16}, 0.05),
    "waveft": ({"n_frequency": 64}, RATE),
}


def rows() -> list[Row]:
    """LoRA and its kinds, then every other method of the installed PEFT."""
    kinds = [
        _lora(),
        _lora(use_rslora=True),
        _lora(use_dora=True),
        *(_lora(init_lora_weights=word) for word in adapter_methods.STARTS[1:]),
        _lora(init_lora_weights="loftq"),
        _lora(lora_bias=True),
        _lora(use_qalora=True),
        _lora(use_bdlora={}),
        _lora(velora_config={}),
        _lora(kasa_config={}),
        _lora(monteclora_config={}),
        _lora(alora_invocation_tokens=[1]),
        _lora(arrow_config={}),
        _lora(target_parameters=["x"]),
        _lora(layer_replication=[[0, 1]]),
    ]
    others = []
    for method in sorted(adapter_source.methods()):
        needed = dict.fromkeys(adapter_fields.required(method), 4)
        fields, rate = _SMALL.get(method, (needed, RATE))
        others += [Row(method=method, fields=fields, rate=rate)] if method != "lora" else []
    return [*kinds, *others]


def attempt(row: Row, weights: str, base: Path, folder: Path) -> dict[str, str]:
    """Every check of one cell. ``base``: a tiny base in bf16 or fp32; ``folder`` is made and removed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _Cell(row, weights, base, folder).verdicts()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Cell:
    def __init__(self, row: Row, weights: str, base: Path, folder: Path) -> None:
        self.row, self.weights, self.folder = row, weights, folder
        self.terminal = Terminal(out=io.StringIO(), quiet=True, silent=True)
        self.run, self.recipe = folder / "one", folder / "recipe.yaml"
        self.recipe.write_bytes(yamlfile.dump(_recipe(row, weights, base, folder)).encode())

    def verdicts(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for check in CHECKS:
            if check != "train" and found["train"] != WORKS:
                found[check] = found["train"] if found["train"].startswith("refused") else "refused: it does not train"
                continue
            try:
                found[check] = getattr(self, f"_{check}")()
            except FinetuneError as error:
                kind = "refused" if error.exit_code == 2 or check == "convert" else "fails"
                found[check] = f"{kind}: {_reason(error.faults[0].what, self.folder)}"
            except Exception as error:  # noqa: BLE001 - whatever a method does wrong is what the matrix is to say
                found[check] = f"fails: {_reason(str(error) or type(error).__name__, self.folder)}"
        return found

    def _train(self) -> str:
        pipeline.train(self.recipe, (), self.terminal)
        losses = [json.loads(line)["loss"] for line in (self.run / "metrics.jsonl").read_text().splitlines()]
        if not losses[-1] < losses[0] * (1 - _LEARNED):
            return f"fails: the loss does not fall ({losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps)"
        return WORKS

    def _resume(self) -> str:
        other = f"output={self.folder / 'two'}"
        pipeline.train(self.recipe, (other,), self.terminal, until=HALF)
        pipeline.train(self.recipe, (other,), self.terminal)
        digests = {
            manifest.digest(run / "adapter" / "adapter_model.safetensors") for run in (self.run, self.folder / "two")
        }
        return WORKS if len(digests) == 1 else "fails: a resumed run ends with other weights than an unbroken one"

    def _merge(self) -> str:
        certify.merge(self._given, self.folder / "merged", certify.Asked(base="replayed"), self.terminal)
        return WORKS

    def _export(self) -> str:
        out = self.folder / "export"
        pipeline.export(self.run, out, "adapter", self.terminal, target="peft", quantise=None, adapter_only=False)
        return self._agrees(out, "plain PEFT")

    def _convert(self) -> str:
        config = json.loads((self.run / "adapter" / "adapter_config.json").read_text())
        if config["peft_type"] == "LORA" and not config["use_dora"]:
            return WORKS  # it is LoRA: what was exported
        found = pipeline.to_lora(self.run, self.folder / "lora", 64, self.terminal)
        if found["relative_error"] > _APART:
            return f"fails: at full rank it is off by {found['relative_error']:.1e}"
        return self._agrees(self.folder / "lora", "the converted adapter")

    @functools.cached_property
    def _given(self) -> Trained:
        return trained.of(self.run, self.terminal)

    @torch.no_grad()
    def _agrees(self, adapter: Path, whose: str) -> str:
        """transformers and PEFT alone, over the base as it acts in training, against the live model."""
        given = self._given
        ids = torch.tensor([given.rows[0].ids])
        live = given.live(self.terminal, wide=True)
        expected = live.causal_lm.eval()(input_ids=ids).logits.float()
        del live
        model = _plain_base(given)
        before = model(input_ids=ids).logits
        found = whole.attach(model, adapter).eval()(input_ids=ids).logits
        effect = float((expected - before).norm())
        if not effect > _EFFECT * float(before.norm()):
            return f"fails: the adapter does next to nothing ({effect / float(before.norm()):.1e} of the logits)"
        apart = float((found - expected).norm()) / effect
        if not (math.isfinite(apart) and apart <= _APART):
            return f"fails: {whose} is {apart:.1e} of the adapter's effect away from the live model"
        return WORKS


def _plain_base(given: Trained) -> Any:
    from transformers import AutoModelForCausalLM

    if given.form.weights in forms.STORED:  # plain transformers reads such a folder with its library alone
        return _dequantised(given).eval()
    model = AutoModelForCausalLM.from_pretrained(given.base.folder, dtype=torch.float32, attn_implementation="sdpa")
    if given.is_quantised():
        word = given.form.weights
        dtype = torch.float32 if given.form.compute == "fp32" else torch.bfloat16
        for name in merge.quantised_names(given.base):
            weight = model.get_parameter(name)
            acts = forms.get(word).replay(word, weight.data.to(dtype), double=given.form.double)
            weight.data = acts.float()
    return model.eval()


def _dequantised(given: Trained) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**given.base.config), attn_implementation="sdpa")
    with shards.Reader(given.base) as reader:
        acts = {name: reader.tensor(name).to(loading.DTYPES[given.form.compute]).float() for name in given.base.tensors}
    model.float().load_state_dict(acts, strict=not given.base.shape.tied)
    return model


def _recipe(row: Row, weights: str, base: Path, folder: Path) -> dict[str, Any]:
    data = folder / "rows.jsonl"
    asked = [{"prompt": f"What is {n} and {n + 1}?", "completion": f"{2 * n + 1}"} for n in range(8)]
    data.write_text("".join(json.dumps(one) + "\n" for one in asked))
    return {
        "model": str(base),
        "quantize": {"weights": weights, "compute": "bf16" if weights == "bf16" else "fp32"},
        "adapter": {"method": row.method, **row.fields},
        "trainable_tokens": "none",
        "data": {"train_path": str(data)},
        "train": {
            "steps": STEPS, "examples_per_step": 8, "learning_rate": row.rate, "schedule": "constant",
            "max_length": 128, "micro_batch_tokens": 512, "save_every": HALF, "seed": 1,
        },
        "tracker": "none",
        "output": str(folder / "one"),
    }  # fmt: skip


def _reason(text: str, folder: Path) -> str:
    """One line without paths."""
    said = " ".join(text.replace(f"{folder}/", "").replace(str(folder), "the run").split())
    return said if len(said) <= 240 else f"{said[:239]}…"
