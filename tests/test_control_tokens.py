"""Tokens that the base never learned: seen in its weights, trained as a few rows, merged and exported exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import base as bases
from finetune import control_tokens, finished, tokenizer
from finetune.renderer import Renderer
from finetune.terminal import Terminal
from tests import qwen1, runs
from tests.runs import MERGED, OUTPUT, awake

Build = Callable[..., Path]
START, STOP = "<|im_start|>", "<|im_end|>"


@pytest.fixture
def original(work: Path, build_tiny: Build) -> Path:
    shutil.rmtree(work / "base")
    qwen1.build(work / "base", build_tiny)
    return work


def ids() -> dict[str, int]:
    base = bases.inspect(Path("base"))
    found = tokenizer.of(base)
    return {name: found.convert_tokens_to_ids(name) for name in (START, STOP)}


def short(matrix: str) -> None:
    """Rows of hardly any length, as they start."""
    rows = torch.tensor(list(ids().values()))
    qwen1.change(Path("base"), matrix, lambda value: value.index_copy(0, rows, value[rows] * 0.05))


def pushed_about() -> None:
    """Rows of a head that no token ever used point one way, those of the control tokens among them."""
    unused = torch.arange(293, 320)
    generator = torch.Generator().manual_seed(0)

    def edit(value: torch.Tensor) -> torch.Tensor:
        where = torch.cat([unused, torch.tensor(list(ids().values()))])
        noise = torch.randn(len(where), value.shape[1], generator=generator) * 0.02
        return value.index_copy(0, where, (value[5].float() + noise).to(value.dtype))

    qwen1.change(Path("base"), "lm_head.weight", edit)


def found() -> dict[str, int]:
    base = bases.inspect(Path("base"))
    renderer = Renderer(tokenizer.of(base), base.stop_token, piecewise=True)
    tokens = control_tokens.template_tokens(renderer)
    return control_tokens.untrained(base, tokens, control_tokens._unused(base, renderer))


def test_rows_that_were_trained_are_left_alone(original: Path) -> None:
    assert found() == {}


@pytest.mark.parametrize(
    "spoil",
    [lambda: short("transformer.wte.weight"), lambda: short("lm_head.weight"), pushed_about],
    ids=["short embedding", "short head", "pushed about"],
)
def test_rows_that_nobody_trained_are_seen(original: Path, spoil: Callable[[], None]) -> None:
    spoil()
    assert found() == ids()


@pytest.mark.real
def test_the_real_base_knows_its_control_tokens(real_base: Path) -> None:
    base = bases.inspect(real_base)
    renderer = Renderer(tokenizer.of(base), base.stop_token)
    tokens = control_tokens.template_tokens(renderer)
    assert set(tokens) == {START, STOP}
    assert control_tokens.untrained(base, tokens, control_tokens._unused(base, renderer)) == {}


def test_auto_says_the_fix_and_applies_it(original: Path) -> None:
    short("transformer.wte.weight")
    short("lm_head.weight")
    said = runs.finetune("plan", "r.yaml", "--json")
    plan = json.loads(said.out)
    rows = sorted(ids().values())
    assert plan["adapter_fields"]["trainable_token_indices"] == {"embed_tokens": rows, "lm_head": rows}
    assert plan["whole_parameters"] == 2 * 2 * 64
    assert any(f"trainable_tokens: [{START}, {STOP}]" in note and "256 parameters" in note for note in plan["notes"])
    named = runs.finetune("plan", "r.yaml", "--json", "--set", f"trainable_tokens=[{START}, {STOP}]")
    assert json.loads(named.out)["adapter_fields"] == plan["adapter_fields"]
    off = json.loads(runs.finetune("plan", "r.yaml", "--json", "--set", "trainable_tokens=none").out)
    assert "trainable_token_indices" not in off["adapter_fields"]
    assert any("the model may never end an answer" in note for note in off["notes"])


@pytest.mark.parametrize("weights", ["nf4", "bf16"])
def test_trained_resumed_merged_and_exported_exactly(original: Path, weights: str) -> None:
    short("transformer.wte.weight")
    short("lm_head.weight")
    form = [f"quantize.weights={weights}", "evaluate.metrics=[loss]"]
    assert runs.train("train.steps=4", "output=runs/whole", *form).code == 0
    assert runs.train("train.steps=2", *form).code == 0
    assert runs.train("train.steps=4", *form, options=["--extend"]).code == 0
    assert runs.adapter_digest() == runs.adapter_digest(Path("runs/whole"))
    trained = load_file(OUTPUT / "adapter" / "adapter_model.safetensors")
    rows = {name: value for name, value in trained.items() if "trainable_tokens" in name}
    assert len(rows) == 2
    before = qwen1.tensors(Path("base"))
    where = torch.tensor(sorted(ids().values()))
    for name, value in rows.items():
        stored = before["lm_head.weight" if "lm_head" in name else "transformer.wte.weight"]
        assert value.dtype == torch.float32
        assert float((value - stored[where].float()).abs().min(dim=1).values.max()) >= 0
        assert not torch.equal(value, stored[where].float()), name
    awake(OUTPUT / "adapter")
    assert runs.merge_run().code == 0
    assert runs.merge_run("--layout", "original", out=Path("back")).code == 0
    after = qwen1.tensors(Path("back"))
    for name in ("transformer.wte.weight", "lm_head.weight"):
        changed = (after[name] != before[name]).any(dim=1).nonzero().squeeze(1)
        assert changed.tolist() == where.tolist(), name
    # Plain PEFT on the live base and the merged folder say the same.
    prepared, files = finished.open_run(OUTPUT, Terminal(quiet=True))
    live = finished.live(prepared, files, Terminal(quiet=True))[1]
    prompt = torch.tensor([[*where.tolist(), 17, 80, where[0], 9, 201, 66, 12, 7]])
    from transformers import AutoModelForCausalLM

    with live.evaluating(), torch.no_grad():
        wanted = live.causal_lm(prompt).logits
        merged = AutoModelForCausalLM.from_pretrained(MERGED, dtype=torch.float32)(prompt).logits
    assert float((merged - wanted).abs().max()) < 0.2
    with live.evaluating(adapter=False):
        assert float((live.causal_lm(prompt).logits - wanted).abs().max()) > 0.2


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["trainable_tokens=[two words here]"], "is not one token of this model"),
        ([f"trainable_tokens=[{STOP}]", "adapter.modules_to_save=[lm_head]"], "is trained by the adapter already"),
    ],
)
def test_what_cannot_be_trained_so_is_refused(original: Path, overrides: list[str], what: str) -> None:
    said = runs.finetune("plan", "r.yaml", *(part for one in overrides for part in ("--set", one)))
    assert (said.code, what in said.err) == (2, True), said.err
    assert "trainable_tokens" in said.err


def test_a_tied_base_has_one_matrix(work: Path, build_tiny: Build) -> None:
    shutil.rmtree(work / "base")
    build_tiny(work / "base", tie_word_embeddings=True)
    said = runs.train("train.steps=1", "evaluate.metrics=[loss]", f"trainable_tokens=[{STOP}]")
    assert said.code == 0, said.err
    awake(OUTPUT / "adapter")
    assert runs.merge_run().code == 0


def test_tokens_that_only_the_data_holds_are_looked_at_too(work: Path) -> None:
    """A tool's frame, say, which a plain conversation's prompt does not show."""
    path = Path("base/tokenizer.json")
    file = json.loads(path.read_text())
    number = max(token["id"] for token in file["added_tokens"]) + 1
    file["added_tokens"].append(file["added_tokens"][0] | {"id": number, "content": "<call>", "special": False})
    path.write_text(json.dumps(file))

    tensors = load_file("base/model.safetensors")
    tensors["model.embed_tokens.weight"][number] *= 0.05
    save_file(tensors, "base/model.safetensors", {"format": "pt"})

    def rows() -> object:
        said = runs.finetune("plan", "r.yaml", "--json")
        assert said.code == 0, said.err
        return json.loads(said.out)["adapter_fields"].get("trainable_token_indices")

    assert rows() is None
    runs.write_rows(Path("train.jsonl"), [runs.chat(f"{n}", "<call>x") for n in range(9)])
    assert rows() == {"embed_tokens": [number], "lm_head": [number]}
