"""An adapter of another method as LoRA: exact from its true rank on, the nearest one below, and told how far off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune import as_lora, forms, whole
from tests import runs, tiny
from tests.runs import OUTPUT, finetune, train

IDS = torch.tensor([[5, 250, 17, 80, 44, 3, 120, 9, 201, 66, 12, 7]])


def trained(*overrides: str, weights: str = "fp32", method: str = "loha") -> None:
    """A finished run of another method, its base held so."""
    recipe = (
        Path("r.yaml").read_text().replace("  r: 4\n  lora_alpha: 8\n", "").replace("method: lora", f"method: {method}")
    )
    Path("r.yaml").write_text(recipe.replace("weights: nf4", f"weights: {weights}"))
    said = train("train.learning_rate=0.02", "evaluate.metrics=[loss]", *overrides)
    assert said.code == 0, said.err


def convert(rank: int, out: str = "lora", *options: str) -> runs.Said:
    return finetune("convert", str(OUTPUT), out, "--to", "lora", "--rank", str(rank), *options)


def base_model(weights: str = "fp32") -> Any:
    """The base as it acts in training, by transformers alone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    for name, value in model.named_parameters():
        if weights != "fp32" and name.endswith("_proj.weight"):
            value.data = forms.get(weights).replay(weights, value.data, double=True)
    return model.eval()


@torch.no_grad()
def logits(adapter: Path | None, weights: str = "fp32") -> torch.Tensor:
    model = base_model(weights)
    out: torch.Tensor = (model if adapter is None else whole.attach(model, adapter)).eval()(input_ids=IDS).logits
    return out


@pytest.mark.parametrize("weights", ["fp32", "nf4"])
def test_from_the_true_rank_on_it_is_the_same_adapter(weights: str, work: Path) -> None:
    """LoHa of rank r is a product of two updates of rank r, element by element: of rank r² at most (Hyeon-Woo et al.
    2021, proposition 1). Loaded by plain PEFT."""
    trained("adapter.r=3", weights=weights)
    said = convert(9, "lora", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert (found["method"], found["rank"], len(found["modules"])) == ("loha", 9, 14)
    assert found["relative_error"] < 1e-5
    assert max(found["modules"].values()) < 1e-4
    live, base = (logits(place, weights) for place in (OUTPUT / "adapter", None))
    assert tiny.distance(live, base) > 0.02
    assert float((logits(Path("lora"), weights) - live).norm() / (live - base).norm()) < 1e-4
    config = json.loads(Path("lora/adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_below_it_is_the_nearest_and_says_how_far_off(work: Path) -> None:
    trained("adapter.r=3", "adapter.target_modules=[q_proj]")
    said = convert(2)
    assert said.code == 0, said.err
    layer = whole.attach(base_model(), OUTPUT / "adapter").base_model.model.model.layers[1].self_attn.q_proj
    update = layer.get_delta_weight("default").detach()
    values = torch.linalg.svdvals(update)
    least = float(values[2:].norm() / values.norm())
    assert least > 0.01
    made = load_file("lora/adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    assert tiny.distance(made[f"{name}B.weight"] @ made[f"{name}A.weight"], update) == pytest.approx(least, rel=1e-3)
    printed = [line.split() for line in said.out.splitlines() if line.startswith("model.layers.1.self_attn.q_proj")]
    assert float(printed[0][1]) == pytest.approx(least, rel=0.01)
    assert len(made) == 4


def test_dora_becomes_lora_and_the_result_merges_and_reaches_vllm(work: Path) -> None:
    assert train("adapter.use_dora=true", "train.learning_rate=0.02", "evaluate.metrics=[loss]").code == 0
    assert convert(64).code == 0
    merged = finetune("merge", "lora", "--out", "merged")
    assert merged.code == 0, merged.err
    direct = runs.merge_run(out=Path("direct"))
    assert direct.code == 0, direct.err
    both = [load_file(Path(folder, "model.safetensors")) for folder in ("merged", "direct")]
    for name, value in both[0].items():  # both round to bf16, each by its own draw
        assert tiny.distance(value.float(), both[1][name].float()) < 6e-3, name
    assert finetune("export", "lora", "--out", "served", "--target", "vllm").code == 0


def test_a_wide_matrix_goes_by_projection_and_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = (torch.randn(size, generator=generator) for size in ((90, 5), (5, 70)))
    monkeypatch.setattr(as_lora, "_WHOLE", 10)
    pair = as_lora.nearest(b @ a, 5)
    assert pair.error < 1e-5
    again = as_lora.nearest(b @ a, 5)
    assert torch.equal(pair.a, again.a)
    short = as_lora.nearest(b @ a, 3)
    values = torch.linalg.svdvals(b @ a)
    assert short.error == pytest.approx(float(values[3:].norm() / values.norm()), rel=1e-3)


def test_a_rank_beyond_the_matrix_is_filled_with_zeros() -> None:
    pair = as_lora.nearest(torch.eye(3, 5), 8)
    assert (pair.a.shape, pair.b.shape, pair.error < 1e-6) == ((8, 5), (3, 8), True)


REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "norms": (
        lambda: trained(method="ln_tuning"),
        "which is no weight of a linear: LoRA cannot hold that; merge it instead: finetune merge",
    ),
    "biases": (lambda: trained(method="ia3"), "self_attn.q_proj.bias, which is no weight of a linear"),
    "no update of weights": (lambda: trained("adapter.r=4", method="lily"), "PEFT cannot merge this method"),
    "LoRA": (lambda: None, "this is LoRA already"),
    "rows beside it": (lambda: None, "modules or rows are trained whole beside it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_lora_cannot_hold_is_refused_and_nothing_is_left(case: str, work: Path) -> None:
    prepare, words = REFUSED[case]
    prepare()
    if not OUTPUT.exists():
        assert train(*(["trainable_tokens=[<|im_end|>]"] if case == "rows beside it" else [])).code == 0
    said = convert(8)
    assert said.code == 4
    assert words in said.err
    assert not list(Path().glob("*lora*"))


@pytest.mark.parametrize(
    ("words", "option"),
    [(["--to", "lora"], "--rank"), (["--to", "native", "--rank", "4"], "--rank"), (["--to", "lroa"], "--to")],
)
def test_options_that_do_not_go_together(words: list[str], option: str, work: Path) -> None:
    said = finetune("convert", "base", "out", *words)
    assert said.code != 0
    assert option in said.err
    assert not Path("out").exists()


def test_nothing_is_written_over(work: Path) -> None:
    trained("adapter.r=2")
    Path("lora").mkdir()
    said = convert(4)
    assert said.code == 5
    assert "something is there already" in said.err
