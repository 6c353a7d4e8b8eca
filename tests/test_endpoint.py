"""The endpoint over real sockets: with OpenAI's own client, and with whatever else may come."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from finetune import endpoint, serve
from finetune.answer import Answer, Asking, Speaker
from finetune.conversation import Conversation, Turn
from finetune.model import Policy
from tests import tiny

TOKEN = "a-token-of-the-tests"
QUESTION = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What is 3 and 4?"}]
LENGTH = 24


@dataclass(frozen=True)
class Watched(Speaker):
    """Notes what it answered, and how many answers were made at once; ``delay`` seconds a piece."""

    made: list[Answer] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    delay: list[float] = field(default_factory=lambda: [0.0])

    def answer(self, prompt: Any, asking: Asking, say: Callable[[str], None] = print, **more: Any) -> Answer:
        def slowly(text: str) -> None:
            time.sleep(self.delay[0])
            say(text)

        self.running.append(1)
        assert len(self.running) == 1
        try:
            self.made.append(super().answer(prompt, asking, slowly, **more))
        finally:
            self.running.pop()
        return self.made[-1]


@dataclass(frozen=True)
class Place:
    """A running server."""

    speaker: Watched
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def greedy(self, adapter: bool = True, count: int = LENGTH) -> tuple[str, int]:
        """The text and the number of tokens that ``policy.generate`` gives to the question."""
        policy = self.speaker.policy
        turns = tuple(Turn(**message) for message in QUESTION)
        with policy.evaluating(adapter=adapter):
            (ids,) = policy.generate([policy.renderer.prompt(Conversation(turns))], count)
        return policy.tokenizer.decode(ids, skip_special_tokens=True), len(ids)

    def ask(self, path: str, body: bytes | Any = None, method: str = "", **headers: str) -> tuple[int, Any]:
        """One request by hand → status and body."""
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(line):
            line.request(
                method or ("GET" if sent is None else "POST"), path, sent,
                {"Authorization": f"Bearer {TOKEN}"} | {name.replace("_", "-"): text for name, text in headers.items()},
            )  # fmt: skip
            answer = line.getresponse()
            assert "server" not in {name.lower() for name, _ in answer.getheaders()}
            assert not any(name.lower().startswith("access-control") for name, _ in answer.getheaders())
            return answer.status, json.loads(answer.read())


@pytest.fixture(scope="module")
def place(tiny_base: Path) -> Iterator[Place]:
    speaker = Watched(tiny.adapt(tiny.load(tiny_base)), "tiny", "owner/base")
    line = endpoint.Line(speaker)
    server = serve.Server(endpoint.app(line, Asking(max_new_tokens=LENGTH), TOKEN), line)
    with socket.create_server(("127.0.0.1", 0)) as opened:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        yield Place(speaker, opened.getsockname()[1])
        server.handle_exit(2, None)
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture
def client(place: Place) -> Iterator[Any]:
    openai = pytest.importorskip("openai", reason="the openai client is not installed (extra `dev`)")
    with openai.OpenAI(base_url=place.url, api_key=TOKEN, max_retries=0, timeout=60) as opened:
        yield opened


def test_the_models_are_the_run_and_its_base(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "base"]
    assert client.models.retrieve("base").id == "base"


@pytest.mark.parametrize(("model", "adapter"), [("tiny", True), ("base", False)])
def test_answers_are_the_policys_own(client: Any, place: Place, model: str, adapter: bool) -> None:
    text, count = place.greedy(adapter)
    said = client.chat.completions.create(model=model, messages=QUESTION)
    assert said.choices[0].message.content == text
    assert said.choices[0].finish_reason == "length"
    assert said.usage.completion_tokens == count
    assert said.usage.total_tokens == count + said.usage.prompt_tokens
    with client.chat.completions.create(
        model=model, messages=QUESTION, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage == said.usage
    assert len(chunks) > 5
    assert text != place.greedy(not adapter)[0]


def test_a_conversation_goes_on_with_what_the_client_was_given(client: Any) -> None:
    first = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=5)
    turns = [*QUESTION, first.choices[0].message.model_dump(), {"role": "user", "content": "And now?"}]
    second = client.chat.completions.create(model="tiny", messages=turns, max_completion_tokens=3)
    assert second.usage.completion_tokens == 3
    assert second.usage.prompt_tokens > first.usage.total_tokens


def test_stops_seeds_and_settings(client: Any, place: Place) -> None:
    text, _ = place.greedy()
    middle = text[len(text) // 2 :][:2]
    said = client.chat.completions.create(model="tiny", messages=QUESTION, stop=["nowhere", middle])
    assert said.choices[0].message.content == text[: text.index(middle)]
    assert said.choices[0].finish_reason == "stop"

    def drawn(**settings: Any) -> str:
        made = client.chat.completions.create(model="tiny", messages=QUESTION, temperature=1.5, **settings)
        return str(made.choices[0].message.content)

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn(top_p=0.0) == drawn(extra_body={"top_k": 1}) == text
    assert drawn() != drawn()


def test_plain_completions(client: Any, place: Place) -> None:
    policy = place.speaker.policy
    ids = policy.tokenizer.encode("one two")
    with policy.evaluating():
        (made,) = policy.generate([ids], 7)
    text = policy.tokenizer.decode(made, skip_special_tokens=True)
    for prompt in ("one two", ids, ["one two"]):
        assert client.completions.create(model="tiny", prompt=prompt, max_tokens=7).choices[0].text == text
    stream = client.completions.create(model="tiny", prompt="one two", max_tokens=7, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == text


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": "ü"}}\n</tool_call>'


def test_tools_are_offered_and_calls_are_read(client: Any, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    if not place.speaker.calls_tools:
        monkeypatch.setattr(Speaker, "calls_tools", True)
    template = "{{ tools }}{% for m in messages %}{{ m }}{% endfor %}"
    monkeypatch.setattr(place.speaker.policy.tokenizer, "chat_template", template)

    def call(self: Policy, prompts: Any, count: int, streamer: Any, sampling: Any) -> None:
        import torch

        streamer.put(torch.tensor(prompts))
        for token in self.tokenizer.encode(f"Let me see. {CALL}", add_special_tokens=False):
            streamer.put(torch.tensor([token]))

    monkeypatch.setattr(Policy, "generate", call)
    said = client.chat.completions.create(model="tiny", messages=QUESTION, tools=[TOOL]).choices[0]
    assert (said.finish_reason, said.message.content) == ("tool_calls", "Let me see.")
    (made,) = said.message.tool_calls
    assert (made.function.name, json.loads(made.function.arguments)) == ("add", {"a": 3, "b": "ü"})
    chunks = list(client.chat.completions.create(model="tiny", messages=QUESTION, tools=[TOOL], stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Let me see."
    assert [call.function.name for delta in deltas for call in delta.tool_calls or []] == ["add"]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    answered = [
        *QUESTION,
        said.message.model_dump(),
        {"role": "tool", "tool_call_id": made.id, "content": "7"},
    ]
    assert client.chat.completions.create(model="tiny", messages=answered, tools=[TOOL]).usage.prompt_tokens > 0
    unoffered = client.chat.completions.create(model="tiny", messages=QUESTION, tools=[TOOL], tool_choice="none")
    assert unoffered.choices[0].message.content == f"Let me see. {CALL}"


def test_errors_are_the_clients_own(client: Any, place: Place) -> None:
    import openai

    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x " * 3000}], stream=True)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="frequency_penalty"):
        client.chat.completions.create(model="tiny", messages=QUESTION, frequency_penalty=0.5)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_only_who_knows_the_token_and_the_host_is_heard(place: Place) -> None:
    for path in ("/v1/models", "/v1/chat/completions", "/", "/nowhere"):
        for token in ("Bearer wrong", TOKEN, f"Bearer {TOKEN}x", f"bearer {TOKEN}", "Bearer é", ""):
            status, body = place.ask(path, Authorization=token)
            assert (status, body["error"]["code"]) == (401, "invalid_api_key")
    for host in ("evil.example", f"evil.example:{place.port}", "127.0.0.1.evil.example", "127.0.0.2", ""):
        status, body = place.ask("/v1/models", Host=host)
        assert (status, body["error"]["code"]) == (403, "wrong_host")
    for host in ("localhost", f"localhost:{place.port}", "127.0.0.1:9"):
        assert place.ask("/v1/models", Host=host)[0] == 200
    assert place.ask("/v1/models", method="OPTIONS", Origin="https://evil.example")[0] == 405
    assert place.ask("/nowhere")[0] == 404
    assert place.ask("/v1/models/nowhere")[0] == 404


def test_a_body_that_is_too_large_is_refused_before_all_of_it_came(place: Place) -> None:
    with socket.create_connection(("127.0.0.1", place.port), timeout=30) as line:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
        line.sendall(f"{head}Content-Length: 99999999999\r\n\r\n".encode())
        with contextlib.suppress(OSError):  # it need not read on
            for _ in range(200):
                line.sendall(b" " * 65536)
        assert line.recv(4096).startswith(b"HTTP/1.1 413 ")


def hostile() -> list[bytes]:
    """Bodies that nothing may be answered to."""
    wrong: dict[str, list[Any]] = {
        "model": [None, 1, [], {}, True],
        "messages": [
            None, "hi", {}, [], [1], [None], [[]], [{}], [{"role": "user"}], [{"content": "x"}], "[{}]",
            [{"role": "king", "content": "x"}], [{"role": "user", "content": 5}], [{"role": "user", "content": None}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}],
            [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": "\ud800"}],
            [{"role": "user", "content": "x", "tool_calls": [{}]}], [{"role": ["user"], "content": "x"}],
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            [{"role": "assistant", "content": "x", "weight": -5}], [{"role": "user", "content": "y " * 5000}],
            [{"role": "user", "contents": "x"}], [{"role": "user", "content": {"a": "b"}}],
        ],
        "temperature": [-1, 2.1, "1", [], True, 1e400, 10**400],
        "top_p": [-0.1, 1.1, "x", {}, False],
        "top_k": [-1, 1.5, "x", 10**30 * -1, True],
        "seed": [2**63, -(2**63) - 1, 1.5, "x", 10**40, []],
        "max_tokens": [0, -1, 1.5, "many", [], True],
        "max_completion_tokens": [0, -1, "x", {}],
        "stop": [1, [1], [""], "", {}, ["x"] * 17, [None], True],
        "stream": ["yes", 1, [], {}],
        "stream_options": [1, [], {"x": 1}, {"include_usage": "yes"}],
        "n": [0, 2, "1", 1.5, []],
        "frequency_penalty": [0.1, -2, "x"], "presence_penalty": [1, "x", []],
        "logit_bias": [{"1": 5}, [], 1], "logprobs": [True, 1, "x"], "top_logprobs": [1, -1, "x"],
        "tools": [1, "x", {}, [1], [{}], [{"function": {}}], [{"function": {"name": 5}}], [{"function": {"name": ""}}]],
        "tool_choice": ["required", {}, 1, {"type": "function", "function": {"name": "f"}}],
        "parallel_tool_calls": [False, 0, "x"], "response_format": [{"type": "json_object"}, {}, 1, "text"],
        "reasoning_effort": ["high"], "audio": [{}], "modalities": [["text"]], "__class__": [1], "": [1],
        "\x1b[2J": [1],
    }  # fmt: skip
    good = {"model": "tiny", "messages": QUESTION, "max_tokens": 2}
    bodies = [json.dumps(good | {key: value}).encode() for key, values in wrong.items() for value in values]
    deep = b"[" * 100_000
    bodies += [
        b"", b" ", b"null", b"[]", b'"x"', b"1", b"{", b"{}", b"\x00", b"\xff\xfe", b'{"model": NaN}', deep,
        b'{"a":' + deep,
        b'{"model":"tiny","messages":' + b"[" * 900 + b"]" * 900 + b"}", b"1" * 5000, b'{"model":"tiny"}',
        b"model=tiny&messages=x", "\ufeff{}".encode("utf-16"), b'{"model": "\xed\xa0\x80"}', b"<xml/>",
    ]  # fmt: skip
    dice = random.Random(5)
    whole = json.dumps(good).encode()
    for _ in range(80):  # cut off, so that never a whole object is left
        bodies.append(bytes(dice.choice(whole) for _ in range(dice.randrange(40))) + whole[: dice.randrange(5, 90)])
    return bodies


def test_no_hostile_body_gets_anything_but_a_refusal(
    place: Place, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    bodies = hostile()
    assert len(bodies) > 200
    for body in bodies:
        status, said = place.ask("/v1/chat/completions", body)
        assert status == 400, (body[:200], said)
        assert set(said["error"]) == {"message", "type", "param", "code"}
        assert said["error"]["message"].isprintable()
    assert place.ask("/v1/chat/completions", {"model": "\ud800", "messages": QUESTION})[0] == 404
    for prompt in (None, 1, [], [1, "x"], ["a", "b"], [[1]], "", [-1], [10**12], "\ud800", "x " * 3000):
        assert place.ask("/v1/completions", {"model": "tiny", "prompt": prompt})[0] == 400
    assert place.ask("/v1/chat/completions", {"model": "tiny", "messages": QUESTION})[0] == 200
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert [record for record in caplog.records if not record.name.startswith("transformers.")] == []


def test_a_defect_is_answered_too(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of\x1b[2J memory")

    with monkeypatch.context() as patch:
        patch.setattr(Policy, "generate", fail)
        status, body = place.ask("/v1/chat/completions", {"model": "tiny", "messages": QUESTION})
        assert (status, body["error"]["type"]) == (500, "server_error")
        assert "RuntimeError: out of [2J memory" in body["error"]["message"]
        streamed = events(place, {"model": "tiny", "messages": QUESTION, "stream": True})
    assert "RuntimeError" in streamed[-2]["error"]["message"]
    assert place.ask("/v1/chat/completions", {"model": "tiny", "messages": QUESTION})[0] == 200


def events(place: Place, body: Any) -> list[Any]:
    line = http.client.HTTPConnection("127.0.0.1", place.port, timeout=60)
    with contextlib.closing(line):
        line.request("POST", "/v1/chat/completions", json.dumps(body), {"Authorization": f"Bearer {TOKEN}"})
        text = line.getresponse().read().decode()
    return [event if event == "[DONE]" else json.loads(event) for event in text.split("data: ")[1:-1]] + ["[DONE]"]


def test_many_at_once_are_answered_one_after_the_other(place: Place) -> None:
    expected = {True: place.greedy(True)[0], False: place.greedy(False)[0]}
    wrong: list[Any] = []

    def ask(adapter: bool) -> None:
        body = {"model": "tiny" if adapter else "base", "messages": QUESTION}
        said = place.ask("/v1/chat/completions", body)[1]
        if said["choices"][0]["message"]["content"] != expected[adapter]:
            wrong.append(said)

    threads = [threading.Thread(target=ask, args=(index % 2 == 0,)) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_ends_the_answer(place: Place, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one who was still in line: nothing is made for it."""
    monkeypatch.setattr(Policy, "stop_ids", lambda _: [10**6])  # no answer ends by itself
    place.speaker.delay[0] = 0.05
    place.speaker.made.clear()
    body = json.dumps({"model": "tiny", "messages": QUESTION, "max_tokens": 800, "temperature": 1, "stream": stream})
    lines = [http.client.HTTPConnection("127.0.0.1", place.port, timeout=60) for _ in range(3)]
    try:
        for line in lines:
            line.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {TOKEN}"})
            time.sleep(0.5)
        for line in lines:
            if line.sock is not None:
                line.sock.close()
            line.close()
        began = time.monotonic()
        status, _ = place.ask("/v1/chat/completions", {"model": "tiny", "messages": QUESTION, "max_tokens": 1})
        assert status == 200
        assert time.monotonic() - began < 10  # a whole one would take 40 seconds
    finally:
        place.speaker.delay[0] = 0.0
    first, *others, last = place.speaker.made
    assert first.ended == "cut"
    assert len(first.ids) < 200
    assert others == []
    assert last.ended == "length"


def test_a_long_line_tells_others_to_come_later(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_WAITING", -1)
    status, body = place.ask("/v1/chat/completions", {"model": "tiny", "messages": QUESTION})
    assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
