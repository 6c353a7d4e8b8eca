"""Masks by construction, for each family's template: what is supervised is what the assistant says, and its end.

The reference is the template alone: an answer is what rendering adds to its own generation prompt, up to the stop.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune import tiktoken_file
from finetune.conversation import THINKING, Conversation, Turn
from finetune.dataset import Example, Row
from finetune.errors import DataError
from finetune.renderer import Renderer
from finetune.tokenizer import load_tokenizer
from finetune.window import Window, fit
from tests.conversations import ANSWERS, TEXTS, conversations

TEMPLATES = Path(__file__).resolve().parent / "templates"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
ADDED = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
proven = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), print_blob=True
)


@dataclass(frozen=True)
class Family:
    """A template with its stop token, and what it can render."""

    name: str
    stop: str = "<|im_end|>"
    tools: bool = False
    thinking: bool = False
    piecewise: bool = False


FAMILIES = (
    Family("smollm2"), Family("llama3", stop="<|eot_id|>"), Family("qwen1", piecewise=True),
    Family("qwen2.5", tools=True), Family("qwen3", tools=True, thinking=True),
)  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def tokenizer(family: Family, tiny_base: Path) -> Any:
    return of(family, tiny_base)


def of(family: Family, folder: Path) -> Any:
    found = load_tokenizer(folder)
    found.add_tokens(SPECIAL, special_tokens=True)
    found.add_tokens(ADDED)
    file = TEMPLATES / f"{family.name}.jinja"
    found.chat_template = file.read_text() if file.is_file() else tiktoken_file.CHAT_TEMPLATE
    return found


def renderer(tokenizer: Any, family: Family, **how: Any) -> Renderer:
    return Renderer(tokenizer, family.stop, piecewise=family.piecewise, **how)


def row(conversation: Conversation) -> Row:
    return Row(conversation=conversation, where="rows.jsonl:1")


def supervised(example: Example) -> list[int]:
    return [token for token, weight in zip(example.ids, example.weights, strict=True) if weight]


def text(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def read(words: str, tokenizer: Any) -> str:
    """Text as the tokenizer reads it: this one, as Qwen's, composes characters first."""
    return str(tokenizer.backend_tokenizer.normalizer.normalize_str(words))


def rendered(tokenizer: Any, conversation: Conversation, end: int, *, prompt: bool) -> str:
    """By the template alone."""
    messages = []
    for turn in conversation.turns[:end]:
        message: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.thinking:
            message["reasoning_content"] = turn.thinking
        if turn.calls:
            message["tool_calls"] = [{"function": {"name": one.name, "arguments": one.arguments}} for one in turn.calls]
        messages.append(message)
    tools = list(conversation.tools) or None
    return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt))


def answers(tokenizer: Any, family: Family, conversation: Conversation) -> dict[int, str]:
    """Turn → its answer with the stop token, for those that are trained."""
    found = {}
    for index, turn in enumerate(conversation.turns):
        if turn.role == "assistant" and turn.weight:
            prompt = rendered(tokenizer, conversation, index, prompt=True)
            full = rendered(tokenizer, conversation, index + 1, prompt=False)
            assert full.startswith(prompt)
            found[index] = full[len(prompt) :].partition(family.stop)[0] + family.stop
    return found


def of_family(family: Family) -> st.SearchStrategy[Conversation]:
    return conversations(tools=family.tools, thinking=family.thinking)


def runs(example: Example) -> list[tuple[int, int]]:
    """(start, end) of each stretch of supervised tokens."""
    bounds = [0.0, *map(bool, example.weights), 0.0]
    edges = [index for index in range(len(bounds) - 1) if bounds[index] != bounds[index + 1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_supervised_text_is_the_answers_and_their_ends(tokenizer: Any, family: Family) -> None:
    """Byte for byte; a token that is too many, too few, or cut elsewhere is seen. S4: each answer ends supervised."""

    @proven
    @given(of_family(family))
    def holds(conversation: Conversation) -> None:
        examples = renderer(tokenizer, family).examples(row(conversation))
        wanted = answers(tokenizer, family, conversation)
        found = "".join(text(tokenizer, supervised(example)) for example in examples)
        assert found.encode() == read("".join(wanted.values()), tokenizer).encode()
        stop = tokenizer.convert_tokens_to_ids(family.stop)
        assert sum(supervised(example).count(stop) for example in examples) == len(wanted)
        for example in examples:
            assert all(example.ids[end - 1] == stop for _, end in runs(example))

    holds()


def test_an_answer_follows_the_ids_of_its_generation_prompt(tokenizer: Any, family: Family) -> None:
    """S3: what was trained before each answer is what the exported tokenizer asks with."""

    @proven
    @given(of_family(family))
    def holds(conversation: Conversation) -> None:
        made = renderer(tokenizer, family)
        prompts = [list(one.ids[:start]) for one in made.examples(row(conversation)) for start, _ in runs(one)]
        wanted = []
        for index in answers(tokenizer, family, conversation):
            asked = conversation.upto(index)
            if family.piecewise:  # tests/test_renderer.py holds these to the original's definition
                wanted.append(list(made.prompt(asked)))
            else:
                whole = rendered(tokenizer, conversation, index, prompt=True)
                wanted.append(tokenizer.encode(whole, add_special_tokens=False))
        assert prompts == wanted

    holds()


def test_other_peoples_words_change_nothing_that_is_trained(tokenizer: Any, family: Family) -> None:
    """S1."""

    @proven
    @given(of_family(family), st.data())
    def holds(conversation: Conversation, data: st.DataObject) -> None:
        others = tuple(
            turn if turn.role == "assistant" else Turn(turn.role, data.draw(TEXTS)) for turn in conversation.turns
        )
        made = renderer(tokenizer, family)
        one, two = (
            [token for example in made.examples(row(each)) for token in supervised(example)]
            for each in (conversation, replace(conversation, turns=others))
        )
        assert one == two

    holds()


@pytest.mark.parametrize("train_on", ["last", "all"])
def test_what_the_recipe_says_is_what_is_trained(tokenizer: Any, family: Family, train_on: str) -> None:
    @proven
    @given(of_family(family))
    def holds(conversation: Conversation) -> None:
        examples = renderer(tokenizer, family, train_on=train_on).examples(row(conversation))
        if train_on == "all":
            if all(turn.weight for turn in conversation.turns):
                assert all(one.weights == (0.0, *(1.0,) * (len(one.ids) - 1)) for one in examples)
            assert all(one.weights[0] == 0 for one in examples)
            return
        (example,) = examples
        wanted = answers(tokenizer, family, conversation)
        assert text(tokenizer, supervised(example)) == read(wanted[max(wanted)], tokenizer)

    holds()


@pytest.mark.parametrize("policy", ["drop", "truncate_turns", "split"])
def test_no_answer_is_lost_without_a_name(tokenizer: Any, family: Family, policy: str) -> None:
    """S5: answers kept and answers of the turns and rows that are named are all answers, and none is cut."""

    @proven
    @given(st.lists(of_family(family), min_size=1, max_size=3), st.integers(20, 200))
    def holds(several: list[Conversation], longest: int) -> None:
        made = renderer(tokenizer, family)
        rows = [Row(conversation=one, where=f"rows.jsonl:{n}") for n, one in enumerate(several, 1)]
        try:
            fitted = fit(rows, Window(renderer=made, max_length=longest, policy=policy))
        except DataError as error:
            assert "no row fits" in str(error)  # noqa: PT017 - any other fault fails
            return
        stop = tokenizer.convert_tokens_to_ids(family.stop)
        named = {one.where for one in fitted.named if one.done != "tokenised in pieces"}
        for one in rows:
            kept = [sample for sample in fitted.examples if sample.where.partition("#")[0] == one.where]
            assert all(len(sample.ids) <= longest and sample.ids[-1] == stop and sample.weights[-1] for sample in kept)
            whole = made.examples(one)
            found = [supervised(sample) for sample in kept]
            if one.where not in named:
                assert found == [supervised(sample) for sample in whole]
            said = "".join(text(tokenizer, ids) for ids in found)
            every = list(answers(tokenizer, family, one.conversation).values())
            for answer in every:  # in order, each whole or not at all
                said = said.removeprefix(read(answer, tokenizer))
            assert not said or policy == "truncate_turns" or family.name == "qwen3"

    holds()


def test_a_weight_is_its_tokens_weight(tokenizer: Any, family: Family) -> None:
    @proven
    @given(ANSWERS, ANSWERS, st.sampled_from([0.25, 0.5, 2.0]))
    def holds(one: str, two: str, weight: float) -> None:
        turns = (Turn("user", "a"), Turn("assistant", one, weight), Turn("user", "b"), Turn("assistant", two))
        weights = {
            value for made in renderer(tokenizer, family).examples(row(Conversation(turns))) for value in made.weights
        }
        assert weights == {0.0, 1.0, weight}

    holds()


THINKER = next(family for family in FAMILIES if family.thinking)


@pytest.mark.parametrize("thinking", ["strip", "mask"])
def test_thinking_is_stripped_or_read_only(thinking: str, tiny_base: Path) -> None:
    """Either way the answers proper are trained, each with its end, and no token of the thinking is."""
    tokenizer = of(THINKER, tiny_base)

    @proven
    @given(conversations(thinking=True))
    def holds(conversation: Conversation) -> None:
        examples = renderer(tokenizer, THINKER, thinking=thinking).examples(row(conversation))
        wanted = [
            read(THINKING.sub("", answer, count=1), tokenizer)
            for answer in answers(tokenizer, THINKER, conversation).values()
        ]
        found = [text(tokenizer, supervised(example)) for example in examples]
        if thinking == "strip":  # the row itself loses it, so the white space around it goes as well
            assert re.sub(r"\s", "", "".join(found)) == re.sub(r"\s", "", "".join(wanted))
        else:
            assert "".join(found) == "".join(wanted)
        everything = "".join(text(tokenizer, list(example.ids)) for example in examples)
        assert "<think>\n\n</think>\n\n" in everything or thinking == "mask"
        for turn in conversation.turns:
            if thinking == "strip" and turn.thinking.strip() and turn.thinking.isascii():
                assert f"<think>\n{turn.thinking.strip(chr(10))}\n</think>" not in everything

    holds()
