"""What a model answers when it is asked many times, and what each answer earns: the work of ``grpo`` before a step.

The noise of an answer is a function of the step's seed, the prompt's place in the step and the answer's number. What
an answer earns is the word of the metrics that judge held-out rows as well.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune import cage, dataset, evals, gather, generation, heldout
from finetune.dataset import Example, Question
from finetune.errors import RecipeError
from finetune.objectives.grpo import Completion
from finetune.sampling import Sampling

if TYPE_CHECKING:
    from finetune.model import Policy
    from finetune.recipe import Located, Recipe
    from finetune.recipe.sections import Objective
    from finetune.renderer import Renderer


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A metric as a reward. ``name``: its own, and a number where it comes again. ``asked``: what the metric needs."""

    name: str
    metric: str
    weight: float
    asked: Any

    def earned(self, questions: Sequence[Question], given: Sequence[str]) -> list[float]:
        """Raises RecipeError where the metric speaks of all answers together."""
        verdicts, _ = evals.get(self.metric).judge(questions, given, self.asked)
        if len(verdicts) != len(given):
            what = "this command spoke of all completions at once: a reward is one number for each"
            raise RecipeError(what, f"objective.rewards: {self.name}", "print one number a line")
        return [self.weight * verdict for verdict in verdicts]


def rewards(listed: Sequence[Any]) -> tuple[Reward, ...]:
    """The recipe's ``objective.rewards``, each under a name of its own."""
    metrics = [one.metric for one in listed]
    return tuple(
        Reward(
            name=one.metric if (before := metrics[:at].count(one.metric)) == 0 else f"{one.metric}_{before + 1}",
            metric=one.metric, weight=one.weight, asked=one.asked(),
        )
        for at, one in enumerate(listed)
    )  # fmt: skip


def questions(located: Located, renderer: Renderer, left_out: Collection[str] = ()) -> dict[str, Question]:
    """The training rows as they are asked, by their places; none where nothing is sampled. ``left_out``: those of rows
    that are not trained.

    Raises:
        DataError: a row that asks nothing.
        RecipeError: a prompt leaves no room for an answer within ``train.max_length``.
    """
    chosen, recipe = located.recipe.objective, located.recipe
    if chosen.rows != "prompts" or chosen.max_new_tokens is None:
        return {}
    sources = gather.training_sources(recipe)
    rows = [row for source in sources for row in dataset.read_rows(gather.reader(recipe, source, renderer))]
    found = [heldout.question(row, renderer) for row in rows if row.where not in left_out]
    longest = max(found, key=lambda one: len(one.prompt))
    if len(longest.prompt) + chosen.max_new_tokens > recipe.train.max_length:
        what = (
            f"the prompt of {longest.where} has {len(longest.prompt)} tokens: no room for so many in train.max_length"
        )
        raise RecipeError(what, located.where("objective.max_new_tokens"), "lower it, or raise train.max_length")
    return {one.where: one for one in found}


def notes(recipe: Recipe, asked: Mapping[str, Question]) -> list[str]:
    """What a plan says of what earns a reward, and of a cage that holds less here than elsewhere.

    The rows' own answers are judged as well: a reward that they never earn may be what is wanted, as of a form that
    they do not have, or a command that does not work. A command that runs free is not asked: it may cost something.
    """
    chosen = recipe.objective
    listed = rewards(chosen.rewards or ())
    said = []
    if listed:
        answers = f"{chosen.completions} answers to each prompt, {chosen.batch_rows} at once"
        terms = " + ".join(f"{one.weight:g} × {one.name}" for one in listed)
        said.append(f"rewards: {terms}; {answers}; the time that judging takes is not counted")
    for one in listed:
        first = list(asked.values())[: 4 if one.metric == "unit_test" else 256]
        if first and one.metric != "command":
            earned = evals.get(one.metric).judge(first, [question.answer for question in first], one.asked)[0]
            mean = f"{sum(earned) / len(first):.2f}"
            said.append(f"{one.name} gives the rows' own answers {mean} (the first {len(first)})")
    tested = "unit_test" in recipe.evaluate.metrics or any(one.metric == "unit_test" for one in listed)
    return said + ([f"unit_test: {remark}" for remark in cage.remarks()] if tested else [])


def settings(chosen: Objective, asked: Mapping[str, Question]) -> dict[str, Any]:
    """What ``objectives.get`` takes for an objective that samples."""
    plain = chosen.settings()
    how = {key: plain.pop(key) for key in ("completions", "max_new_tokens", "temperature", "batch_rows")}
    plain.pop("rewards")
    return plain | {"sample": Rollouts(questions=asked, rewards=rewards(chosen.rewards or ()), **how)}


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Answers and judges. ``questions``: rows as they are asked, by their places; ``batch_rows``: answers at once."""

    questions: Mapping[str, Question]
    rewards: Sequence[Reward]
    completions: int
    max_new_tokens: int
    temperature: float
    batch_rows: int

    def __call__(self, policy: Policy, examples: Sequence[Example], seed: int) -> list[Completion]:
        """``completions`` to each example's prompt, those of one prompt side by side.

        Raises:
            EnvironmentFault: a command that judges fails.
            RecipeError: one that judges does not tell the answers apart.
        """
        asked = [self.questions[example.where] for example in examples for _ in range(self.completions)]
        ids = self._answers(policy, asked, Sampling(temperature=self.temperature, seed=seed))
        stops = set(policy.stop_ids())
        ended = [answer[-1] in stops for answer in ids]
        texts = [
            generation.text(policy, answer[:-1] if done else answer) for answer, done in zip(ids, ended, strict=True)
        ]
        earned = {reward.name: reward.earned(asked, texts) for reward in self.rewards}
        return [
            Completion(
                example=self._example(question, answer, at % self.completions + 1), ended=ended[at],
                rewards={name: values[at] for name, values in earned.items()},
            )
            for at, (question, answer) in enumerate(zip(asked, ids, strict=True))
        ]  # fmt: skip

    def _answers(self, policy: Policy, asked: Sequence[Question], sampling: Sampling) -> list[list[int]]:
        """Ids with the stop token, where there is one, in the order of the questions."""
        found: list[list[int]] = [[]] * len(asked)
        with policy.evaluating():
            for chosen in generation.batches([len(question.prompt) for question in asked], self.batch_rows):
                prompts = [asked[i].prompt for i in chosen]
                answers = policy.generate(
                    prompts, self.max_new_tokens, sampling=sampling, numbers=chosen, with_stop=True
                )
                for index, ids in zip(chosen, answers, strict=True):
                    found[index] = ids
        return found

    @staticmethod
    def _example(question: Question, answer: Sequence[int], number: int) -> Example:
        prompt = question.prompt
        return Example(
            ids=(*prompt, *answer), weights=(0.0,) * len(prompt) + (1.0,) * len(answer),
            where=f"{question.where} (completion {number})",
        )  # fmt: skip
