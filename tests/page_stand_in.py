"""A stand-in for the server behind the page: answers, refusals and losses on cue, in the forms that the real one uses.

What is asked says what happens: "slowly", "refuse me", "wait for me", "break off", "fail midway", "too long", "code".
To look at the page without a model: ``PYTHONPATH=tests python tests/page_stand_in.py PORT [embed] [loading] [key]``.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from conftest import ROOT

PAGE = ROOT / "runtime" / "server" / "page"
KEY = "a-key-for-tests"
SLOW = 0.1  # seconds between pieces that are to be stopped
BLOCKS = 30
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

CODE = """Here is a function that says whether a number is **prime**. It tries divisors up to the square root:

```python
def is_prime(number: int) -> bool:
    \"\"\"Whether a number has no divisors but 1 and itself.\"\"\"
    if number < 2:
        return False
    if number % 2 == 0:
        return number == 2
    divisor = 3
    while divisor * divisor <= number:  # a divisor above the root comes with one below it
        if number % divisor == 0:
            return False
        divisor += 2
    return True


print([number for number in range(100) if is_prime(number)])
```

How it works:

1. Numbers below two are not prime.
2. Even numbers are settled at once, so that only *odd* divisors are tried.
   - That halves the work.
   - `divisor * divisor <= number` needs no floating point.
3. What no divisor divides is prime.

| n | steps | prime |
|---|---|---|
| 97 | 4 | yes |
| 7919 | 44 | yes |
| 10403 | 50 | no |

> For large numbers, use a probabilistic test such as Miller and Rabin's.

<script>alert("this is text")</script>
"""
PLAIN = (
    "Sunlight is made of all colors, and the molecules of the air scatter the short waves of blue far more than the "
    "long waves of red. So blue light reaches our eyes from every part of the sky, while the other colors mostly come "
    "straight from the sun."
)


def layers(mixed: bool = True) -> list[dict[str, Any]]:
    """Layers as a card tells them: mixed bits, so that the picture has something to show."""
    found: list[dict[str, Any]] = [_layer("model.embed_tokens", 8)]
    for block in range(BLOCKS):
        for row, kind in enumerate(KINDS):
            bits = 4
            if mixed:
                bits = 8 if block in {0, BLOCKS - 1} and row > 3 else 3 if (block * 5 + row * 3) % 11 < 2 else 4
                bits = 2 if kind == "mlp.up_proj" and 11 < block < 19 else bits
            found.append(_layer(f"model.layers.{block}.{kind}", bits))
    return found


def _layer(name: str, bits: int) -> dict[str, Any]:
    return {"name": name, "bits": bits, "group_size": 64, "stored": f"{bits} bits, block 64"}


def decoder(name: str = "smollm2-135m-mixed", **changes: Any) -> dict[str, Any]:
    """A model of /v1/models."""
    card = {
        "task": "generate",
        "target": "onnx",
        "model_type": "llama",
        "source": "SmolLM2-135M-Instruct",
        "calibration": {"source": "sampled from the model at temperature 1", "num_samples": 32, "sample_len": 512},
        "max_context": 8192,
        "pooling": None,
        "bytes": 92041216,
        "layers": layers(),
        "kept_float": [{"name": "lm_head", "why": "tied to the embedding"}],
        "fusions": {"MatMulNBits": 121, "grouped-query attention": 30, "rms norm": 61, "packed qkv": 30},
        "versions": {"torch": "2.13.0", "onnx": "1.23.2"},
        "quality": {
            "text": "bundled text",
            "tokens": 8192,
            "kl": {"mean": 0.0912, "stderr": 0.0029},
            "top1": {"mean": 0.8129, "stderr": 0.0056},
            "perplexity": 35.67,
            "perplexity_float": 32.64,
        },
        "engine": {
            "engine": "ort",
            "library": "onnxruntime",
            "version": "1.31.1",
            "device": "CPU",
            "threads": 2,
            "precision": {"activations": "float32", "matmul": "as the graph says (accuracy_level)"},
        },
        "defaults": {"temperature": 0.2, "top_p": 0.9},
        "chat": True,
        **changes,
    }
    return {"id": name, "object": "model", "created": 0, "owned_by": "roundexport", "card": card}


def encoder() -> dict[str, Any]:
    """An encoder of /v1/models."""
    quality = {"texts": 64, "cosine": {"mean": 0.9931, "stderr": 0.0004}, "rank_correlation": 0.981}
    kinds = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    kinds += ("intermediate.dense", "output.dense")
    own = [_layer(f"encoder.layer.{block}.{kind}", 4) for block in range(6) for kind in kinds]
    return decoder(
        "minilm-l6", task="embed", model_type="bert", layers=own, quality=quality, max_context=512, bytes=23_000_000,
        pooling={"mode": "mean", "normalize": True}, kept_float=[],
    )  # fmt: skip


class StandIn:
    """The application, and what it was asked.

    Args:
        models: what is served.
        key: asked for, if any.
        loading: requests for the models that are told to wait.
        pause: seconds between pieces.
    """

    def __init__(
        self, models: Sequence[dict[str, Any]], *, key: str | None = None, loading: int = 0, pause: float = 0.002
    ) -> None:
        self.models, self.key, self.loading, self.pause = list(models), key, loading, pause
        self.bodies: list[dict[str, Any]] = []
        self.left = 0  # answers whose reader left
        self._refused = 0
        routes = [
            Route("/", lambda _: FileResponse(PAGE / "index.html")),
            Route("/v1/models", self._models),
            Route("/v1/models/{name}", self._model),
            Route("/openapi.json", self._openapi),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/embeddings", self._embeddings, methods=["POST"]),
            Mount("/page", StaticFiles(directory=PAGE)),
        ]
        self.app = Starlette(routes=routes)

    def _stop(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key")
        return None

    async def _models(self, request: Request) -> Response:
        if stop := self._stop(request):
            return stop
        if self.loading > 0:
            self.loading -= 1
            return _error(503, "the package is being opened", "loading")
        listed = [{key: value for key, value in model.items() if key != "card"} for model in self.models]
        return JSONResponse({"object": "list", "data": listed})

    async def _model(self, request: Request) -> Response:
        if stop := self._stop(request):
            return stop
        return JSONResponse(next(model for model in self.models if model["id"] == request.path_params["name"]))

    async def _openapi(self, request: Request) -> Response:
        names = ("temperature", "top_p", "min_p", "max_tokens", "seed", "stop")
        schema = {"properties": {name: {} for name in names}}
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/ChatBody"}}}
        paths = {"/v1/chat/completions": {"post": {"requestBody": {"content": content}}}}
        return JSONResponse({"paths": paths, "components": {"schemas": {"ChatBody": schema}}})

    async def _chat(self, request: Request) -> Response:
        if stop := self._stop(request):
            return stop
        body = await request.json()
        self.bodies.append(body)
        question = body["messages"][-1]["content"]
        if "refuse me" in question:
            return _error(400, "temperature must be finite and not negative", "invalid_value")
        if "too long" in question and len(body["messages"]) > 1:
            return _error(400, "This model's maximum context length is 8192 tokens.", "context_length_exceeded")
        if "wait for me" in question and self._refused < 1:
            self._refused += 1
            headers = {"retry-after": "2"}
            return _error(429, "64 requests are waiting already; try again in 2 s", "queue_full", headers)
        return StreamingResponse(self._pieces(body, question), media_type="text/event-stream")

    async def _pieces(self, body: Mapping[str, Any], question: str) -> AsyncIterator[str]:
        text = CODE if "code" in question or "function" in question else PLAIN
        words, sent = text.split(" "), 0
        most = body.get("max_tokens", 10_000)
        try:
            for at, word in enumerate(words[:most]):
                await asyncio.sleep(SLOW if "slowly" in question else self.pause)
                piece = word if at == 0 else f" {word}"
                yield _event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
                sent += 1
                if at == 12 and "fail midway" in question:
                    yield _event({"error": {"message": "the server failed on this request", "code": "internal_error"}})
                    return
                if at == 12 and "break off" in question:
                    return
            reason = "length" if most < len(words) else "stop"
            yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
            prompt = sum(len(message["content"].split()) for message in body["messages"]) + 9
            usage = {"prompt_tokens": prompt, "completion_tokens": sent, "total_tokens": prompt + sent}
            cached = max(0, prompt - len(question.split()) - 9)
            yield _event({"choices": [], "usage": {**usage, "prompt_tokens_details": {"cached_tokens": cached}}})
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.left += 1
            raise

    async def _embeddings(self, request: Request) -> Response:
        if stop := self._stop(request):
            return stop
        body = await request.json()
        self.bodies.append(body)
        data = [{"index": at, "embedding": _letters(text)} for at, text in enumerate(body["input"])]
        return JSONResponse({"object": "list", "data": data})


def _letters(text: str) -> list[float]:
    """A vector that likens texts by the letters they share."""
    return [float(text.lower().count(chr(code))) + 0.1 for code in range(97, 123)]


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _error(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "code": code}}, status, headers)


@contextmanager
def served(app: StandIn) -> Iterator[str]:
    """The stand-in on a free port, in a thread."""
    import uvicorn

    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app.app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        listening.close()


if __name__ == "__main__":
    import uvicorn

    port, words = int(sys.argv[1]), sys.argv[2:]
    cards = [encoder()] if "embed" in words else [decoder(), decoder("smollm2-135m-4bit", layers=layers(mixed=False))]
    stand_in = StandIn(cards, key=KEY if "key" in words else None, loading=5 if "loading" in words else 0, pause=0.02)
    uvicorn.run(stand_in.app, port=port, log_level="warning")
