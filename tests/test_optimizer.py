"""Optimizers: each against its paper, in fp32 whatever the base, with a state that survives a break to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer

from finetune import loop, recipe
from finetune import optimizer as optimizers
from finetune.model import Policy
from finetune.objectives import sft
from tests import tiny

BITSANDBYTES = ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"]
KINDS = ["adamw", *BITSANDBYTES, "lora_fa", "riemannian"]
CHOICES = [*((kind, None) for kind in KINDS), ("adamw", 4.0), ("adamw_8bit", 4.0)]
LENGTHS = [5, 17, 9, 3, 12, 8]
BETA1, BETA2 = optimizers.BETAS


def adapted(folder: Path, form: str = "nf4", compute: str = "bf16", **fields: Any) -> Policy:
    """Rank 40, so that of the tiny base's matrices some have 8-bit states and some are too small for that."""
    return tiny.adapt(tiny.load(folder, form, compute), **({"r": 40, "lora_alpha": 80} | fields))


def trained(policy: Policy, kind: str, ratio: float | None = None, steps: int = 12, **course: Any) -> list[float]:
    """The losses of some steps."""
    optimizer = optimizers.make(policy.model, kind, lora_plus_ratio=ratio)
    plan = tiny.course([range(6)] * steps, **({"peak_rate": 2e-3} | course))
    return [event.loss for event in loop.run(policy, sft, tiny.samples(LENGTHS), plan, optimizer)]


def pushed(policy: Policy, optimizer: torch.optim.Optimizer, steps: int, size: float = 1e-3) -> list[dict[str, Any]]:
    """Random gradients, the same for equal names; returns each step's, as they were before the optimizer."""
    generator, seen = torch.Generator().manual_seed(5), []
    for _ in range(steps):
        drawn = {
            name: torch.randn(value.shape, generator=generator) * size
            for name, value in policy.model.named_parameters()
            if "lora_A" in name or value.requires_grad  # also where A is frozen: the others' are then the same
        }
        for name, value in policy.trainable().items():
            value.grad = drawn[name].clone()
        loop._update(optimizer, [], 1e-3, 1.0, None)
        seen.append(drawn)
    return seen


class Adam:
    """Algorithm 2 of Loshchilov and Hutter (2019) for one tensor, in fp64."""

    def __init__(self, start: torch.Tensor) -> None:
        self.value, self.first, self.second, self.steps = start.double(), 0.0, 0.0, 0

    def move(self, gradient: torch.Tensor, rate: float = 1e-3, decay: float = 0.0) -> None:
        self.steps += 1
        self.first = BETA1 * self.first + (1 - BETA1) * gradient  # type: ignore[assignment]
        self.second = BETA2 * self.second + (1 - BETA2) * gradient**2  # type: ignore[assignment]
        first, second = self.first / (1 - BETA1**self.steps), self.second / (1 - BETA2**self.steps)
        self.value = self.value * (1 - rate * decay) - rate * first / (second**0.5 + 1e-8)  # type: ignore[attr-defined]


def nearness(one: torch.Tensor, two: torch.Tensor, start: torch.Tensor) -> float:
    """Mean distance of two ends, by the mean way there: what AdamW makes of a gradient near zero hardly counts."""
    return float(((one - two).abs().mean() / (two - start).abs().mean()).detach())


def pair_of(policy: Policy, word: str) -> tuple[str, str]:
    """The names of A and B of the first module of that name."""
    name = next(name for name, _ in policy.model.named_parameters() if word in name and "lora_A" in name)
    return name, name.replace("lora_A", "lora_B")


@pytest.mark.parametrize(("kind", "ratio"), CHOICES)
def test_the_loss_falls(tiny_base: Path, kind: str, ratio: float | None) -> None:
    losses = trained(adapted(tiny_base, wake=False), kind, ratio)
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_torchs(tiny_base: Path, decay: float) -> None:
    one, two = adapted(tiny_base), adapted(tiny_base)
    pushed(one, optimizers.make(one.model, "adamw", weight_decay=decay), 5)
    how = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": decay, "fused": True}
    pushed(two, torch.optim.AdamW(two.trainable().values(), **how), 5)
    assert tiny.same(tiny.weights(one), tiny.weights(two))


def distance_to_adamw(folder: Path, kind: str, decay: float, steps: int) -> dict[str, float]:
    """By tensor: how far apart the two ends are, relative to the way that AdamW went."""
    one, two = adapted(folder), adapted(folder)
    start = tiny.weights(one)
    pushed(one, optimizers.make(one.model, kind, weight_decay=decay), steps)
    pushed(two, optimizers.make(two.model, "adamw", weight_decay=decay), steps)
    ends = tiny.weights(one), tiny.weights(two)
    return {name: tiny.distance(ends[0][name] - start[name], ends[1][name] - start[name]) for name in start}


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_bitsandbytes_kinds_stay_near_adamw(tiny_base: Path, kind: str, decay: float) -> None:
    sizes = {name: value.numel() for name, value in adapted(tiny_base).trainable().items()}
    assert min(sizes.values()) < optimizers.MIN_8BIT <= max(sizes.values())
    for name, found in distance_to_adamw(tiny_base, kind, decay, 20).items():
        coarse = kind.endswith("8bit") and sizes[name] >= optimizers.MIN_8BIT
        assert (1e-4 < found < 0.1) if coarse else found < 2e-5, name  # 8 bits: two digits of each moment


@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_lora_plus_is_two_rates(tiny_base: Path, ratio: float) -> None:
    one, two = adapted(tiny_base), adapted(tiny_base)
    pushed(one, optimizers.make(one.model, "adamw", weight_decay=0.1, lora_plus_ratio=ratio), 5)
    high = [value for name, value in two.trainable().items() if "lora_B" in name]
    low = [value for name, value in two.trainable().items() if "lora_B" not in name]
    by_hand = [torch.optim.AdamW(group, lr=1e-3, weight_decay=0.1, fused=True) for group in (low, high)]
    by_hand[1].param_groups[0]["lr"] = 1e-3 * ratio
    for drawn in pushed(adapted(tiny_base), torch.optim.SGD([torch.zeros(1)]), 5):
        for name, value in two.trainable().items():
            value.grad = drawn[name]
        for optimizer in by_hand:
            optimizer.step()
    assert tiny.same(tiny.weights(one), tiny.weights(two))


def test_lora_plus_is_pefts_where_that_has_no_traps(tiny_base: Path) -> None:
    one, two = adapted(tiny_base), adapted(tiny_base)
    pushed(one, optimizers.make(one.model, lora_plus_ratio=8.0), 4)
    theirs = create_loraplus_optimizer(two.model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8.0, fused=True)
    for group in theirs.param_groups:
        group[optimizers.RATIO] = group["lr"] / 1e-3
    pushed(two, theirs, 4)
    assert tiny.same(tiny.weights(one), tiny.weights(two))


def test_lora_plus_speeds_up_b_alone(tiny_base: Path) -> None:
    """PEFT's would give its rate to every tensor of one dimension too: DoRA's magnitudes, a norm trained whole."""
    policy = adapted(tiny_base, use_dora=True, modules_to_save=["norm"])
    start = tiny.weights(policy)
    pushed(policy, optimizers.make(policy.model, lora_plus_ratio=10.0), 1)
    for name, value in tiny.weights(policy).items():
        step = float((value - start[name]).abs().max())
        assert step == pytest.approx(1e-2 if "lora_B" in name else 1e-3, rel=1e-2), name


def test_the_course_sets_both_rates(tiny_base: Path) -> None:
    policy = adapted(tiny_base)
    optimizer = optimizers.make(policy.model, lora_plus_ratio=4.0)
    plan = tiny.course([(0,)] * 6, peak_rate=1e-3, warmup=3, kind="linear")
    for event in loop.run(policy, sft, tiny.samples(LENGTHS), plan, optimizer):
        assert [group["lr"] for group in optimizer.param_groups] == [event.learning_rate, 4 * event.learning_rate]


LORA_FA: dict[str, dict[str, Any]] = {
    "alpha over r": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 3}},
}


@pytest.mark.parametrize("case", LORA_FA)
def test_lora_fa_is_the_papers_update(tiny_base: Path, case: str) -> None:
    """Zhang et al. (2023): A is frozen; B's gradient becomes s⁻² G (A Aᵀ)⁻¹, and AdamW takes it from there."""
    policy = adapted(tiny_base, **({"r": 16, "lora_alpha": 32} | LORA_FA[case]))
    first, second = pair_of(policy, "q_proj")
    weights = dict(policy.model.named_parameters())
    a, start = weights[first].detach().double().clone(), weights[second].detach().clone()
    adam = Adam(start)
    layer = policy.model.get_submodule(first.partition(".lora_A")[0])
    optimizer = optimizers.make(policy.model, "lora_fa", weight_decay=0.1)
    for drawn in pushed(policy, optimizer, 5):
        projected = drawn[second].double() @ torch.linalg.inv(a @ a.T) / layer.scaling["default"] ** 2
        adam.move(projected, decay=0.1)
    scale = {"alpha over r": 2, "rsLoRA": 32 / 4, "patterns": 3 / 8}[case]
    assert layer.scaling["default"] == pytest.approx(scale)
    # PEFT rounds the projected gradient to bf16, adds eps a little earlier, and decays after the step.
    moment = optimizer.state[f"{second.partition('lora_B')[0]}lora"]["exp_avg_B"]
    assert tiny.distance(moment, adam.first) < 4e-3  # type: ignore[arg-type]
    assert nearness(weights[second], adam.value, start) < 2e-2
    assert torch.equal(weights[first].double(), a)
    assert not any("lora_A" in name for name in policy.trainable())


def test_lora_fa_moves_under_the_small_gradients_of_large_models(tiny_base: Path) -> None:
    """PEFT's own eps would hold B back tenfold at first."""
    steps = {}
    for who in ("ours", "PEFT's"):
        policy = adapted(tiny_base, r=16, lora_alpha=32)
        optimizer = optimizers.make(policy.model, "lora_fa")
        if who == "PEFT's":
            optimizer = create_lorafa_optimizer(policy.model, 16, 32, lr=0.0)
        start = tiny.weights(policy)
        pushed(policy, optimizer, 1, size=3e-6)
        (value,) = {
            name: value for name, value in tiny.weights(policy).items() if name == pair_of(policy, "q_proj")[1]
        }.values()
        steps[who] = float((value - start[pair_of(policy, "q_proj")[1]]).abs().mean() / 1e-3)
    assert steps["ours"] > 0.7
    assert steps["PEFT's"] < 0.3


def test_riemannian_is_the_papers_update(tiny_base: Path) -> None:
    """Zhang and Pilanci (2024): A's gradient becomes (BᵀB + δ)⁻¹ G, B's G (A Aᵀ + δ)⁻¹, then AdamW; δ is PEFT's."""
    policy = adapted(tiny_base, "fp32", "fp32")
    names = pair_of(policy, "q_proj")
    weights = dict(policy.model.named_parameters())
    a, b = (Adam(weights[name].detach()) for name in names)
    damping = 1e-2 * torch.eye(40, dtype=torch.float64)
    for drawn in pushed(policy, optimizers.make(policy.model, "riemannian", weight_decay=0.1), 5):
        left = torch.linalg.inv(b.value.T @ b.value + damping) @ drawn[names[0]].double()
        right = drawn[names[1]].double() @ torch.linalg.inv(a.value @ a.value.T + damping)
        a.move(left, decay=0.1)
        b.move(right, decay=0.1)
    for name, wanted in zip(names, (a, b), strict=True):
        assert torch.allclose(weights[name].double(), wanted.value, rtol=0, atol=1e-6)


WHOLE: dict[str, dict[str, Any]] = {
    "modules": {"modules_to_save": ["lm_head", "norm"]},
    "rows": {"trainable_token_indices": {"embed_tokens": [3, 4], "lm_head": [3, 4]}},
}


@pytest.mark.parametrize("kind", ["lora_fa", "riemannian"])
@pytest.mark.parametrize("case", WHOLE)
def test_what_is_no_matrix_of_lora_is_moved_by_adamw(tiny_base: Path, kind: str, case: str) -> None:
    one, two = (adapted(tiny_base, "bf16", **WHOLE[case]) for _ in range(2))
    start = tiny.weights(one)
    pushed(one, optimizers.make(one.model, kind, weight_decay=0.1), 5)
    pushed(two, optimizers.make(two.model, "adamw", weight_decay=0.1), 5)
    ends = tiny.weights(one), tiny.weights(two)
    others = [name for name in ends[0] if "lora" not in name]
    assert len(others) >= 2
    for name in others:
        assert nearness(ends[0][name], ends[1][name], start[name]) < 1e-2, name


@pytest.mark.parametrize(("kind", "ratio"), CHOICES)
def test_how_a_step_is_split_changes_nothing(tiny_base: Path, kind: str, ratio: float | None) -> None:
    start, ends = tiny.weights(adapted(tiny_base, "fp32", "fp32", r=16)), []
    for at_once in (20, 64):
        policy = adapted(tiny_base, "fp32", "fp32", r=16)
        trained(policy, kind, ratio, steps=4, peak_rate=1e-3, micro_batch_tokens=at_once)
        ends.append(tiny.flat(tiny.weights(policy)))
    assert nearness(ends[0], ends[1], tiny.flat({name: start[name] for name in policy.trainable()})) < 1e-3


@pytest.mark.parametrize(("kind", "ratio"), CHOICES)
def test_masters_are_fp32_and_small_steps_arrive(tiny_base: Path, kind: str, ratio: float | None) -> None:
    """S16: updates of 1e-5 of a weight, which bf16 would round away, are there and add up."""
    policy = adapted(tiny_base)
    start = tiny.weights(policy)
    assert {value.dtype for value in policy.trainable().values()} == {torch.float32}
    trained(policy, kind, ratio, steps=10, peak_rate=1e-7)
    ends = tiny.weights(policy)
    changed = torch.cat([(ends[name] != start[name]).reshape(-1) for name in ends]).double().mean()
    relative = torch.cat([((ends[name] - start[name]) / start[name]).abs().reshape(-1) for name in ends])
    assert changed > 0.95  # the others are so large that fp32 holds no step of 1e-7 either
    assert 1e-7 < float(relative.median()) < 1e-3
    assert {value.dtype for value in ends.values()} == {torch.float32}


def test_a_frozen_a_leaves_the_other_gradients_and_keeps_no_more(tiny_base: Path) -> None:
    found, kept = [], []
    for frozen in (False, True):
        policy, held = adapted(tiny_base), dict[int, int]()
        if frozen:
            optimizers.make(policy.model, "lora_fa")

        def pack(value: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            held[value.data_ptr()] = value.nbytes
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            found.append(tiny.gradient_of(policy, tiny.samples(LENGTHS)))
        kept.append(sum(held.values()))
    assert kept[1] <= kept[0]
    assert {name for name in found[0] if "lora_B" in name} == set(found[1])
    assert tiny.same({name: found[0][name] for name in found[1]}, found[1])


def test_kinds_are_the_recipes() -> None:
    words = recipe.schema()["properties"]["train"]["properties"]["optimizer"]["enum"]
    assert set(words) == set(KINDS)


def test_answering_without_the_adapter_leaves_what_is_frozen(tiny_base: Path) -> None:
    """PEFT's own switch makes A trainable on the way back: it would be counted in the gradient's norm."""
    policy = adapted(tiny_base)
    optimizers.make(policy.model, "lora_fa")
    before = set(policy.trainable())
    with policy.evaluating(adapter=False):
        pass
    assert set(policy.trainable()) == before
