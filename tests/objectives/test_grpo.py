"""GRPO's loss and gradient: TRL's on the same completions, the plain formula's however a step is cut; its sampling."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from finetune import beginning, loop, objectives
from finetune.dataset import Example, Question
from finetune.errors import RecipeError
from finetune.model import Policy
from finetune.objectives.grpo import Completion, Grpo
from finetune.rollouts import Reward, Rollouts
from tests import tiny
from tests.objectives import rows

TRL: dict[str, Any] = json.loads((rows.VECTORS / "grpo.json").read_text())
CUTS = {"all in one": 10_000, "one by one": 1, "uneven": 47}


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("vectors_of_grpo", rows.VECTORS / "make_grpo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = script()


@dataclass
class Given:
    """Completions that are known before they are asked for."""

    found: list[Completion]
    completions: int = MAKER.GROUP
    max_new_tokens: int = MAKER.LONGEST
    temperature: float = 1.0
    seeds: list[int] = field(default_factory=list)

    def __call__(self, policy: Policy, examples: Sequence[Example], seed: int) -> list[Completion]:
        self.seeds.append(seed)
        return self.found


def of_trl() -> list[Completion]:
    found = []
    for number, row in enumerate(TRL["rows"]):
        for answer, earned in zip(row["answers"], row["rewards"], strict=True):
            rewards = {
                f"r{i}": value * weight for i, (value, weight) in enumerate(zip(earned, MAKER.WEIGHTS, strict=True))
            }
            example = rows.example(row["prompt"], answer, f"r:{number}")
            found.append(Completion(example=example, ended=answer[-1] == TRL["end"], rewards=rewards))
    return found


def make(kind: str, found: list[Completion]) -> Grpo:
    settings = MAKER.settings(kind)
    given = Given(found, temperature=settings.pop("temperature"))
    made = objectives.get("grpo", settings | {"sample": given})
    assert isinstance(made, Grpo)
    return made


@pytest.fixture(scope="module")
def base(build_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny(tmp_path_factory.mktemp("peer") / "base")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == TRL["base"], "the tiny base has changed: make the vectors again"
    return folder


def gradient(
    policy: Policy, objective: Grpo, batches: Sequence[objectives.Batch]
) -> tuple[float, torch.Tensor, dict[str, float]]:
    """(mean loss, gradient, figures) of a step's micro-batches."""
    count = sum(batch.count for batch in batches)
    results = [objective.loss(policy, batch) for batch in batches]
    loss = torch.stack([result.total for result in results]).sum() / count
    loss.backward()
    found = tiny.flat({name: value.grad.clone() for name, value in policy.trainable().items()})
    policy.model.zero_grad(set_to_none=True)
    return loss.item(), found, objectives.averaged([result.tallies for result in results])


@pytest.mark.parametrize("kind", MAKER.KINDS)
def test_loss_gradient_and_advantages_are_those_of_trl(kind: str, base: Path) -> None:
    policy, told = tiny.adapt(tiny.load(base), wake=False), TRL["told"][kind]
    rows.script().wake(policy.model)
    policy.model.train()
    found = of_trl()
    objective = make(kind, found)
    assert objective.advantages([one.reward for one in found]).tolist() == pytest.approx(told["advantages"], rel=1e-5)
    batches = objective.judged(policy, found, 10_000)
    if MAKER.settings(kind)["iterations"] > 1:
        MAKER.move(policy.model)
    loss, slope, figures = gradient(policy, objective, batches)
    assert loss == pytest.approx(told["loss"], rel=1e-5, abs=1e-7)
    assert float(slope.double().norm()) == pytest.approx(told["gradient"], rel=1e-4)
    assert figures["reward"] == pytest.approx(told["figures"]["reward"], rel=1e-6)
    if "kl" in told["figures"]:
        assert figures["kl"] == pytest.approx(told["figures"]["kl"], rel=1e-4)
    if (
        "again" in kind and "kl" in told["figures"]
    ):  # without KL the completions that have no advantage are not looked at
        assert figures["clip_ratio/region_mean"] == pytest.approx(told["figures"]["clip_ratio/region_mean"], rel=1e-5)
        assert figures["clip_ratio/region_mean"] > 0


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_the_vectors_are_what_trl_says_today() -> None:
    pytest.importorskip("trl", reason="TRL is not installed: what it said once is compared with alone")
    made = MAKER.make()
    assert made["rows"] == TRL["rows"]
    for kind, told in TRL["told"].items():
        assert made["told"][kind]["loss"] == pytest.approx(told["loss"], rel=1e-5, abs=1e-7)
        assert made["told"][kind]["gradient"] == pytest.approx(told["gradient"], rel=1e-4)


def drawn(seed: int = 0) -> list[Completion]:
    """Random completions of uneven lengths to three prompts, some cut off; one group earns all the same."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(250, (length,), generator=generator).tolist()

    made = []
    for prompt in range(3):
        asked = ids(2, 12)
        for number in range(MAKER.GROUP):
            earned = 0.1 if prompt == 1 else float(torch.rand((), generator=generator))
            example = rows.example(asked, ids(1, MAKER.LONGEST), f"r:{prompt} ({number})")
            made.append(Completion(example=example, ended=(prompt + number) % 3 != 0, rewards={"r": earned}))
    return made


def by_definition(
    policy: Policy, kind: str, found: list[Completion], old: list[torch.Tensor] | None
) -> tuple[float, torch.Tensor]:
    """(loss, gradient) from each completion by itself, all logits, as the papers write it. ``old``: by completion."""
    asked = MAKER.settings(kind)
    advantages = []
    for low in range(0, len(found), MAKER.GROUP):
        group = torch.tensor([one.reward for one in found[low : low + MAKER.GROUP]], dtype=torch.float64)
        scale = (group.std() if asked["scale_rewards"] == "group" else 1.0 - 1e-4) + 1e-4
        advantages += ((group - group.mean()) / scale).tolist()
    if asked["scale_rewards"] == "batch":
        scale = torch.tensor([one.reward for one in found], dtype=torch.float64).std() + 1e-4
        advantages = [float(one / scale) for one in advantages]
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for number, (one, advantage) in enumerate(zip(found, advantages, strict=True)):
        if asked["mask_truncated_completions"] and not one.ended:
            continue
        here = tokenwise(policy, one.example, asked["temperature"])
        ratio = torch.exp(here - (here.detach() if old is None else old[number]))
        high = asked["epsilon"] if asked["epsilon_high"] is None else asked["epsilon_high"]
        each = -torch.minimum(ratio * advantage, ratio.clamp(1 - asked["epsilon"], 1 + high) * advantage)
        if asked["beta"]:
            with torch.no_grad(), beginning.as_found(policy.model, policy.start):
                origin = tokenwise(policy, one.example, asked["temperature"])
            weight = ratio if asked["use_bias_correction_kl"] else 1.0
            each = each + asked["beta"] * weight * (torch.exp(origin - here) - (origin - here) - 1)
        total, tokens = total + (each.mean() if asked["loss"] == "grpo" else each.sum()), tokens + len(each)
    divisor = {"grpo": len(found), "dapo": tokens, "dr_grpo": len(found) * MAKER.LONGEST}[asked["loss"]]
    loss = total / divisor
    loss.backward()
    slope = tiny.flat({name: value.grad.clone() for name, value in policy.trainable().items()})
    policy.model.zero_grad(set_to_none=True)
    return loss.item(), slope


def tokenwise(policy: Policy, example: Example, temperature: float) -> torch.Tensor:
    """The answer's log-probabilities by the library alone: [tokens], fp64."""
    answer = sum(example.supervised)
    logits = policy.causal_lm(torch.tensor([example.ids]), use_cache=False).logits[0, -answer - 1 : -1] / temperature
    found: torch.Tensor = logits.log_softmax(-1).gather(1, torch.tensor(example.ids[-answer:])[:, None]).squeeze(1)
    return found.double()


@pytest.mark.parametrize("kind", MAKER.KINDS)
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 2e-5), ("fp64", 1e-10)])
def test_every_cut_gives_the_gradient_of_the_formula(tiny_base: Path, kind: str, precision: str, bound: float) -> None:
    policy = tiny.adapt(tiny.load(tiny_base) if precision == "fp32" else tiny.exact(tiny_base))
    found = drawn()
    again = MAKER.settings(kind)["iterations"] > 1
    for limit in CUTS.values():
        weights = tiny.weights(policy)
        objective = make(kind, found)
        batches = objective.judged(policy, found, limit)
        assert all(batch.tokens <= limit or len(batch.rows) == 1 for batch in batches)
        with torch.no_grad():
            old = [tokenwise(policy, one.example, objective.sample.temperature) for one in found] if again else None
        if again:
            MAKER.move(policy.model)
        loss, slope, _ = gradient(policy, objective, batches)
        expected, wanted = by_definition(policy, kind, found, old)
        assert loss == pytest.approx(expected, rel=bound, abs=bound)
        assert tiny.distance(slope, wanted) < bound
        with torch.no_grad():
            for name, value in policy.trainable().items():
                value.copy_(weights[name])


def test_a_completion_without_advantage_is_counted_and_not_computed(tiny_base: Path) -> None:
    policy, found = tiny.adapt(tiny.load(tiny_base)), drawn()
    alike = {f"r:1 ({number})" for number in range(MAKER.GROUP)}
    seen = {row for batch in make("dapo", found).judged(policy, found, 10_000) for row in batch.rows}
    assert seen == {one.example.where for one in found} - alike
    seen = {row for batch in make("grpo with kl", found).judged(policy, found, 10_000) for row in batch.rows}
    assert alike <= seen
    dull = [replace(one, rewards={"r": 0.3}) for one in found]
    (batch,) = make("dapo", dull).judged(policy, dull, 10_000)
    loss, slope, figures = gradient(policy, make("dapo", dull), [batch])
    assert (loss, float(slope.norm()), len(batch.rows)) == (0.0, 0.0, 1)
    assert figures["frac_reward_zero_std"] == 1.0
    assert batch.count == sum(one.tokens for one in dull)


def test_figures_of_a_step(tiny_base: Path) -> None:
    policy, found = tiny.adapt(tiny.load(tiny_base)), drawn()
    for limit in CUTS.values():
        objective = make("grpo with kl", found)
        figures = gradient(policy, objective, objective.judged(policy, found, limit))[2]
        assert figures["reward"] == pytest.approx(sum(one.reward for one in found) / 12)
        assert figures["rewards/r/mean"] == figures["reward"]
        assert figures["completions/mean_length"] == pytest.approx(sum(one.tokens for one in found) / 12)
        assert figures["completions/clipped_ratio"] == pytest.approx(4 / 12)
        assert figures["frac_reward_zero_std"] == pytest.approx(1 / 3)
        assert figures["kl"] > 0


def test_several_updates_move_further_from_the_same_completions(tiny_base: Path) -> None:
    ends = []
    for updates in (1, 3):
        policy, found = tiny.adapt(tiny.load(tiny_base), seed=1), drawn()
        objective = replace(make("dapo again", found), updates=updates)
        plan = tiny.course([[0]], peak_rate=0.01)
        (event,) = loop.run(policy, objective, [found[0].example], plan, tiny.adamw(policy))
        assert len(objective.sample.seeds) == 1  # type: ignore[attr-defined]
        ends.append((tiny.weights(policy), event.figures["clip_ratio/region_mean"]))
    assert not tiny.same(ends[0][0], ends[1][0])
    assert ends[0][1] == 0
    assert ends[1][1] > 0


def test_a_steps_seed_is_its_own(tiny_base: Path) -> None:
    """Whatever was drawn before: a step that is taken again samples with the same noise."""
    policy, found = tiny.adapt(tiny.load(tiny_base)), drawn()
    seen = []
    for start in (0, 2):
        objective = make("dapo", found)
        torch.manual_seed(start)
        list(loop.run(policy, objective, [found[0].example], tiny.course([[0]] * 4), tiny.Recorder(policy), start))
        seen.append(objective.sample.seeds)  # type: ignore[attr-defined]
    assert len(set(seen[0])) == 4
    assert seen[0][2:] == seen[1]


def rollouts(**changes: Any) -> tuple[Rollouts, list[Example]]:
    asked = [Question(prompt=tuple(range(3, 8 + 3 * n)), answer="x", where=f"r:{n}") for n in range(3)]
    plain: dict[str, Any] = {
        "questions": {one.where: one for one in asked}, "completions": 4, "max_new_tokens": 6, "temperature": 1.0,
        "rewards": (Reward(name="contains", metric="contains", weight=0.5, asked=None),), "batch_rows": 5,
    }  # fmt: skip
    examples = [rows.example(one.prompt, [1], one.where) for one in asked]
    return Rollouts(**(plain | changes)), examples


def test_answers_are_a_function_of_seed_and_numbers(tiny_base: Path) -> None:
    policy = tiny.adapt(tiny.load(tiny_base))
    sample, examples = rollouts()
    first = sample(policy, examples, 7)
    torch.manual_seed(99)
    assert sample(policy, examples, 7) == first
    assert sample(policy, examples, 8) != first
    assert policy.model.training == tiny.adapt(tiny.load(tiny_base)).model.training
    assert len({one.example.ids for one in first[:4]}) > 1  # a group is not one answer again and again
    for number, one in enumerate(first):
        prompt = examples[number // 4].ids[:-1]
        assert one.example.ids[: len(prompt)] == prompt
        assert one.tokens == len(one.example.ids) - len(prompt) <= 6
        assert one.ended == (one.example.ids[-1] in policy.stop_ids())
        assert one.ended or one.tokens == 6
        assert not set(one.example.ids[len(prompt) : -1]) & set(policy.stop_ids())
    other = rollouts(batch_rows=64)[0](policy, examples, 7)  # rounding aside, who is asked together does not matter
    assert sum(one.example.ids == two.example.ids for one, two in zip(first, other, strict=True)) >= 11


def test_what_is_sampled_has_the_models_own_probability(tiny_base: Path) -> None:
    """The log-probabilities that training takes are those that the answers were drawn with: at any temperature the
    mean of a token's log-probability over many draws is minus the entropy."""
    policy = tiny.adapt(tiny.load(tiny_base))
    sample, examples = rollouts(completions=400, max_new_tokens=1, temperature=0.6, batch_rows=400)
    found = sample(policy, examples[:1], 3)
    objective = make("warm", found)
    objective = replace(objective, sample=replace(sample, temperature=0.6))
    batch = objectives.collate([one.example for one in found])
    with torch.no_grad():
        drawn_at = objective.log_probs(policy, batch)
        ids = torch.tensor([examples[0].ids[:-1]])
        full = (policy.causal_lm(ids, use_cache=False).logits[0, -1].double() / 0.6).log_softmax(-1)
    entropy, spread = -(full.exp() * full).sum(), ((full.exp() * full**2).sum() - (full.exp() * full).sum() ** 2).sqrt()
    assert float(drawn_at.mean()) == pytest.approx(-float(entropy), abs=4 * float(spread) / math.sqrt(400))


def test_a_reward_must_tell_completions_apart(tiny_base: Path) -> None:
    import sys

    policy = tiny.adapt(tiny.load(tiny_base))
    asked = ([sys.executable, "-c", "print('{\"f1\": 0.5}')"], 20.0)
    sample, examples = rollouts(rewards=(Reward(name="command", metric="command", weight=1.0, asked=asked),))
    with pytest.raises(RecipeError, match="all completions at once"):
        sample(policy, examples, 1)


def test_rewards_are_weighted_and_named(tiny_base: Path) -> None:
    policy = tiny.adapt(tiny.load(tiny_base))
    chosen = (
        Reward(name="regex", metric="regex", weight=0.25, asked="."),
        Reward(name="regex_2", metric="regex", weight=-2.0, asked="."),
    )
    sample, examples = rollouts(rewards=chosen)
    for one in sample(policy, examples, 1):
        assert one.rewards["regex"] in (0.0, 0.25)
        assert one.reward == -7 * one.rewards["regex"]
