"""OpenAI's shapes without a model; tests/test_endpoint.py has them over sockets, with OpenAI's client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune.answer import Answer, Asking
from finetune.openai_api import ChatRequest, CompletionRequest, Refusal, Reply, parted, read
from finetune.sampling import Sampling

MESSAGES = [{"role": "user", "content": "hi"}]


def asked(**fields: Any) -> ChatRequest:
    request: ChatRequest = read(json.dumps({"model": "m", "messages": MESSAGES} | fields).encode(), ChatRequest)
    return request


def test_what_a_request_leaves_open_is_the_servers() -> None:
    usual = Asking(sampling=Sampling(temperature=0.5, top_k=9, seed=1), max_new_tokens=77)
    assert asked().asking(usual) == usual
    said = asked(temperature=0, top_p=0.9, max_tokens=5, stop="x").asking(usual)
    assert said.sampling == Sampling(temperature=0, top_p=0.9, top_k=9, seed=1)
    assert (said.max_new_tokens, said.stop) == (5, ("x",))
    assert asked(max_tokens=5, max_completion_tokens=6).asking(usual).max_new_tokens == 6


def test_what_asks_for_nothing_is_let_through() -> None:
    neutral = {
        "n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "logprobs": False, "user": "me",
        "response_format": {"type": "text"}, "tool_choice": "auto", "parallel_tool_calls": True, "store": False,
        "metadata": {"a": "b"}, "stream": None, "stop": None, "seed": None, "temperature": None, "tools": None,
    }  # fmt: skip
    assert asked(**neutral).asking(Asking()) == Asking()


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"presence_penalty": 1}, "presence_penalty", "presence_penalty: "),
        ({"logprob": True}, "logprob", "logprob: is not served here"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "is not served here"),
        ({"messages": [{"role": "user", "contents": "x"}]}, "messages[0].content", "rename 'contents' to 'content'"),
        ({"tools": [{"function": {}}]}, "tools[0]", "no name"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(fields: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(Refusal) as refused:
        asked(**fields).conversation()
    assert refused.value.status == 400
    assert refused.value.body["error"]["param"] == param
    assert message in refused.value.body["error"]["message"]


def test_a_completions_prompt() -> None:
    def prompt(value: Any) -> Any:
        return read(json.dumps({"model": "m", "prompt": value}).encode(), CompletionRequest).asked()

    assert prompt("a") == prompt(["a"]) == "a"
    assert prompt([1, 2]) == (1, 2)
    for wrong in (["a", "b"], [], [[1]]):
        with pytest.raises(Refusal):
            prompt(wrong)


ONE = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "left", "names"),
    [
        ("no call", "no call", []),
        (f"so: {ONE}\n{ONE}", "so:", ["f", "f"]),
        ('<tool_call>{"name": "g"}</tool_call>', "", ["g"]),
        (f'{ONE}<tool_call>{{"name": 1}}</tool_call>', None, []),
        ("<tool_call>{nonsense}</tool_call>", None, []),
        ("<tool_call>[]</tool_call>", None, []),
        ('<tool_call>{"name": "f", "arguments": "x"}</tool_call>', None, []),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', None, []),
        ("<tool_call>" + "[" * 5000 + "</tool_call>", None, []),
        (ONE[:-3], None, []),
    ],
)
def test_calls_are_read_or_stay_text(text: str, left: str | None, names: list[str]) -> None:
    found, calls = parted(text)
    assert found == (text if left is None else left)
    assert [call["function"]["name"] for call in calls] == names
    assert len({call["id"] for call in calls}) == len(calls)


def test_calls_are_looked_for_only_where_tools_were_offered() -> None:
    said = Answer(ONE, (1,), "stop")
    assert Reply("m", True, tools=True).whole(said, 3)["choices"][0]["finish_reason"] == "tool_calls"
    plain = Reply("m", True).whole(said, 3)["choices"][0]
    assert (plain["finish_reason"], plain["message"]["content"]) == ("stop", ONE)
