from __future__ import annotations

from pathlib import Path

import pytest

from finetune.dataset import Question
from finetune.evals import exact_match
from tests import tiny

# Newcombe (Statistics in Medicine 17, 1998), table I, method 3: the score interval without continuity correction.
PUBLISHED = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
# By the formula in decimal arithmetic, to six digits.
FIGURED = [
    (0, 200, 0.0, 0.018845),
    (185, 200, 0.879956, 0.954025),
    (200, 200, 0.981155, 1.0),
    (1, 1, 0.206549, 1.0),
]


@pytest.mark.parametrize(("right", "rows", "low", "high"), PUBLISHED)
def test_interval_is_the_published_one(right: int, rows: int, low: float, high: float) -> None:
    assert exact_match.wilson(right, rows) == pytest.approx((low, high), abs=5.1e-5)


@pytest.mark.parametrize(("right", "rows", "low", "high"), FIGURED)
def test_interval_at_the_edges(right: int, rows: int, low: float, high: float) -> None:
    found = exact_match.wilson(right, rows)
    assert found == pytest.approx((low, high), abs=5.1e-7)
    assert 0.0 <= found[0] <= found[1] <= 1.0


def questions(answers: list[str]) -> list[Question]:
    return [Question(prompt=(1,), answer=text, where=f"rows.jsonl:{i}") for i, text in enumerate(answers, 1)]


def test_an_answer_counts_when_every_character_is_right() -> None:
    asked = questions(["1999-12-31", " 5", "Ja", "a b", "", "7"])
    scores = exact_match.score(asked, ["1999-12-31\n", "5 ", "ja", "a  b", "x", "<think>\n3 + 4\n</think>\n\n7"])
    assert scores["exact_match"] == 0.5
    assert scores["rows"] == 6
    assert scores["confidence_interval"] == list(exact_match.wilson(3, 6))


def test_answers_and_questions_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        exact_match.score(questions(["a", "b"]), ["a"])


@pytest.mark.parametrize("form", ["fp32", "nf4"])
@pytest.mark.parametrize("batch_rows", [3, 32])
def test_batches_answer_like_one_by_one(tiny_base: Path, form: str, batch_rows: int) -> None:
    policy = tiny.adapt(tiny.load(tiny_base, form))
    asked = [
        Question(prompt=example.ids, answer="", where=example.where)
        for example in tiny.samples([3, 40, 7, 22, 2, 31, 15, 9])
    ]
    steps: list[int] = []
    with policy.evaluating():
        together = exact_match.answers(policy, asked, 12, batch_rows, steps.append)
        alone = [exact_match.answers(policy, [question], 12, 1, lambda _: None)[0] for question in asked]
    assert together == alone
    assert len(set(together)) > 4  # they are answers to these questions, in their order
    assert sum(steps) == 8
    assert max(steps) <= batch_rows


def test_generation_is_the_greedy_choice_token_by_token(tiny_base: Path) -> None:
    import torch

    """Whatever the base's generation_config.json asks for: Qwen2.5's penalises tokens of the prompt."""
    policy = tiny.adapt(tiny.load(tiny_base))
    policy.causal_lm.generation_config.update(repetition_penalty=3.0, no_repeat_ngram_size=1)
    prompts = [example.ids for example in tiny.samples([4, 11, 6])]
    with policy.evaluating():
        produced = policy.generate(prompts, 8)
        for prompt, ids in zip(prompts, produced, strict=True):
            text = list(prompt)
            for _ in range(8):
                chosen = int(policy.causal_lm(torch.tensor([text])).logits[0, -1].argmax())
                if chosen in policy.stop_ids():
                    break
                text.append(chosen)
            assert ids == text[len(prompt) :]


def test_an_answer_ends_before_the_stop_token(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny.load(tiny_base)
    with policy.evaluating():
        (free,) = policy.generate([(1, 2, 3)], 10)
        stop = policy.tokenizer.decode([free[4]])
        monkeypatch.setattr(type(policy), "stop_ids", lambda _: [free[4]])
        (ended,) = policy.generate([(1, 2, 3)], 10)
    assert stop
    assert ended == free[: free.index(free[4])]
