"""Many prompts answered in batches: as one by one, greedily, or drawn by a seed."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import generation
from finetune.dataset import Question
from tests import tiny


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
        together = generation.greedy(policy, asked, 12, batch_rows, steps.append)
        alone = [generation.greedy(policy, [question], 12, 1, lambda _: None)[0] for question in asked]
    assert together == alone
    assert len(set(together)) > 4  # they are answers to these questions, in their order
    assert sum(steps) == 8
    assert max(steps) <= batch_rows


def test_generation_is_the_greedy_choice_token_by_token(tiny_base: Path) -> None:
    """Whatever the base's generation_config.json asks for: Qwen2.5's penalises tokens of the prompt."""
    import torch

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
