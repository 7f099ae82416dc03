"""Load: when requests come, what counts, what a server's answers become, and the whole against servers that run."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import runtime_toys as toys
from typer.testing import CliRunner

from roundexport.cli.app import app
from roundexport.errors import RoundexportError, UnsupportedError, UsageError
from roundexport.runtime.benchmarking import under_load
from roundexport.runtime.benchmarking.arrivals import Level, Window, arrivals, run
from roundexport.runtime.benchmarking.load_report import Loaded, Resources
from roundexport.runtime.benchmarking.stream_client import Sample, complete
from roundexport.runtime.benchmarking.under_load import Demand, Target, bench_under_load


def sample(due: float, first: float, last: float, tokens: int, **changes: Any) -> Sample:
    events = tuple(np.linspace(first, last, tokens).tolist())
    return Sample(
        **{"due": due, "sent": due, "ended": last, "status": 200, "events": events, "tokens": tokens, **changes}
    )


def test_arrivals_come_by_chance_and_at_their_rate() -> None:
    due = arrivals(20, 100, seed=3)
    assert due == arrivals(20, 100, seed=3) != arrivals(20, 100, seed=4)
    assert abs(len(due) - 2000) < 5 * 2000**0.5 and 0 < min(due) and max(due) < 100
    gaps = np.diff(due)
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.1)  # as of no other distribution of gaps
    with pytest.raises(UsageError, match="longer --duration"):
        arrivals(0.1, 10, seed=0)


def test_an_open_loop_waits_for_nobody_and_counts_from_when_a_request_was_due() -> None:
    async def ask(number: int, due: float) -> Sample:
        sent = time.perf_counter()
        if number == 0:
            time.sleep(0.3)  # holds the client itself: what was due meanwhile is sent too late
        await asyncio.sleep(1.0)
        return Sample(due, sent, time.perf_counter(), 200, (time.perf_counter(),), 1)

    window = asyncio.run(run(Level(rate=40), ask, 1.0, seed=0))
    assert len(window.samples) == len(arrivals(40, 1.0, 0)) > 20  # not one after another, each of a second
    late = [one for one in window.samples[1:] if one.sent - one.due > 0.1]
    assert late and all(one.ttft_ms > 1000 * (1.0 + one.sent - one.due) - 50 for one in late)


def test_a_closed_loop_has_its_users_and_throws_their_first_answers_away() -> None:
    under_way, most, asked = 0, 0, []

    async def ask(number: int, due: float) -> Sample:
        nonlocal under_way, most
        asked.append(number)
        under_way, most = under_way + 1, max(most, under_way + 1)
        await asyncio.sleep(0.01 * (1 + number % 3))
        under_way -= 1
        now = time.perf_counter()
        return Sample(due, due, now, 200, (now,), 1)

    window = asyncio.run(run(Level(users=3), ask, 0.3, seed=0))
    assert most == 3 and asked == list(range(len(asked)))
    assert len(window.before) >= 3 and len(window.samples) + len(window.before) == len(asked)
    assert all(window.start <= one.due < window.end for one in window.samples)
    assert window.end - window.start == pytest.approx(0.3)


def test_figures_follow_from_the_times() -> None:
    whole = [sample(at, at + 0.1, at + 0.5, 5) for at in range(10)]
    window = Window(0.0, 10.0, [
        *whole, sample(1, 1.2, 1.5, 4, error="broke off"), Sample(2, 2.5, 2.6, 429), Sample(3, 3, 3.1, 0, error="gone"),
    ], before=[sample(-1, -0.6, 1.0, 4)])  # fmt: skip
    row = Loaded("a", Level(users=2), window, Resources(3 * 2**20, 10.0, 7.0)).row()
    assert (row["requests"], row["errors"], row["refused"]) == (10, 2, 1)
    # 50 of whole answers, 4 of the one that broke off, and of the one before the two that came in the window
    assert row["output_tps"] == pytest.approx(5.6) and row["joules_per_token"] == pytest.approx(10 / 56)
    assert row["ttft_p50_ms"] == pytest.approx(100) and row["tpot_p50_ms"] == pytest.approx(100)
    assert row["itl_p90_ms"] == pytest.approx(100)
    assert row["e2e_p90_ms"] == pytest.approx(500) and row["e2e_p99_ms"] is None and row["e2e_n"] == 10
    assert row["itl_n"] == 40 and row["late_max_ms"] == 500 and row["rss_max_mib"] == 3
    nothing = Loaded("a", Level(rate=1), Window(0, 1, [Sample(0, 0, 1, 429)]), Resources()).row()
    assert nothing["requests"] == 0 and nothing["ttft_p50_ms"] is None and nothing["joules_per_token"] is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"levels": ()}, "a concurrency or a rate"),
        ({"duration": 0.0}, "duration must"),
        ({"prompt_lens": ()}, "prompt lengths"),
        ({"output_len": 1}, "output length"),
        ({"seed": -1}, "seed must"),
    ],
)
def test_demands_refuse_nonsense(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Demand(**{"levels": (Level(users=1),), **values})
    for level in ({}, {"users": 1, "rate": 1.0}, {"users": 0}, {"rate": 0.0}, {"rate": float("nan")}):
        with pytest.raises(UsageError):
            Level(**level)  # type: ignore[arg-type]


def stream(*events: str) -> httpx.Response:
    text = "".join(f"data: {event}\n\n" for event in events)
    return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})


TOKEN = '{"choices": [{"text": "a"}], "usage": null}'
END = '{"choices": [{"text": "", "finish_reason": "length"}]}'
USAGE = '{"choices": [], "usage": {"completion_tokens": 3}}'


@pytest.mark.parametrize(
    ("reply", "events", "tokens", "error"),
    [
        (stream(TOKEN, TOKEN, USAGE, "[DONE]"), 2, 3, None),
        (stream(TOKEN, TOKEN, END, USAGE, "[DONE]"), 3, 3, None),  # a token without text, as a count of three says
        (stream(TOKEN, TOKEN, END, "[DONE]"), 2, 2, None),
        (stream(TOKEN, END, TOKEN, "[DONE]"), 3, 3, None),
        (stream(TOKEN, TOKEN, "[DONE]"), 2, 2, None),
        (stream(TOKEN), 1, 1, "without [DONE]"),
        (stream(TOKEN, '{"error": {"message": "it broke"}}'), 1, 1, "it broke"),
        (httpx.Response(500, text="it failed"), 0, 0, "it failed"),
        (httpx.Response(429, headers={"retry-after": "3"}), 0, 0, None),
    ],
)
def test_what_an_answer_becomes(reply: httpx.Response, events: int, tokens: int, error: str | None) -> None:
    async def ask() -> Sample:
        async with httpx.AsyncClient(transport=httpx.MockTransport(lambda _: reply)) as client:
            return await complete(client, "http://here/v1/completions", {}, time.perf_counter())

    found = asyncio.run(ask())
    assert (len(found.events), found.tokens) == (events, tokens)
    assert error in str(found.error) if error else found.error is None
    assert found.whole is (error is None and found.status == 200)
    assert found.retry_after_s == (3 if found.status == 429 else 1)


def test_a_server_that_takes_no_token_ids_gets_words() -> None:
    prompts = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/theirs"):
            return httpx.Response(404, text="<p>Nothing here</p>")  # not every server tells of one model
        if request.method == "GET":
            return httpx.Response(200, json={"data": [{"id": "theirs"}]})
        body = json.loads(request.content)
        prompts.append(body["prompt"])
        assert (body["model"], body["max_tokens"], body["ignore_eos"]) == ("theirs", 64, True)
        return stream(TOKEN, "[DONE]") if isinstance(body["prompt"], str) else httpx.Response(400, text="no ids")

    async def meet(answer: Any) -> Target:
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as client:
            target = Target("theirs", "http://here/v3", "", None, 50, {})
            return await under_load._introduced(client, target, Demand((Level(users=1),), prompt_lens=(7,)))

    found = asyncio.run(meet(answer))
    assert found.model == "theirs" and found.vocabulary is None
    assert len(prompts[0]) == 7 and max(prompts[0]) < 50 and len(prompts[1].split()) == 7
    with pytest.raises(RoundexportError, match="does not list a model"):
        asyncio.run(meet(lambda _: httpx.Response(404)))


def test_servers_of_packages_and_running_ones_under_load(tmp_path: Path, server: Any) -> None:
    package = toys.onnx_decoder(tmp_path / "small")
    given = [
        "--url",
        server.v1,
        "--concurrency",
        "2",
        "--rate",
        "8",
        "--duration",
        "1",
        "-p",
        "8,16",
        "-n",
        "4",
        "--json",
    ]
    found = json.loads(CliRunner().invoke(app, ["bench", str(package), *given]).stdout)
    assert [(row["contestant"], row["users"], row["rate"]) for row in found["rows"]] == [
        ("small", 2, None), (server.v1, 2, None), ("small", None, 8), (server.v1, None, 8),
    ]  # fmt: skip
    for row in found["rows"]:
        assert row["requests"] > 2 and row["errors"] == row["refused"] == 0 and row["output_tokens"] == 4
        assert (
            row["output_tps"] > 0 and row["queue_mean_ms"] >= 0 and row["rss_max_mib"] > 30 and row["late_max_ms"] >= 0
        )
        assert 8 <= row["prompt_tokens"] <= 16 and row["ttft_p50_ms"] <= row["e2e_p50_ms"]
    assert found["machine"]["energy"] and found["contestants"]["small"]["engine"]["engine"] == "ort"
    assert found["rows"][2]["requests"] == found["rows"][3]["requests"] == len(found["levels"][2]["requests"])


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    demand = Demand((Level(users=1),), prompt_lens=(640,))
    with pytest.raises(UsageError, match="give a package or --url"):
        bench_under_load([], demand)
    with pytest.raises(UsageError, match="max_context"):
        bench_under_load([toys.onnx_decoder(tmp_path / "text")], demand)
    with pytest.raises(UnsupportedError, match="encoder"):
        bench_under_load([toys.onnx_encoder(tmp_path / "vectors")], demand)
