"""The official client, unchanged, against every endpoint, streamed and not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import openai
import pytest
import runtime_toys as toys
from server_toys import until

from roundexport.runtime import Encoder, load
from roundexport.runtime.settings import GenerationSettings

if TYPE_CHECKING:
    from server_toys import Running

PROMPT: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell about the sea."}]


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.v1, api_key="unused", max_retries=0) as found:
        yield found


def direct(server: Running, name: str, ids: list[int], **settings: Any) -> str:
    """What the package itself answers, without a server."""
    decoder = server.models.decoder(name).decoder
    return "".join(step.text[0] for step in decoder.generate([ids], GenerationSettings(**settings)))


def chat_ids(server: Running, messages: list[Any]) -> list[int]:
    return server.models.decoder("talker").tokenizer.encode_chat(messages)


def test_chat(server: Running, client: openai.OpenAI) -> None:
    found = client.chat.completions.create(model="talker", messages=PROMPT, max_tokens=20, temperature=0)
    ids = chat_ids(server, PROMPT)
    assert found.choices[0].message.content == direct(server, "talker", ids, max_new_tokens=20)
    assert found.choices[0].message.role == "assistant" and found.object == "chat.completion"
    assert found.choices[0].finish_reason in ("stop", "length")
    assert found.usage is not None and found.usage.prompt_tokens == len(ids)
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    again = client.chat.completions.create(model="talker", messages=PROMPT, max_tokens=20, temperature=0)
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == len(ids) - 1
    assert again.choices[0].message.content == found.choices[0].message.content


@pytest.mark.parametrize("streamed", [False, True])
def test_ten_turns_read_no_token_twice(server: Running, client: openai.OpenAI, streamed: bool) -> None:
    # Single letters, which the tokenizer would join: the answers come back as other tokens than were written.
    tokenizer = server.models.decoder("talker").tokenizer
    letters = [tokenizer.raw.token_to_id(letter) for letter in ("t", "h", "e", "Ġ")]
    bias = {str(token): 100 if token in letters else -100 for token in range(toys.VOCAB)}
    messages, held = [{"role": "user", "content": f"What did the waves bring, {streamed}?"}], 0
    for turn in range(10):
        asked: dict[str, Any] = {
            "model": "talker", "messages": messages, "max_tokens": 12, "temperature": 1, "seed": turn,
            "logit_bias": bias,
        }  # fmt: skip
        if streamed:
            chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
            text, usage = "".join(c.choices[0].delta.content or "" for c in chunks[:-1]), chunks[-1].usage
        else:
            found = client.chat.completions.create(**asked)
            text, usage = found.choices[0].message.content, found.usage
        assert usage is not None and usage.prompt_tokens_details is not None
        assert turn == 0 or usage.prompt_tokens_details.cached_tokens == held
        held = usage.prompt_tokens + usage.completion_tokens - 1  # all but the last one, which no run has read
        messages += [{"role": "assistant", "content": text}, {"role": "user", "content": f"And the {turn}th one?"}]


def test_chat_streamed_joins_to_the_whole(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "talker",
        "messages": PROMPT,
        "max_tokens": 40,
        "temperature": 0.9,
        "seed": 3,
        "n": 3,
    }
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    texts, ends = {i: "" for i in range(3)}, {}
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ends[choice.index] = choice.finish_reason or ends.get(choice.index)
        assert chunk.usage is None and chunk.object == "chat.completion.chunk" and chunk.id == chunks[0].id
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert len(set(texts.values())) == 3  # three draws
    assert chunks[-1].choices == [] and whole.usage is not None and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert [c.choices[0].delta.role for c in chunks[:-1]].count("assistant") == 3


def test_chat_logprobs(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "talker",
        "messages": PROMPT,
        "max_tokens": 12,
        "temperature": 0,
        "logprobs": True,
    }
    whole = client.chat.completions.create(**asked, top_logprobs=3)
    told = whole.choices[0].logprobs
    assert told is not None and told.content and len(told.content) <= 12
    for token in told.content:
        assert len(token.top_logprobs) == 3 and token.logprob == token.top_logprobs[0].logprob <= 0
    text = b"".join(bytes(token.bytes or []) for token in told.content).decode("utf-8", "replace")
    assert text.startswith(whole.choices[0].message.content or "?")
    streamed = client.chat.completions.create(**asked, top_logprobs=3, stream=True)
    pieces = [c.choices[0].logprobs for c in streamed if c.choices[0].logprobs]
    assert [t for piece in pieces for t in piece.content or []] == told.content


def test_every_setting_arrives(server: Running, client: openai.OpenAI) -> None:
    ids = chat_ids(server, PROMPT)
    plain = direct(server, "talker", ids, max_new_tokens=30)
    stop = plain[4:7]
    found = client.chat.completions.create(
        model="talker", messages=PROMPT, max_completion_tokens=30, temperature=0, stop=[stop]
    )
    assert found.choices[0].message.content == plain[: plain.index(stop)]
    assert found.choices[0].finish_reason == "stop"
    found = client.chat.completions.create(
        model="talker", messages=PROMPT, max_tokens=30, temperature=0.8, top_p=0.9, seed=11, presence_penalty=0.5,
        frequency_penalty=0.25, logit_bias={"40": 5}, extra_body={"top_k": 50, "min_p": 0.01, "ignore_eos": True,
                                                                  "repetition_penalty": 1.1},
    )  # fmt: skip
    wanted = direct(
        server, "talker", ids, max_new_tokens=30, temperature=0.8, top_p=0.9, seed=11, presence_penalty=0.5,
        frequency_penalty=0.25, logit_bias={40: 5.0}, top_k=50, min_p=0.01, ignore_eos=True, repetition_penalty=1.1,
    )  # fmt: skip
    assert found.choices[0].message.content == wanted


def test_without_a_seed_answers_differ(client: openai.OpenAI) -> None:
    # Two answers of this toy are the same text with a chance of .001 at temperature 2 (.02 at 1), all four never.
    asked: dict[str, Any] = {"model": "plain", "prompt": "The", "max_tokens": 20, "temperature": 2}
    assert len({client.completions.create(**asked).choices[0].text for _ in range(4)}) > 1


def test_completions_of_texts_and_ids(server: Running, client: openai.OpenAI) -> None:
    tokenizer = server.models.decoder("plain").tokenizer
    texts = ["The sea", "A ship"]
    ids = [tokenizer.encode(text) for text in texts]
    wanted = [direct(server, "plain", row, max_new_tokens=9) for row in ids]
    forms: list[tuple[Any, list[str]]] = [
        (texts[0], wanted[:1]), (texts, wanted), (ids[0], wanted[:1]), (ids, wanted)
    ]  # fmt: skip
    for prompt, answers in forms:
        found = client.completions.create(model="plain", prompt=prompt, max_tokens=9, temperature=0)
        assert [choice.text for choice in found.choices] == answers
        assert [choice.index for choice in found.choices] == list(range(len(answers)))
        echoed = client.completions.create(model="plain", prompt=prompt, max_tokens=9, temperature=0, echo=True)
        assert [choice.text for choice in echoed.choices] == [t + a for t, a in zip(texts, answers, strict=False)]
        chunks = client.completions.create(
            model="plain", prompt=prompt, max_tokens=9, temperature=0, echo=True, stream=True
        )
        joined = [""] * len(answers)
        for chunk in chunks:
            joined[chunk.choices[0].index] += chunk.choices[0].text
        assert joined == [choice.text for choice in echoed.choices]


def test_completion_logprobs(server: Running, client: openai.OpenAI) -> None:
    found = client.completions.create(model="plain", prompt="The sea", max_tokens=8, temperature=0, logprobs=2)
    told = found.choices[0].logprobs
    assert told is not None and told.tokens and told.top_logprobs and told.token_logprobs and told.text_offset
    assert len(told.tokens) == len(told.top_logprobs) == len(told.token_logprobs) == len(told.text_offset)
    tokenizer = server.models.decoder("plain").texts
    assert told.text_offset[0] == 0 and told.text_offset == sorted(told.text_offset)
    assert len({key for top in told.top_logprobs for key in top}) > 2 and all(
        len(top) == 2 for top in told.top_logprobs
    )
    assert any(token.startswith("bytes:\\x") for token in told.tokens) and tokenizer.key(40) == tokenizer.text(40)
    assert all(
        max(top.values()) == pytest.approx(lp) for top, lp in zip(told.top_logprobs, told.token_logprobs, strict=True)
    )


@pytest.mark.parametrize("count", [0, 1, 5])
def test_how_likely_a_prompt_is(server: Running, client: openai.OpenAI, count: int) -> None:
    model = server.models.decoder("plain")
    texts = ["The sea was calm. " * 20, "A"]  # more than one piece, and a single token
    found = client.completions.create(
        model="plain", prompt=texts, max_tokens=count, temperature=0, echo=True, logprobs=2
    )
    for text, choice in zip(texts, found.choices, strict=True):
        ids = model.tokenizer.encode(text)
        logits = model.decoder.logits(np.array([ids]))[0].astype(np.float64)
        wanted = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        told = choice.logprobs
        assert told is not None and told.token_logprobs and told.top_logprobs and told.tokens and told.text_offset
        assert told.token_logprobs[0] is None and told.top_logprobs[0] is None  # type: ignore[comparison-overlap]
        np.testing.assert_allclose(
            told.token_logprobs[1 : len(ids)], [wanted[i, t] for i, t in enumerate(ids[1:])], atol=1e-3
        )
        assert "".join(told.tokens[: len(ids)]) == text and choice.text.startswith(text)
        assert len(told.tokens) == len(ids) + count and told.text_offset[: len(ids)][-1] == len(text) - len(
            told.tokens[len(ids) - 1]
        )
    assert found.usage is not None and found.usage.completion_tokens == 2 * count
    until(lambda: server.busy() == 0)


def test_embeddings(server: Running, client: openai.OpenAI, folders: dict[str, Path]) -> None:
    texts = ["the sea", "a much longer text about ships and the sea", "x"]
    encoder = load(folders["encoder"], threads=1)
    assert isinstance(encoder, Encoder)
    wanted = encoder.embed(texts)
    # The client asks for base64 by itself and gives floats.
    found = client.embeddings.create(model="encoder", input=texts)
    np.testing.assert_allclose([row.embedding for row in found.data], wanted, rtol=0, atol=1e-6)
    floats = client.embeddings.create(model="encoder", input=texts, encoding_format="float")
    np.testing.assert_allclose([row.embedding for row in floats.data], wanted, rtol=0, atol=1e-6)
    ids = [encoder.tokenizer.encode(text) for text in texts]
    by_ids = client.embeddings.create(model="encoder", input=ids)
    np.testing.assert_allclose([row.embedding for row in by_ids.data], wanted, rtol=0, atol=1e-6)
    assert found.usage.prompt_tokens == by_ids.usage.prompt_tokens == sum(map(len, ids))
    assert len(client.embeddings.create(model="encoder", input="one").data) == 1
    many = [f"text number {i}" for i in range(100)]
    np.testing.assert_allclose(
        [row.embedding for row in client.embeddings.create(model="encoder", input=many).data],
        encoder.embed(many),
        atol=1e-6,
    )


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["talker", "plain", "encoder", "ranker"]
    found = client.models.retrieve("talker").model_dump()
    assert found["card"]["target"] == "onnx" and found["card"]["engine"]["engine"] and found["max_context"] == 640
    with pytest.raises(openai.NotFoundError, match="there are: talker, plain, encoder, ranker"):
        client.models.retrieve("gpt-5")


def test_the_asynchronous_client(server: Running) -> None:
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.v1, api_key="unused", max_retries=0) as client:

            async def one(seed: int) -> str:
                chunks = await client.chat.completions.create(
                    model="talker", messages=PROMPT, max_tokens=30, seed=seed, stream=True
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            streamed = await asyncio.gather(*(one(seed) for seed in range(8)))
            whole = [
                await client.chat.completions.create(model="talker", messages=PROMPT, max_tokens=30, seed=seed)
                for seed in range(8)
            ]
            assert streamed == [answer.choices[0].message.content for answer in whole]
            vectors = await client.embeddings.create(model="encoder", input=["a", "b"])
            assert len(vectors.data) == 2
            return streamed

    assert len(set(asyncio.run(talk()))) > 1


def test_metrics_and_stats_tell_of_it(server: Running, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="talker", messages=PROMPT, max_tokens=5)
    text = httpx.get(f"{server.url}/metrics").text
    label = '{gen_ai_operation_name="chat",gen_ai_request_model="talker"'
    for name in ("time_to_first_token_seconds", "time_per_output_token_seconds"):
        assert f"gen_ai_server_{name}_count{label}}}" in text
    assert f'gen_ai_server_request_duration_seconds_count{{error_type="",{label[1:]}' in text
    assert 'roundexport_requests{model="talker",state="waiting"} 0.0' in text
    assert 'roundexport_tokens_total{kind="reused",model="talker"}' in text
    stats = httpx.get(f"{server.v1}/stats").json()["models"]["talker"]
    assert stats["counts"]["written"] > 0 and stats["load"]["cache_limit"] > 0
