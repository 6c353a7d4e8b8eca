"""The comparison of two models: its figures by their definition, and what counts as the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune import proof
from tests import tiny


def _random(positions: int, vocabulary: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(positions, vocabulary, generator=generator).log_softmax(-1)


def test_kl_is_its_definition() -> None:
    live, merged = _random(7, 11, 0), _random(7, 11, 1)
    found = proof.compare(live, merged, proof.MEAN_KL["replayed"])
    each = [
        sum(float(p.exp() * (p - q)) for p, q in zip(*rows, strict=True)) for rows in zip(live, merged, strict=True)
    ]
    assert found.mean_kl == pytest.approx(sum(each) / 7, rel=1e-5)
    assert found.max_kl == pytest.approx(max(each), rel=1e-5)
    assert found.agreement == pytest.approx(float((live.argmax(-1) == merged.argmax(-1)).float().mean()))
    assert (found.positions, found.bound, found.holds) == (7, 1e-3, False)
    torch_kl = torch.nn.functional.kl_div(merged, live, log_target=True, reduction="batchmean")
    assert found.mean_kl == pytest.approx(float(torch_kl), rel=1e-5)


def test_the_same_model_holds() -> None:
    live = _random(5, 9, 0)
    found = proof.compare(live, live.clone(), proof.MEAN_KL["replayed"])
    assert (found.mean_kl, found.max_kl, found.agreement, found.holds) == (0.0, 0.0, 1.0, True)
    assert found.to_dict()["holds"] is True


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf")])
def test_a_merged_model_that_gives_no_numbers_does_not_hold(bad: float) -> None:
    live, merged = _random(5, 9, 0), _random(5, 9, 0)
    merged[3, 2] = bad
    for choice in proof.MEAN_KL:
        assert not proof.compare(live, merged, proof.MEAN_KL[choice]).holds


def test_distributions_are_those_of_a_plain_forward(tiny_base: Path) -> None:
    """At the positions before supervised tokens, each sample by itself, at most so many."""
    policy = tiny.load(tiny_base)
    examples = tiny.samples([12, 5, 9])
    found = proof.distributions(policy, examples)
    wanted = []
    for example in examples:
        with torch.no_grad():
            logits = policy.model(torch.tensor([example.ids])).logits[0]
        places = [i - 1 for i, marked in enumerate(example.supervised) if marked]
        wanted.append(logits[places].log_softmax(-1))
    assert torch.allclose(found, torch.cat(wanted), atol=1e-5)
    many = proof.distributions(policy, tiny.samples([40] * 60))
    assert len(many) == 512


def test_marking_takes_the_config_away(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    proof.mark_unusable(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json.unusable"]
