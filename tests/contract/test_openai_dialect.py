"""The HTTP contract, line by line: vLLM's dialect of OpenAI's API, over real HTTP, in front of a fake decode worker."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio

from gateway import app
from gateway.dialect import UNSUPPORTED
from gateway.fake_decode_worker import FakeDecodeWorker, Fault, Script, scripted
from gateway.fake_model import EOS_ID, write_fake_model
from kvtransfer.protocol import baton_pb2 as pb
from tests.gateway_harness import MODEL_ID, PATIENCE_S, Harness, events, running, streamed_text

STATS = pb.AttemptStats(
    num_cached_tokens=4, prefill_path="remote", path_reason="long_prompt", queue_s=0.5, prefill_s=0.25,
    transfer_s=0.125,
    transport="grpc", transfer_bytes=1000, prefill_worker_id="prefill-0",
)  # fmt: skip
MESSAGES = [{"role": "user", "content": "hello"}]


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Harness]:
    """One gateway for all tests that leave no trace: starting one takes 0.2 s."""
    async with running(tmp_path_factory.mktemp("gateway"), FakeDecodeWorker(script=Script(stats=STATS))) as harness:
        yield harness


@pytest.fixture
def harness(shared: Harness) -> Harness:
    shared.worker.requests.clear()
    return shared


def saying(text: str, eos: bool = True) -> FakeDecodeWorker:
    """A worker that says exactly this (ids as in fake_model)."""
    from gateway.detokenize import _byte_alphabet  # pyright: ignore[reportPrivateUsage]

    alphabet = _byte_alphabet()
    order = sorted(alphabet)
    char_of = {byte: char for char, byte in alphabet.items()}
    ids = [3 + order.index(char_of[byte]) for byte in text.encode()] + ([EOS_ID] if eos else [])
    return FakeDecodeWorker(next_token=scripted(ids), eos_token_ids=[EOS_ID])


# ---------------------------------------------------------------- whole answers


async def test_a_chat_completion_has_openais_shape(harness: Harness) -> None:
    response = await harness.chat()
    body = response.json()
    assert response.status_code == 200
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    assert isinstance(body["created"], int)
    assert body["model"] == MODEL_ID
    assert body["system_fingerprint"].startswith("fp_")
    (choice,) = body["choices"]
    assert choice["index"] == 0
    assert choice["message"]["role"] == "assistant"
    assert len(choice["message"]["content"]) == 8
    assert (choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == ("length", None, None)


async def test_a_completion_has_openais_shape(harness: Harness) -> None:
    body = (await harness.complete()).json()
    assert body["id"].startswith("cmpl-")
    assert body["object"] == "text_completion"
    assert len(body["choices"][0]["text"]) == 16  # completions' own default of max_tokens
    assert body["choices"][0]["finish_reason"] == "length"


async def test_usage_counts_prompt_output_and_cached_tokens(harness: Harness) -> None:
    usage = (await harness.complete(max_tokens=3)).json()["usage"]
    assert usage == {
        "prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, "prompt_tokens_details": {"cached_tokens": 4},
    }  # fmt: skip


async def test_cached_tokens_are_never_more_than_the_prompt_has(tmp_path: Path) -> None:
    """A worker that goes on with a log finds blocks of prompt and log."""
    stats = pb.AttemptStats(num_cached_tokens=48, prefill_path="local", path_reason="fake")
    async with running(tmp_path, FakeDecodeWorker(script=Script(stats=stats))) as harness:
        body = (await harness.complete(max_tokens=3, metrics=True)).json()
        assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}
        assert body["metrics"]["cached_tokens"] == 5
        assert await harness.metric("vllm:prompt_tokens_cached_total") == 5


async def test_chat_fills_the_context_when_no_limit_is_given(tmp_path: Path) -> None:
    async with running(tmp_path, FakeDecodeWorker(), model=write_fake_model(tmp_path / "m", 64)) as harness:
        body = (await harness.chat(max_tokens=None)).json()
        assert body["usage"]["total_tokens"] == 64


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_both_names_of_the_chat_limit_work(harness: Harness, field: str) -> None:
    body = (await harness.chat(**({"max_tokens": None} | {field: 3}))).json()
    assert body["usage"]["completion_tokens"] == 3


async def test_token_id_prompts_are_sent_as_they_are(harness: Harness) -> None:
    response = await harness.complete(prompt=[10, 20, 30])
    assert response.status_code == 200
    assert list(harness.worker.requests[0].prompt_token_ids) == [10, 20, 30]


@pytest.mark.parametrize("prompts", [["one", "two"], [[10, 11], [12]]])
async def test_a_list_of_prompts_gives_numbered_choices(harness: Harness, prompts: Any) -> None:
    body = (await harness.complete(prompt=prompts, n=2, max_tokens=2)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["completion_tokens"] == 8
    assert len(harness.worker.requests) == 2


async def test_eight_choices_differ_and_are_complete(harness: Harness) -> None:
    body = (await harness.chat(n=8)).json()
    assert [choice["index"] for choice in body["choices"]] == list(range(8))
    assert len({choice["message"]["content"] for choice in body["choices"]}) == 8
    assert len(harness.worker.requests) == 1


async def test_echo_puts_the_prompt_before_the_text(harness: Harness) -> None:
    plain, echoed = (await harness.complete()).json(), (await harness.complete(echo=True)).json()
    assert echoed["choices"][0]["text"] == "hello" + plain["choices"][0]["text"]


async def test_the_same_seed_says_the_same_and_no_seed_draws_one(harness: Harness) -> None:
    first, second = (await harness.chat(seed=1)).json(), (await harness.chat(seed=1)).json()
    assert first["choices"][0]["message"] == second["choices"][0]["message"]
    await harness.chat(seed=None)
    await harness.chat(seed=None)
    drawn = [request.sampling.seed for request in harness.worker.requests[2:]]
    assert len({*drawn, 0, 1}) == 4


async def test_nulls_mean_defaults(harness: Harness) -> None:
    nothing = dict.fromkeys(
        ["temperature", "top_p", "n", "stop", "logit_bias", "tools", "presence_penalty", "stream", "response_format"]
    )
    assert (await harness.chat(**nothing)).status_code == 200


async def test_sampling_fields_reach_the_worker(harness: Harness) -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "seed": -1, "repetition_penalty": 1.5, "frequency_penalty": 0.5,
        "presence_penalty": -0.5, "min_tokens": 2, "stop_token_ids": [5, 6], "ignore_eos": True,
        "min_p": 0.125,
    }  # fmt: skip
    assert (await harness.complete(**fields)).status_code == 200
    sampling = harness.worker.requests[0].sampling
    for name, value in fields.items():
        got = getattr(sampling, name)
        assert (list(got) if name == "stop_token_ids" else got) == (2**64 - 1 if name == "seed" else value)


async def test_a_tiny_temperature_is_greedy(harness: Harness) -> None:
    await harness.complete(temperature=1e-7)
    assert harness.worker.requests[0].sampling.temperature == 0.0


# ---------------------------------------------------------------- ends


async def test_the_end_token_is_counted_but_not_shown(tmp_path: Path) -> None:
    async with running(tmp_path, saying("héllo")) as harness:
        body = (await harness.complete()).json()
        assert body["choices"][0]["text"] == "héllo"
        assert (body["choices"][0]["finish_reason"], body["choices"][0]["stop_reason"]) == ("stop", None)
        assert body["usage"]["completion_tokens"] == 7


async def test_a_stop_string_ends_the_choice_and_is_named(tmp_path: Path) -> None:
    async with running(tmp_path, saying("one STOP two three four five six")) as harness:
        body = (await harness.complete(stop=["nix", "STOP"], max_tokens=30)).json()
        assert body["choices"][0]["text"] == "one "
        assert (body["choices"][0]["finish_reason"], body["choices"][0]["stop_reason"]) == ("stop", "STOP")
        async with asyncio.timeout(PATIENCE_S):
            await harness.worker.was_cancelled.wait()


async def test_a_stop_string_is_never_shown_in_part_while_streaming(tmp_path: Path) -> None:
    async with running(tmp_path, saying("one STOP two three four five six")) as harness:
        chunks = events(await harness.complete(stop="STOP", max_tokens=30, stream=True))
        assert streamed_text(chunks) == "one "
        assert all("S" not in choice["text"] for chunk in chunks[:-1] for choice in chunk["choices"])


async def test_the_stop_string_is_included_if_asked(tmp_path: Path) -> None:
    async with running(tmp_path, saying("one STOP two")) as harness:
        body = (await harness.complete(stop="STOP", include_stop_str_in_output=True)).json()
        assert body["choices"][0]["text"] == "one STOP"


async def test_a_stop_token_id_is_named_as_the_stop_reason(tmp_path: Path) -> None:
    async with running(tmp_path, saying("abc", eos=False)) as harness:
        stop_id = 3 + ord("c") - 33
        body = (await harness.complete(stop_token_ids=[stop_id])).json()
        assert body["choices"][0]["text"] == "ab"
        assert (body["choices"][0]["finish_reason"], body["choices"][0]["stop_reason"]) == ("stop", stop_id)


async def test_text_held_back_for_a_stop_string_comes_out_at_the_end(tmp_path: Path) -> None:
    async with running(tmp_path, saying("abc ST")) as harness:
        assert streamed_text(events(await harness.complete(stop="STOP", stream=True))) == "abc ST"


async def test_one_choice_may_stop_while_another_goes_on(tmp_path: Path) -> None:
    def next_token(request: pb.GenerateRequest, choice: int, index: int) -> int:
        return 3 + ord("xS"[choice == 1 and index == 2]) - 33

    async with running(tmp_path, FakeDecodeWorker(next_token=next_token)) as harness:
        body = (await harness.complete(n=2, stop="S", max_tokens=6)).json()
        assert [choice["text"] for choice in body["choices"]] == ["xxxxxx", "xx"]
        assert [choice["finish_reason"] for choice in body["choices"]] == ["length", "stop"]


# ---------------------------------------------------------------- streams


async def test_a_chat_stream_keeps_the_contract(harness: Harness) -> None:
    response = await harness.chat(stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:])
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]] == ["length"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert all("usage" not in chunk for chunk in chunks)
    whole = (await harness.chat()).json()
    assert streamed_text(chunks) == whole["choices"][0]["message"]["content"]


async def test_a_completion_stream_says_the_same_as_the_whole_answer(harness: Harness) -> None:
    chunks = events(await harness.complete(stream=True, echo=True))
    assert {chunk["object"] for chunk in chunks[:-1]} == {"text_completion"}
    assert streamed_text(chunks) == (await harness.complete(echo=True)).json()["choices"][0]["text"]


async def test_each_choice_of_a_stream_has_one_role_and_one_finish(harness: Harness) -> None:
    *chunks, _ = events(await harness.chat(stream=True, n=3))
    bodies = [chunk["choices"][0] for chunk in chunks]
    for choice in range(3):
        own = [body for body in bodies if body["index"] == choice]
        assert [body["delta"].get("role") for body in own].count("assistant") == 1
        assert [body["finish_reason"] for body in own if body["finish_reason"]] == ["length"]
    whole = (await harness.chat(n=3)).json()
    for choice in range(3):
        assert streamed_text(chunks, choice) == whole["choices"][choice]["message"]["content"]


async def test_usage_comes_once_in_a_last_chunk_without_choices(harness: Harness) -> None:
    *chunks, last, done = events(await harness.chat(stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in chunks)


async def test_continuous_usage_counts_up(harness: Harness) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last, _ = events(await harness.complete(stream=True, stream_options=options, max_tokens=4))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4]
    assert last["usage"]["completion_tokens"] == 4


async def test_half_characters_are_never_streamed(tmp_path: Path) -> None:
    async with running(tmp_path, saying("ñ🙂京")) as harness:
        chunks = events(await harness.complete(stream=True))
        assert [c["choices"][0]["text"] for c in chunks[:-1]] == ["ñ", "🙂", "京", ""]


async def test_a_failure_in_the_middle_is_an_event_and_no_done(tmp_path: Path) -> None:
    worker = FakeDecodeWorker(script=Script(step_s=0.01))

    async with running(tmp_path, worker, request_timeout=3.0) as harness:  # its first token must come before
        response = await harness.complete(stream=True, max_tokens=2000)
        *_, last = events(response)
        assert response.status_code == 200
        assert last["error"]["code"] == 504
        assert last["error"]["type"] == "DeadlineExceededError"
        with pytest.raises(openai.APIError, match="deadline"):
            async for _ in await harness.openai().completions.create(
                model=MODEL_ID, prompt="x", max_tokens=2000, stream=True
            ):
                pass


# ---------------------------------------------------------------- logprobs and ids


async def test_chat_logprobs_name_token_bytes_and_alternatives(harness: Harness) -> None:
    body = (await harness.chat(logprobs=True, top_logprobs=2, max_tokens=3)).json()["choices"][0]
    entries = body["logprobs"]["content"]
    assert len(entries) == 3
    assert "".join(entry["token"] for entry in entries) == body["message"]["content"]
    assert entries[0]["logprob"] == pytest.approx(-0.5)
    assert bytes(entries[0]["bytes"]).decode() == entries[0]["token"]
    assert [top["logprob"] for top in entries[0]["top_logprobs"]] == pytest.approx([-0.5, -1.5])


async def test_chat_logprobs_alone_have_no_alternatives(harness: Harness) -> None:
    body = (await harness.chat(logprobs=True, max_tokens=1)).json()["choices"][0]
    assert body["logprobs"]["content"][0]["top_logprobs"] == []


async def test_completion_logprobs_are_parallel_lists(harness: Harness) -> None:
    body = (await harness.complete(logprobs=2, max_tokens=3)).json()["choices"][0]
    logprobs = body["logprobs"]
    assert "".join(logprobs["tokens"]) == body["text"]
    assert logprobs["text_offset"] == [0, 1, 2]
    assert logprobs["token_logprobs"] == pytest.approx([-0.5] * 3)
    assert [len(top) for top in logprobs["top_logprobs"]] == [2, 2, 2]


async def test_streamed_logprobs_equal_the_whole_answers(harness: Harness) -> None:
    chunks = events(await harness.chat(stream=True, logprobs=True, top_logprobs=1))[1:-1]
    streamed = [entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]]
    assert streamed == (await harness.chat(logprobs=True, top_logprobs=1)).json()["choices"][0]["logprobs"]["content"]


async def test_token_ids_are_returned_if_asked(harness: Harness) -> None:
    whole = (await harness.complete(return_token_ids=True, max_tokens=3)).json()["choices"][0]
    assert len(whole["token_ids"]) == 3
    assert len(whole["prompt_token_ids"]) == 5
    chunks = events(await harness.complete(return_token_ids=True, max_tokens=3, stream=True))[:-1]
    assert [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]] == whole["token_ids"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 9}, "n", "less than or equal to 8"),
        ({"temperature": -0.1}, "temperature", "greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.1}, "top_p", "less than or equal to 1"),
        ({"top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"min_p": -0.1}, "min_p", r"greater than or equal to 0 \(got -0.1\)"),
        ({"min_p": 1.1}, "min_p", r"less than or equal to 1 \(got 1.1\)"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 2044}, "max_tokens", r"5 prompt tokens \+ 2044 exceed .* of 2048.*at most 2043"),
        ({"prompt": "x" * 2048}, "prompt", "2048 tokens leave no room in the model's maximum of 2048"),
        ({"prompt": ""}, "prompt", "must not be empty"),
        ({"prompt": []}, "prompt", "must not be empty"),
        ({"prompt": [320]}, "prompt", "token id 320 is not below the vocabulary size 320"),
        ({"prompt": ["x"] * 129}, "prompt", "129 prompts exceed the limit of 128"),
        ({"stop": ["x"] * 17}, "stop", "17 strings exceed the limit of 16"),
        ({"stop": [""]}, "stop", "at least 1 character"),
        ({"logprobs": 21}, "logprobs", "less than or equal to 20"),
        ({"min_tokens": 17}, "min_tokens", "17 exceeds max_tokens 16"),
        ({"echo": True, "logprobs": 1}, "echo", "not supported together with logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "only allowed when stream is true"),
        ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
        ({"seed": "x"}, "seed", "valid integer"),
        ({"seed": 2**64}, "seed", "at most 64 bits"),
        ({"max_tokens": 10**30}, "max_tokens", "at most 64 bits"),
        ({"temperature": "hot"}, "temperature", r"valid number.*\(got 'hot'\)"),
        ({"frequency_penalty": -2.1}, "frequency_penalty", "greater than or equal to -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"prompt": "x" * 2049}, "prompt", "2049 tokens leave no room in the model's maximum of 2048"),
        ({"prompt": "x" * 2047, "max_tokens": 2}, "max_tokens", r"2047 prompt tokens \+ 2 .*at most 1"),
        ({"prompt": [[]]}, "prompt", "no tokens"),
        ({"prompt": [-1]}, "prompt", r"prompt\.0: .*greater than or equal to 0"),
        ({"prompt": [2**40]}, "prompt", "less than 4294967296"),
        ({"prompt": 5}, "prompt", r"\(got 5\)"),
        ({"stop": "x" * 1025}, "stop", "at most 1024 characters"),
        ({"stop": 5}, "stop", r"\(got 5\)"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids", "at most 128 items"),
        ({"logprobs": -1}, "logprobs", "greater than or equal to 0"),
        ({"stream": "maybe"}, "stream", "valid boolean"),
        ({"stream": True, "stream_options": 5}, "stream_options", r"should be an object \(got 5\)"),
        ({"user": 5}, "user", "valid string"),
        ({"cache_salt": ""}, "cache_salt", "at least 1 character"),
        ({"request_id": "x" * 129}, "request_id", "at most 128 characters"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "greater than or equal to 1"),
        ({"tools": [{"x": 1}]}, "tools", r"not supported by this server yet \(got \[\{'x': 1\}\]\); leave it out"),
    ],
)  # fmt: skip
async def test_a_bad_value_is_a_400_that_names_it(
    harness: Harness, body: dict[str, Any], param: str, words: str
) -> None:
    response = await harness.complete(**body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["type"], error["code"], error["param"]) == ("BadRequestError", 400, param)
    assert re.search(words, error["message"]), error["message"]
    assert response.headers["x-should-retry"] == "false"
    assert harness.worker.requests == []


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "user", "content": "x"}] * 1025}, "messages", "at most 1024 items .*1025"),
        ({"messages": [{"content": "x"}]}, "messages", r"messages\.0\.role: a string is required"),
        ({"messages": [*MESSAGES, {"role": 5}]}, "messages", r"messages\.1\.role: .*\(got 5\)"),
        ({"messages": ["x"]}, "messages", r"messages\.0: Input should be an object \(got 'x'\)|valid dictionary"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages", r"messages\.0\.content: a string or .*\(got 5\)"),
        ({"messages": [{"role": "user", "content": {}}]}, "messages", r"messages\.0\.content: a string or"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "'image_url' is not"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages", "'text' needs the string 'text'"),
        ({"messages": [{"role": "user", "content": [{"type": []}]}]}, "messages", "not supported"),
        ({"max_completion_tokens": 4096}, "max_completion_tokens", "max_completion_tokens: .* exceed .* of 2048"),
        ({"max_completion_tokens": 3, "min_tokens": 4}, "min_tokens", "4 exceeds max_completion_tokens 3"),
        ({"top_logprobs": 1}, "top_logprobs", "1 needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "less than or equal to 20"),
        ({"logprobs": 5}, "logprobs", "valid boolean"),
        ({"chat_template_kwargs": 5}, "chat_template_kwargs", r"should be an object \(got 5\)|valid dictionary"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message", "together"),
    ],
)  # fmt: skip
async def test_a_bad_chat_is_a_400_that_names_it(
    harness: Harness, body: dict[str, Any], param: str, words: str
) -> None:
    response = await harness.chat(**body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert re.search(words, response.json()["error"]["message"]), response.json()["error"]["message"]
    assert harness.worker.requests == []


async def test_a_message_without_content_is_an_empty_one(harness: Harness) -> None:
    """Assistants that called tools have none; OpenAI's own clients send null."""
    for message in ({"role": "assistant", "content": None}, {"role": "assistant"}, {"role": "user", "content": []}):
        assert (await harness.chat(messages=[*MESSAGES, message])).status_code == 200
    assert len({tuple(request.prompt_token_ids) for request in harness.worker.requests[:2]}) == 1


async def test_limits_let_their_last_value_in(harness: Harness) -> None:
    bodies: list[dict[str, Any]] = [
        {"n": 8}, {"stop": ["never"] * 16}, {"logprobs": 20}, {"max_tokens": 2043}, {"prompt": ["x"] * 128},
        {"prompt": "x" * 2047, "max_tokens": 1}, {"seed": 2**64 - 1}, {"seed": -(2**63)}, {"prompt": [319]},
        {"stop": "x" * 1024}, {"stop_token_ids": [1] * 128}, {"cache_salt": "x" * 256}, {"prompt": "a\0b"},
    ]  # fmt: skip
    for body in bodies:
        assert (await harness.complete(**body)).status_code == 200
    assert (await harness.chat(messages=MESSAGES * 64)).status_code == 200


@pytest.mark.parametrize("field", sorted(UNSUPPORTED))
async def test_a_known_but_unsupported_field_is_refused_by_name(harness: Harness, field: str) -> None:
    value: Any = {"x": 1} if field != "best_of" else 2
    response = await harness.chat(**{field: value})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert field in response.json()["error"]["message"]


async def test_unsupported_fields_with_default_values_are_fine(harness: Harness) -> None:
    defaults = {name: values[-1] for name, values in UNSUPPORTED.items()}
    response = await harness.chat(**defaults)
    assert response.status_code == 200
    assert "x-baton-ignored-fields" not in response.headers


async def test_unknown_fields_are_accepted_and_listed(harness: Harness) -> None:
    for options in ({}, {"stream": True}):
        response = await harness.chat(zebra=1, apple={"a": 1}, **options)
        assert response.status_code == 200
        assert response.headers["x-baton-ignored-fields"] == "apple,zebra"
    response = await harness.chat(stream=True, stream_options={"include_usage": True, "include_obfuscation": False})
    assert response.headers["x-baton-ignored-fields"] == "stream_options.include_obfuscation"


async def test_routing_fields_of_a_client_are_not_honoured(harness: Harness) -> None:
    refused = await harness.chat(kv_transfer_params={"remote_host": "10.0.0.1"})
    assert refused.status_code == 400
    headers = {"x-baton-worker": "other", "x-baton-disaggregation": "always", "x-prefiller-host-port": "10.0.0.1:1"}
    response = await harness.http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    assert response.status_code == 200
    assert harness.worker.requests[-1].disaggregation == pb.DISAGGREGATION_AUTO


@pytest.mark.parametrize(
    "data",
    [
        b"", b"{", b"[]", b'"x"', b"null", b"\xff\xfe", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "temperature": 1e999}', b"\x1f\x8b",
        b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    ],
    ids=lambda data: repr(data[:24]),
)  # fmt: skip
async def test_a_body_that_is_no_json_object_is_a_400(harness: Harness, data: bytes) -> None:
    response = await harness.http.post("/v1/completions", content=data)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("body:")


async def test_a_body_over_a_mebibyte_is_a_413(harness: Harness) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 65536

    limit = 1 << 20
    declared = await harness.http.post("/v1/completions", content=b" " * (limit + 1))
    chunked = await harness.http.post("/v1/completions", content=pieces())
    assert (declared.status_code, chunked.status_code) == (413, 413)
    assert str(limit) in declared.json()["error"]["message"]
    body = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
    assert (await harness.http.post("/v1/completions", content=body.ljust(limit))).status_code == 200


async def test_headers_over_16_kib_are_refused(harness: Harness) -> None:
    response = await harness.http.get("/health", headers={"x-big": "x" * 17_000})
    assert response.status_code == 431
    assert response.json()["error"]["code"] == 431
    assert (await harness.http.get("/health", headers={"x-big": "x" * 15_000})).status_code == 200


async def test_wrong_model_path_and_method_have_error_bodies(harness: Harness) -> None:
    unknown = await harness.chat(model="gpt-9")
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "NotFoundError")
    assert MODEL_ID in unknown.json()["error"]["message"]
    missing = await harness.http.get("/v1/nothing")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, 404)
    wrong = await harness.http.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, 405)


async def test_a_model_without_template_sends_you_to_completions(tmp_path: Path) -> None:
    model = write_fake_model(tmp_path / "m", chat_template=None)
    async with running(tmp_path, FakeDecodeWorker(), model=model) as harness:
        response = await harness.chat()
        assert response.status_code == 400
        assert "/v1/completions" in response.json()["error"]["message"]


async def test_a_full_queue_is_a_503_that_says_when_to_return(tmp_path: Path) -> None:
    async with running(tmp_path, max_queue_requests=1, request_timeout=1.0) as harness:
        waiting = asyncio.create_task(harness.complete())
        while harness.gateway.services.admission.num_requests == 0:
            await asyncio.sleep(0.01)
        response = await harness.complete()
        assert response.status_code == 503
        assert "queued requests: 2 would exceed the limit of 1" in response.json()["error"]["message"]
        assert int(response.headers["retry-after"]) >= 1
        assert int(response.headers["retry-after-ms"]) >= 500
        assert response.headers["x-should-retry"] == "true"
        assert await harness.metric("vllm:admission_rejections_total") == 1
        assert (await waiting).status_code == 504


@pytest.mark.parametrize("num_tokens", [0, 3], ids=["queued", "its worker stands still"])
async def test_a_stream_that_has_nothing_to_say_is_kept_alive_with_comments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_tokens: int
) -> None:
    monkeypatch.setattr(app, "KEEP_ALIVE_S", 0.05)
    workers = [FakeDecodeWorker(script=Script(fault=Fault.STALL, at=num_tokens))] if num_tokens else []
    request = {"prompt": "hello", "max_tokens": 8, "stream": True}
    async with (
        running(tmp_path, *workers) as harness,
        harness.http.stream("POST", "/v1/completions", json=request) as response,
    ):
        assert response.status_code == 200
        num_data = num_comments = 0
        async for line in response.aiter_lines():
            num_data += line.startswith("data: ")
            num_comments += num_data == num_tokens and line == ": waiting"
            if num_comments == 3:
                break
    assert num_comments == 3


async def test_a_worker_that_refuses_everything_is_a_503(tmp_path: Path) -> None:
    async with running(tmp_path, FakeDecodeWorker(script=Script(refuse=pb.END_OVERLOADED))) as harness:
        response = await harness.complete()
        assert response.status_code == 503
        assert len(harness.worker.requests) == 3


async def test_a_request_the_worker_calls_invalid_is_a_400(tmp_path: Path) -> None:
    async with running(tmp_path, FakeDecodeWorker(script=Script(refuse=pb.END_INVALID))) as harness:
        assert (await harness.complete(stream=True)).status_code == 400
        assert len(harness.worker.requests) == 1


# ---------------------------------------------------------------- keys, ids, timing


async def test_keys_open_v1_and_nothing_else_needs_one(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# two keys\nalpha\nsha256:" + hashlib.sha256(b"beta").hexdigest() + "\n")
    async with running(tmp_path, FakeDecodeWorker(), api_key_file=keys) as harness:
        for header in ({}, {"authorization": "Bearer gamma"}, {"authorization": "Basic alpha"}):
            response = await harness.http.post("/v1/completions", json={"prompt": "x"}, headers=header)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == 401
        for key in ("alpha", "beta"):
            header = {"authorization": f"Bearer {key}"}
            assert (await harness.http.post("/v1/completions", json={"prompt": "x"}, headers=header)).status_code == 200
        for path in ("/health", "/livez", "/readyz", "/startupz", "/metrics", "/version"):
            assert (await harness.http.get(path)).status_code == 200
        alpha, beta = (request.cache_salt for request in harness.worker.requests)
        assert alpha != beta


async def test_a_clients_salt_splits_its_own_cache(harness: Harness) -> None:
    await harness.complete()
    await harness.complete()
    await harness.complete(cache_salt="mine")
    first, second, third = (request.cache_salt for request in harness.worker.requests)
    assert first == second != third


async def test_the_request_id_is_echoed_or_made(harness: Harness) -> None:
    given = await harness.http.post("/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    assert given.json()["id"] == "cmpl-abc-1"
    assert harness.worker.requests[0].request_id == "abc-1"
    bad = await harness.http.get("/v1/models", headers={"x-request-id": "a b"})
    assert len(bad.headers["x-request-id"]) == 32


async def test_timing_and_path_are_told_if_asked(harness: Harness) -> None:
    headers = {"x-baton-metrics": "1"}
    whole = (await harness.http.post("/v1/completions", json={"prompt": "x"}, headers=headers)).json()["metrics"]
    assert (whole["prefill_path"], whole["prefill_path_reason"], whole["transport"]) == (
        "remote",
        "long_prompt",
        "grpc",
    )
    assert (whole["queue_time_ms"], whole["prefill_time_ms"], whole["transfer_time_ms"]) == (500, 250, 125)
    assert whole["time_to_first_token_ms"] > 0
    last = events(await harness.chat(stream=True, metrics=True))[-2]
    assert last["metrics"]["prefill_path"] == "remote"
    assert "metrics" not in (await harness.chat()).json()


async def test_probes_force_worker_and_path_only_on_the_internal_port(tmp_path: Path) -> None:
    from gateway.app import build_app
    from servicekit.health import start_http

    secret = tmp_path / "secret"
    secret.write_text("hush")
    secret.chmod(0o600)
    workers = [FakeDecodeWorker("d0", secret="hush"), FakeDecodeWorker("d1", secret="hush")]
    async with running(tmp_path, *workers, secret_file=secret) as harness:
        server = await start_http(build_app(harness.gateway, is_internal=True), "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.port}"
        headers = {"x-baton-worker": "d1", "x-baton-disaggregation": "always"}
        body = {"prompt": "x"}
        assert (await harness.http.post(f"{url}/v1/completions", json=body, headers=headers)).status_code == 401
        headers["baton-secret"] = "hush"
        assert (await harness.http.post(f"{url}/v1/completions", json=body, headers=headers)).status_code == 200
        assert workers[1].requests[0].disaggregation == pb.DISAGGREGATION_ALWAYS
        listed = (await harness.http.get(f"{url}/internal/workers", headers=headers)).json()
        assert {state["worker_id"] for state in listed["decode"]} == {"d0", "d1"}
        await server.stop()


# ---------------------------------------------------------------- the other paths


async def test_models_are_listed_and_described(harness: Harness) -> None:
    listed = (await harness.http.get("/v1/models")).json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert (card["id"], card["object"], card["max_model_len"], card["status"]) == (MODEL_ID, "model", 2048, "ready")
    assert (await harness.http.get(f"/v1/models/{MODEL_ID}")).json() == card
    assert (await harness.http.get("/v1/models/other")).status_code == 404


async def test_tokenize_and_detokenize_are_inverse(harness: Harness) -> None:
    body = (await harness.http.post("/tokenize", json={"prompt": "héllo", "return_token_strs": True})).json()
    assert (body["count"], body["max_model_len"], len(body["tokens"]), len(body["token_strs"])) == (6, 2048, 6, 6)
    assert (await harness.http.post("/detokenize", json={"tokens": body["tokens"]})).json() == {"prompt": "héllo"}
    chat = (await harness.http.post("/tokenize", json={"messages": MESSAGES})).json()
    text = (await harness.http.post("/detokenize", json={"tokens": chat["tokens"]})).json()["prompt"]
    assert text == "<|user|>hello\n<|assistant|>"
    assert (await harness.http.post("/tokenize", json={})).status_code == 400


async def test_detokenize_names_a_token_that_does_not_exist(harness: Harness) -> None:
    """It was left out of the text without a word."""
    response = await harness.http.post("/detokenize", json={"tokens": [70, 10**9]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "tokens"
    assert "token id 1000000000 is not below the vocabulary size" in response.json()["error"]["message"]
    assert (await harness.http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


async def test_big_prompts_are_tokenized_beside_the_event_loop(harness: Harness) -> None:
    response = await harness.http.post("/tokenize", json={"prompt": "word " * 20_000})
    assert response.json()["count"] == 100_000


async def test_health_and_version_answer(harness: Harness) -> None:
    for path in ("/health", "/ping", "/livez", "/readyz", "/startupz"):
        assert (await harness.http.get(path)).status_code == 200
    assert (await harness.http.get("/health")).content == b""
    assert "version" in (await harness.http.get("/version")).json()


async def test_health_says_503_while_no_worker_is_there_but_the_process_is_ready(tmp_path: Path) -> None:
    async with running(tmp_path) as harness:
        assert (await harness.http.get("/health")).status_code == 503
        assert (await harness.http.get("/readyz")).status_code == 200
        assert (await harness.http.get("/v1/models")).json()["data"][0]["status"] == "loading"


async def test_a_draining_gateway_finishes_what_runs_and_takes_no_more(tmp_path: Path) -> None:
    from gateway.process import drain_requests

    async with running(tmp_path, FakeDecodeWorker(script=Script(step_s=0.01))) as harness:
        work = asyncio.create_task(harness.complete(max_tokens=30))
        while not harness.worker.requests:
            await asyncio.sleep(0.01)
        await drain_requests(harness.gateway, 10.0)
        assert (await work).status_code == 200
        assert (await harness.http.get("/readyz")).status_code == 503
        refused = await harness.complete()
        assert (refused.status_code, refused.headers["x-should-retry"]) == (503, "true")


async def test_metrics_have_vllms_names_and_count(tmp_path: Path) -> None:
    async with running(tmp_path, FakeDecodeWorker(script=Script(stats=STATS))) as harness:
        await harness.complete(max_tokens=4, n=2)
        await _check_metrics(harness)


async def _check_metrics(harness: Harness) -> None:
    text = (await harness.http.get("/metrics")).text
    labels = f'{{engine="0",model_name="{MODEL_ID}"}}'
    assert f"vllm:generation_tokens_total{labels} 8.0" in text
    for name, count in {
        "time_to_first_token_seconds": 1, "inter_token_latency_seconds": 6, "e2e_request_latency_seconds": 1,
        "request_time_per_output_token_seconds": 2, "request_prompt_tokens": 1, "request_params_n": 1,
    }.items():  # fmt: skip
        assert f"vllm:{name}_count{labels} {float(count)}" in text, name
    assert await harness.metric("vllm:request_success_total") == 2
    assert await harness.metric("vllm:prompt_tokens_total") == 5
    assert await harness.metric('baton_gateway_prefill_path_total{path="remote"') == 1
    assert await harness.metric('baton_gateway_attempts_total{end="finished"}') == 1


async def test_logs_and_metrics_never_hold_what_users_say(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    answer = (await harness.complete(prompt="canary-prompt-7319")).json()["choices"][0]["text"]
    seen = caplog.text + " ".join(str(vars(record)) for record in caplog.records)
    seen += (await harness.http.get("/metrics")).text
    assert "canary-prompt-7319" not in seen
    assert answer not in seen
    assert "request ended" in caplog.text


# ---------------------------------------------------------------- the client that users have


async def test_the_openai_client_gets_whole_answers(harness: Harness) -> None:
    client = harness.openai()
    chat = await client.chat.completions.create(
        model=MODEL_ID, messages=[{"role": "user", "content": "hi"}], max_tokens=5, n=2, logprobs=True, top_logprobs=1
    )
    assert [len(choice.message.content or "") for choice in chat.choices] == [5, 5]
    assert chat.usage is not None
    assert chat.usage.prompt_tokens_details is not None
    assert chat.usage.prompt_tokens_details.cached_tokens == 4
    assert chat._request_id
    text = await client.completions.create(model=MODEL_ID, prompt=[[10, 11], [12]], max_tokens=3)
    assert [len(choice.text) for choice in text.choices] == [3, 3]
    assert (await client.models.retrieve(MODEL_ID)).id == MODEL_ID
    assert [model.id async for model in client.models.list()] == [MODEL_ID]
    await client.close()


async def test_the_openai_client_streams(harness: Harness) -> None:
    client = harness.openai()
    stream = await client.chat.completions.create(
        model=MODEL_ID,
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=8,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 5, "ignore_eos": True},
    )
    text, finishes, usage = "", [], None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finishes += [choice.finish_reason] if choice.finish_reason else []
    assert text == (await harness.chat()).json()["choices"][0]["message"]["content"]
    assert finishes == ["length"]
    assert usage is not None
    assert usage.completion_tokens == 8
    await client.close()


async def test_the_openai_client_raises_its_own_errors(harness: Harness) -> None:
    client = harness.openai()
    with pytest.raises(openai.BadRequestError, match="less than or equal to 8") as bad:
        await client.completions.create(model=MODEL_ID, prompt="x", n=9)
    assert bad.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("other")
    await client.close()
