"""LoRA's starts from the base's weights and the recipe's rows: what they are, that the base stays as it is, and that
what leaves the run does on the untouched base what the live model does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune import checkpoint, model, starts
from finetune.errors import ModelError
from finetune.kernels import frozen_linear
from finetune.model import Policy
from tests import runs, tiny
from tests.runs import MERGED, OUTPUT, finetune, merge_run, train

IDS = torch.tensor([[5, 250, 17, 80, 44, 3, 120, 9, 201, 66, 12, 7]])
SAMPLES = tiny.samples([40, 31, 52, 18, 44, 60])
FIELDS: dict[str, Any] = tiny.FIELDS | {"lora_dropout": 0.0}


def begun(policy: Policy, folder: Path, word: str, **more: Any) -> Policy:
    return starts.attach(folder, policy, FIELDS | {"init_lora_weights": word} | more, 3, SAMPLES)


@torch.no_grad()
def logits(policy: Policy) -> torch.Tensor:
    out: torch.Tensor = policy.causal_lm.eval()(input_ids=IDS).logits.float()
    return out


def nudged(policy: Policy) -> None:
    """As training would move it."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for value in policy.trainable().values():
            value.add_(torch.randn(value.shape, generator=generator) * 0.05)


def test_pissa_begins_with_the_largest_directions(tmp_path: Path, tiny_base: Path) -> None:
    """Meng et al. 2024, equations 2 to 4: A = S½ Vᵀ and B = U S½ of the r largest singular values, over s."""
    policy = tiny.load(tiny_base)
    weight = policy.causal_lm.model.layers[1].self_attn.q_proj.weight.clone().double()
    layer = begun(policy, tmp_path / "start", "pissa").causal_lm.model.layers[1].self_attn.q_proj
    u, s, vh = torch.linalg.svd(weight)
    update = (
        layer.scaling["default"] * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    assert tiny.distance(update, u[:, :4] * s[:4] @ vh[:4]) < 1e-5


@pytest.mark.parametrize("weights", ["fp32", "bf16", "nf4", "int8"])
@pytest.mark.parametrize("word", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_a_start_leaves_the_model_as_it_was(word: str, weights: str, tmp_path: Path, tiny_base: Path) -> None:
    if word == "lora_ga" and weights in ("nf4", "int8"):
        with pytest.raises(ModelError, match="PEFT cannot begin with lora_ga"):
            begun(tiny.load(tiny_base, weights), tmp_path / "start", word)
        return
    policy = tiny.load(tiny_base, weights, "bf16" if weights == "bf16" else "fp32")
    before = logits(policy)
    held = {name: frozen_linear.dense_weight(layer, torch.float32).clone() for name, layer in linears(policy)}
    adapted = begun(policy, tmp_path / "start", word)
    assert tiny.distance(logits(adapted), before) < (2e-2 if weights == "bf16" else 1e-5)
    now = dict(linears(adapted))
    assert all(torch.equal(frozen_linear.dense_weight(now[name], torch.float32), value) for name, value in held.items())
    assert len(held) == 14
    assert not any(".start." in name for name in adapted.trainable())


def linears(policy: Policy) -> list[tuple[str, Any]]:
    """The base's linears by the names that they have without an adapter."""
    found = []
    for name, layer in policy.causal_lm.named_modules():
        plain = name.removesuffix(".base_layer")
        if plain.endswith("_proj") and not hasattr(layer, "base_layer"):
            found.append((plain, layer))
    return found


@pytest.mark.parametrize(
    "more",
    [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}],
    ids=["plain", "rsLoRA", "patterns"],
)
@pytest.mark.parametrize("weights", ["fp32", "nf4"])
def test_what_leaves_the_run_does_the_same_on_the_untouched_base(
    weights: str, more: dict[str, Any], tmp_path: Path, tiny_base: Path
) -> None:
    live = begun(tiny.load(tiny_base, weights), tmp_path / "start", "pissa", **more)
    nudged(live)
    out, config = starts.result(live.model, "base")
    checkpoint.write_folder(
        tmp_path / "out", {checkpoint.ADAPTER: saved(out), checkpoint.CONFIG: json.dumps(config).encode()}
    )
    alone = model.attach_saved(tiny.load(tiny_base, weights), tmp_path / "out")
    untouched = logits(tiny.load(tiny_base, weights))
    effect = tiny.distance(logits(live), untouched)
    assert effect > 0.05
    assert tiny.distance(logits(alone), logits(live)) < 1e-5
    assert config["r"] == 8
    assert config["init_lora_weights"] is True


def saved(weights: dict[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save

    return save(weights, {"format": "pt"})


def test_eva_moves_ranks_and_keeps_their_sum(tmp_path: Path, tiny_base: Path) -> None:
    """Paischer et al. 2024: A spans the largest directions of what comes in, B is zero; rho lets ranks differ."""
    adapted = begun(tiny.load(tiny_base), tmp_path / "start", "eva", eva_config={"rho": 2.0, "use_label_mask": False})
    ranks = [layer.r["default"] for layer in starts._layers(adapted.model)]
    assert sum(ranks) == 14 * 4
    assert len(set(ranks)) > 1
    assert tiny.distance(logits(adapted), logits(tiny.load(tiny_base))) < 1e-6
    first = load_file(tmp_path / "start" / "adapter_model.safetensors")
    begun(tiny.load(tiny_base), tmp_path / "again", "eva", eva_config={"rho": 2.0, "use_label_mask": False})
    assert tiny.same(first, load_file(tmp_path / "again" / "adapter_model.safetensors"))


def test_a_start_comes_from_its_folder_where_it_is_there(tmp_path: Path, tiny_base: Path) -> None:
    """Made again on another machine it could differ, in a sign or more."""
    begun(tiny.load(tiny_base), tmp_path / "start", "pissa")
    again = starts.attach(
        tmp_path / "start", tiny.load(tiny_base), FIELDS | {"init_lora_weights": "pissa"}, 99, tiny.samples([9])
    )
    kept = load_file(tmp_path / "start" / "adapter_model.safetensors")
    assert tiny.same(model.adapter_weights(again.model), kept)
    (tmp_path / "start" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match="adapter_model"):
        begun(tiny.load(tiny_base), tmp_path / "start", "pissa")


PISSA = ["adapter.init_lora_weights=pissa", "quantize.weights=nf4"]


def test_a_run_with_a_start_resumes_to_the_bit_and_merges(work: Path) -> None:
    assert train(*PISSA).code == 0
    whole = runs.adapter_digest()
    assert train(*PISSA, "output=runs/two", options=["--until", "3"]).code == 0
    assert train(*PISSA, "output=runs/two").code == 0
    assert runs.adapter_digest(Path("runs/two")) == whole
    said = merge_run()
    assert said.code == 0, said.err
    assert json.loads((MERGED / "finetune.json").read_text())["proof"]["mean_kl"] < 1e-3  # what rounding to bf16 leaves


def test_a_start_goes_along_into_copies(work: Path) -> None:
    assert train(*PISSA).code == 0
    whole = runs.adapter_digest()
    other = [*PISSA, "output=runs/two", f"train.copy_to=file://{Path('elsewhere').absolute()}"]
    assert train(*other, options=["--until", "3"]).code == 0
    shutil.rmtree("runs/two")
    said = train(*other)
    assert said.code == 0, said.err
    assert "going on after step 3" in said.out
    assert runs.adapter_digest(Path("runs/two")) == whole


def test_a_run_that_lost_its_start_says_so(work: Path) -> None:
    assert train(*PISSA, options=["--until", "3"]).code == 0
    shutil.rmtree(OUTPUT / "start")
    said = train(*PISSA)
    assert said.code == 4
    assert "runs/one/start: what this adapter began with is gone" in said.err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter.init_lora_weights=pissa", "adapter.use_dora=true"], "pissa begins with a part of the base"),
        (["adapter.init_lora_weights=eva", "adapter.start_from=base"], "eva has no meaning with start_from"),
        (["adapter.eva_config={rho: 1.0}"], "is of init_lora_weights: eva"),
    ],
    ids=["DoRA", "an earlier adapter", "EVA's settings alone"],
)
def test_what_has_no_meaning_together_is_refused(work: Path, overrides: list[str], words: str) -> None:
    said = finetune("plan", "r.yaml", *(part for one in overrides for part in ("--set", one)))
    assert said.code == 2
    assert words in said.err


def test_the_plan_counts_both_and_says_what_becomes_of_it(work: Path) -> None:
    plain, started = (json.loads(finetune("plan", "r.yaml", "--json", *more).out) for more in ((), ("--set", PISSA[0])))
    assert started["trainable_parameters"] == plain["trainable_parameters"]
    assert started["budget"]["adapter"] == 2 * plain["budget"]["adapter"]
    assert started["budget"]["optimizer"] == plain["budget"]["optimizer"]
    assert any("twice the rank" in note for note in started["notes"])
