"""A chat of ten turns: what each turn reads, what it finds in the cache, and how long its first token takes.

    python samples/chat_turns.py PACKAGE… [--turns 10] [--tokens 48] [--chats 5]

Every chat is held twice: in this process (`Conversation`) and over HTTP (`roundexport serve`, the client sending all
messages anew, as OpenAI's clients do).  All questions have the same number of tokens, so have all answers.  Checked:

    reread    tokens of earlier turns that are read again; must be 0, but for what a template itself leaves out
    ttft      median over chats of the tenth turn / the second one; the first turn has nothing in the cache
    graph     the same quotient for the graph alone: one `extend` by as many new tokens behind as many old ones.
              Attention over a longer context takes longer whoever asks; what it does not explain is ours

A turn must read its question, the template's words around it, and the answer's last token, which no run has read yet.
The last line of each package is one JSON document; exit code 1 where a token was read twice or the tenth turn takes
more than 20 % longer than the second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx

from roundexport.runtime import Decoder, GenerationSettings, load
from roundexport.runtime.benchmarking.server_process import ServerProcess
from roundexport.runtime.conversation import Conversation

SLOWER = 1.2
THINGS = "sea ship storm sun island harbor wind wave sail rope anchor shore cloud star night morning".split()


@dataclass(frozen=True)
class Turn:
    """Prompt tokens, those found in the cache, tokens written, and milliseconds to the first one."""

    prompt: int
    cached: int
    written: int
    ttft_ms: float


def question(chat: int, turn: int) -> str:
    """One of many; all words are single tokens of the usual vocabularies, so that lengths are equal."""
    one, other = THINGS[(3 * chat + turn) % len(THINGS)], THINGS[(5 * chat + 2 * turn + 1) % len(THINGS)]
    return f"What does the {one} have to do with the {other} in this story?"


def in_process(decoder: Decoder, chat: int, turns: int, tokens: int) -> Iterator[Turn]:
    """One chat with a decoder that is open."""
    conversation = Conversation(decoder, f"You tell story number {chat} in few words.")
    for turn in range(turns):
        settings = GenerationSettings(max_new_tokens=tokens, ignore_eos=True, temperature=0.7, seed=turn)
        for _ in conversation.ask(question(chat, turn), settings):
            pass
        done = conversation.turns[-1]
        assert done.ttft_ms is not None
        yield Turn(done.prompt_tokens, done.counts.reused, done.counts.written, done.ttft_ms)
    conversation.close()


def over_http(url: str, chat: int, turns: int, tokens: int) -> Iterator[Turn]:
    """One chat with a server."""
    messages = [{"role": "system", "content": f"You tell story number {chat} in few words."}]
    with httpx.Client(timeout=300) as client:
        for turn in range(turns):
            messages.append({"role": "user", "content": question(chat, turn)})
            body = {
                "messages": messages, "max_tokens": tokens, "ignore_eos": True, "temperature": 0.7, "seed": turn,
                "stream": True, "stream_options": {"include_usage": True},
            }  # fmt: skip
            first, text, usage, began = 0.0, "", {}, time.perf_counter()
            with client.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
                for line in reply.iter_lines():
                    if not line.startswith("data: {"):
                        continue
                    first = first or time.perf_counter()
                    event = json.loads(line[6:])
                    usage = event["usage"] or {}
                    text += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            messages.append({"role": "assistant", "content": text})
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            yield Turn(usage["prompt_tokens"], cached, usage["completion_tokens"], 1000 * (first - began))


def graph_alone(decoder: Decoder, chat: list[Turn]) -> list[float]:
    """Milliseconds that the graph takes for what each turn of a chat read, behind what it found."""
    found, tokens = [], [5 + number % 200 for number in range(chat[-1].prompt)]
    with decoder.start(expected=len(tokens)) as session:
        [row] = session.add()
        for turn in chat:
            if turn.cached > session.length(row):
                session.extend({row: tokens[session.length(row) : turn.cached]})
            began = time.perf_counter()
            session.extend({row: tokens[turn.cached : turn.prompt]})
            found.append(1000 * (time.perf_counter() - began))
    return found


def reread(chat: list[Turn]) -> int:
    """Tokens that were in the cache when a turn began, and were read again."""
    held = [turn.prompt + turn.written - 1 for turn in chat]
    return sum(max(0, before - turn.cached) for before, turn in zip(held[:-1], chat[1:], strict=True))


def summed(chats: list[list[Turn]], graphs: list[list[float]]) -> dict[str, object]:
    """What the chats of one kind show, beside the graph alone."""
    alone = [round(statistics.median(times), 1) for times in zip(*graphs, strict=True)]
    ttft = [round(statistics.median(turn.ttft_ms for turn in turns), 1) for turns in zip(*chats, strict=True)]
    ratios = [chat[-1].ttft_ms / chat[1].ttft_ms for chat in chats]
    read = [[turn.prompt - turn.cached for turn in chat] for chat in chats]
    return {
        "reread": sum(map(reread, chats)), "read_per_turn": read[0], "prompt_tokens_at_last": chats[0][-1].prompt,
        "ttft_ms": ttft, "last_to_second": round(statistics.median(ratios), 3),
        "graph_ms": alone, "graph_last_to_second": round(statistics.median(g[-1] / g[1] for g in graphs), 3),
    }  # fmt: skip


def main() -> None:
    """Hold the chats, in turn, and say what they show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--chats", type=int, default=5)
    given = parser.parse_args()
    good = True
    for package in given.packages:
        decoder = load(package)
        assert isinstance(decoder, Decoder), f"{package} is an encoder"
        found: dict[str, list[list[Turn]]] = {"in process": [], "over HTTP": []}
        graphs: list[list[float]] = []
        with ServerProcess([f"chat={package}"]) as server:
            for chat in range(given.chats + 1):
                here = list(in_process(decoder, chat, given.turns, given.tokens))
                there = list(over_http(server.url, chat, given.turns, given.tokens))
                alone = graph_alone(decoder, here)
                if chat:  # the first one warms up
                    graphs.append(alone)
                    found["in process"].append(here)
                    found["over HTTP"].append(there)
        told = {how: summed(chats, graphs) for how, chats in found.items()}
        for how, figures in told.items():
            held = figures["reread"] == 0 and float(str(figures["last_to_second"])) <= SLOWER
            good = good and held
            print(f"{'held' if held else 'FAILED'}  {package}, {how}: {figures}", file=sys.stderr)
        print(json.dumps({"package": package, "chats": given.chats, "tokens": given.tokens, **told}))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
