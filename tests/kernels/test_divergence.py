"""Divergences from a teacher: TRL's numbers, torch's own gradient however cut, and lists of the likeliest tokens."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune.kernels import divergence
from finetune.kernels.divergence import Aim, Told, Top, Whole

TRL: dict[str, Any] = json.loads(
    (Path(__file__).resolve().parents[1] / "vectors" / "distill" / "trl.json").read_text(encoding="utf-8")
)
AIMS = {
    "forward_kl": Aim(divergence="forward_kl", beta=None, temperature=1.0, alpha=0.0),
    "reverse_kl": Aim(divergence="reverse_kl", beta=None, temperature=1.0, alpha=0.0),
    "jsd": Aim(divergence="jsd", beta=0.5, temperature=1.0, alpha=0.0),
    "forward_kl warm": Aim(divergence="forward_kl", beta=None, temperature=2.0, alpha=0.0),
    "reverse_kl cool": Aim(divergence="reverse_kl", beta=None, temperature=0.7, alpha=0.0),
    "jsd uneven": Aim(divergence="jsd", beta=0.1, temperature=0.9, alpha=0.0),
}
MIXED = {name: Aim(**{**vars(aim), "alpha": 0.3}) for name, aim in AIMS.items()}
ROWS, VOCABULARY, TALLER, WIDTH = 23, 37, 41, 12


class Given(torch.nn.Module):
    """A head whose logits are the states themselves."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states


@pytest.fixture
def made() -> tuple[torch.Tensor, torch.nn.Linear, torch.Tensor, Whole]:
    """(hidden, head, targets, a teacher of another width and a taller vocabulary), in fp64."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    head, theirs = (torch.nn.Linear(WIDTH + 4 * at, rows, bias=False) for at, rows in ((0, VOCABULARY), (1, TALLER)))
    for one in (head, theirs):
        one.weight = torch.nn.Parameter(drawn(*one.weight.shape), requires_grad=False)
    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    return drawn(ROWS, WIDTH).requires_grad_(), head, targets, Whole(hidden=drawn(ROWS, WIDTH + 4), head=theirs)


def slope(hidden: torch.Tensor, found: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad((found * scales).sum(), hidden)[0]


@pytest.mark.parametrize("name", AIMS)
def test_trl_says_the_same(name: str) -> None:
    student, teacher = (torch.tensor(TRL["fixed"][who]) for who in ("student", "teacher"))
    told = Whole(hidden=teacher, head=Given())
    for of in (divergence.plain, divergence.losses):
        found = of(student, Given(), torch.zeros(len(student), dtype=torch.long), told, AIMS[name])
        assert found.mixed.tolist() == pytest.approx(TRL["fixed"]["losses"][name], rel=1e-5)


@pytest.mark.parametrize("name", AIMS)
@pytest.mark.parametrize("kind", ["whole", "top 5", "top of all"])
@pytest.mark.parametrize("aims", [AIMS, MIXED], ids=["alone", "mixed"])
def test_the_gradient_is_torchs_own(
    made: Any, name: str, kind: str, aims: dict[str, Aim], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of three rows, each row with a weight of its own, a head of fewer tokens than the teacher's."""
    hidden, head, targets, whole = made
    aim = aims[name]
    told: Told = whole
    if kind != "whole":
        told = divergence.top(whole, 5 if kind == "top 5" else VOCABULARY, aim.temperature, VOCABULARY)
    scales = torch.linspace(0.2, 2.0, ROWS, dtype=torch.float64)
    plain = divergence.plain(hidden, head, targets, told, aim)
    expected = slope(hidden, plain.mixed, scales)
    monkeypatch.setattr(divergence, "_rows", lambda *_: 3)
    found = divergence.losses(hidden, head, targets, told, aim)
    assert torch.allclose(found.mixed, plain.mixed, rtol=1e-10, atol=0)
    assert torch.allclose(found.cross_entropy, plain.cross_entropy, rtol=1e-10, atol=0)
    assert torch.allclose(found.divergence, plain.divergence, rtol=1e-10, atol=1e-12)
    assert torch.allclose(slope(hidden, found.mixed, scales), expected, rtol=1e-9, atol=1e-12)
    trained = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    trained.weight = torch.nn.Parameter(head.weight.clone())
    through = divergence.losses(hidden, trained, targets, told, aim)
    assert torch.allclose(slope(hidden, through.mixed, scales), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", AIMS)
def test_a_list_of_all_tokens_is_the_whole(made: Any, name: str) -> None:
    hidden, head, targets, whole = made
    aim = AIMS[name]
    expected = divergence.losses(hidden, head, targets, whole, aim)
    for count in (VOCABULARY, VOCABULARY - 1):  # with the last one alone as all others
        told = divergence.top(whole, count, aim.temperature, VOCABULARY)
        found = divergence.losses(hidden, head, targets, told, aim)
        assert torch.allclose(found.mixed, expected.mixed, rtol=1e-6)
        ones = torch.ones(ROWS, dtype=torch.float64)
        assert torch.allclose(slope(hidden, found.mixed, ones), slope(hidden, expected.mixed, ones), atol=1e-6)
        expected = divergence.losses(hidden, head, targets, whole, aim)


def test_a_shorter_list_never_tells_of_a_larger_divergence(made: Any) -> None:
    hidden, head, _, whole = made
    seen = [
        divergence.kl(hidden, head, divergence.top(whole, count, 1.0, VOCABULARY), 1.0)
        for count in (1, 4, 16, VOCABULARY)
    ]
    for shorter, longer in itertools.pairwise(seen):
        assert (shorter <= longer + 1e-9).all()
        assert (shorter < longer).any()
    assert (seen[0] >= -1e-12).all()


def test_a_list_adds_to_one_and_is_the_likeliest(made: Any) -> None:
    whole: Whole = made[3]
    told = divergence.top(whole, 5, 2.0, VOCABULARY)
    expected = (whole.head(whole.hidden)[:, :VOCABULARY] / 2.0).softmax(-1)
    total = told.log_probs.exp().sum(-1) + told.rest.exp()
    assert torch.allclose(total, torch.ones_like(total))
    assert torch.allclose(told.log_probs.exp(), expected.topk(5).values, rtol=1e-9)
    assert torch.equal(told.ids, expected.topk(5).indices)


@pytest.mark.parametrize("name", AIMS)
def test_nothing_is_apart_from_itself(made: Any, name: str) -> None:
    hidden, head, targets, _ = made
    told = Whole(hidden=hidden.detach(), head=head)
    found = divergence.losses(hidden, head, targets, told, AIMS[name])
    assert found.divergence.abs().max() < 1e-12
    assert slope(hidden, found.mixed, torch.ones(ROWS, dtype=torch.float64)).abs().max() < 1e-12


def test_certain_models_stay_finite() -> None:
    """Logits hundreds apart, the two models sure of different tokens."""
    student = (torch.eye(4) * 300.0).requires_grad_()
    told: list[Told] = [Whole(hidden=torch.eye(4).flip(0) * 300.0, head=Given())]
    told.append(divergence.top(told[0], 2, 1.0, 4))
    head = torch.nn.Linear(4, 4, bias=False)
    head.weight = torch.nn.Parameter(torch.eye(4), requires_grad=False)
    for aim in MIXED.values():
        for one in told:
            found = divergence.losses(student, head, torch.arange(4), one, aim)
            assert found.mixed.isfinite().all()
            assert slope(student, found.mixed, torch.ones(4)).isfinite().all()


def test_no_logits_of_all_rows_at_once(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither head sees more rows at once than a chunk has."""
    hidden, head, targets, whole = made
    seen = []
    monkeypatch.setattr(divergence, "_rows", lambda *_: 4)
    whole.head.register_forward_hook(lambda _, given, __: seen.append(len(given[0])))
    real = divergence.linear
    monkeypatch.setattr(
        divergence, "linear", lambda states, weight: (seen.append(len(states)), real(states, weight))[1]
    )
    divergence.losses(hidden, head, targets, whole, AIMS["jsd"])
    divergence.top(whole, 3, 1.0, VOCABULARY)
    assert len(seen) > 6
    assert max(seen) == 4


def test_half_precision_is_near(made: Any) -> None:
    hidden, head, targets, whole = made
    exact = divergence.losses(hidden, head, targets, whole, AIMS["forward_kl"])
    head.weight = torch.nn.Parameter(head.weight.bfloat16(), requires_grad=False)
    low = hidden.detach().bfloat16().requires_grad_()
    theirs = torch.nn.Linear(WIDTH + 4, TALLER, bias=False)
    theirs.weight = torch.nn.Parameter(whole.head.weight.bfloat16(), requires_grad=False)
    found = divergence.losses(
        low, head, targets, Whole(hidden=whole.hidden.bfloat16(), head=theirs), AIMS["forward_kl"]
    )
    assert found.mixed.dtype == torch.float32
    assert float(found.mixed.detach().sum()) == pytest.approx(float(exact.mixed.detach().sum()), rel=0.03)
    assert slope(low, found.mixed, torch.ones(ROWS)).dtype == torch.bfloat16


def test_a_list_moves_between_devices_and_joins() -> None:
    one = Top(ids=torch.tensor([[1, 2]]), log_probs=torch.zeros(1, 2), rest=torch.zeros(1), width=9)
    both = divergence.joined([one, one.to(torch.device("cpu"))])
    assert (both.ids.tolist(), both.width) == ([[1, 2], [1, 2]], 9)
