"""The opened packages of a server, by name: a scheduler for each decoder, a thread for each of the others.

A package is called like its folder, or, where the folder only says the target (``out/onnx``), like the folder above and
it (``out-onnx``); ``NAME=FOLDER`` calls it something else.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np

from roundexport.errors import UnsupportedError, UsageError
from roundexport.runtime.classifying import Classifier
from roundexport.runtime.embedding import Encoder
from roundexport.runtime.generation import Decoder
from roundexport.runtime.loading import load
from roundexport.runtime.prompt_memory import PromptMemory
from roundexport.runtime.scheduler import FullError, Scheduler
from roundexport.runtime.text_package import TextPackage
from roundexport.runtime.tokenizer import Tokenizer, read_json
from roundexport.runtime.transcription import Transcriber
from roundexport.runtime.types import Floats
from roundexport.runtime.vendor_loop import LoopDecoder
from roundexport.storage.paths import ListedFiles

from .card import card
from .errors import ApiError, refused
from .settings import ServerSettings
from .speech_model import SpeechModel
from .token_texts import TokenTexts
from .wishes import defaults_of

_LOG = logging.getLogger("roundexport.server")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_TARGETS = ("onnx", "openvino")
_TEXTS = 16  # of one run of an encoder; others take turns between runs
Types = Sequence[Sequence[int]] | None
Run = Callable[[Sequence[Sequence[int]], int, Types], Floats]


@dataclass(frozen=True)
class DecoderModel:
    """A decoder in service.

    Args:
        name: what requests call it.
        decoder: the package.
        scheduler: writes its answers.
        defaults: how it is sampled where a request does not say.
        texts: texts of its single tokens.
        memory: of chats, so that a turn goes on from the very tokens of the turn before.
        card: what the page shows of it.
        longest: bytes of the longest token.
    """

    name: str
    decoder: Decoder
    scheduler: Scheduler
    defaults: Mapping[str, float]
    texts: TokenTexts
    memory: PromptMemory
    card: dict[str, Any]
    longest: int

    task = "generate"
    gives: ClassVar[str] = "text"

    @property
    def tokenizer(self) -> Tokenizer:
        """The package's tokenizer."""
        return self.decoder.tokenizer

    @property
    def max_context(self) -> int:
        """Longest sequence, prompt and answer together."""
        return self.decoder.manifest.max_context

    @property
    def alive(self) -> bool:
        """Whether its engine's thread runs."""
        return self.scheduler.alive

    def busy(self) -> int:
        """Answers waiting or being written."""
        load_now = self.scheduler.load
        return load_now.waiting + load_now.writing

    def close(self, wait_s: float) -> None:
        """End its thread."""
        self.scheduler.close(wait_s)


P = TypeVar("P", bound=TextPackage)


@dataclass(frozen=True)
class TextModel(Generic[P]):
    """A package without a cache in service; its runs take place in a thread of its own, one after another.

    Args:
        name: what requests call it.
        package: the package.
        card: what the page shows of it.
        longest: bytes of the longest token.
        queue: runs waiting, at most.
    """

    name: str
    package: P
    card: dict[str, Any]
    longest: int
    queue: int
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "roundexport-encoder"))
    _requests: set[object] = field(default_factory=set)

    alive: ClassVar[bool] = True  # a pool's thread outlives what fails in it

    @property
    def task(self) -> str:
        """The package's."""
        return self.package.manifest.task

    @property
    def tokenizer(self) -> Tokenizer:
        """The package's tokenizer."""
        return self.package.tokenizer

    @property
    def max_context(self) -> int:
        """Longest text in tokens."""
        return self.package.max_length

    def busy(self) -> int:
        """Requests waiting or being computed."""
        return len(self._requests)

    async def _in_turns(self, run: Run, ids: Sequence[Sequence[int]], types: Types) -> list[Floats]:
        """What runs give for token ids, in their order; leaves after the current run when it is cancelled.

        Raises:
            FullError: too many requests are waiting.
        """
        if len(self._requests) >= self.queue:
            raise FullError(len(self._requests), 1)
        mark = object()
        self._requests.add(mark)
        try:
            order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
            found: dict[int, Floats] = {}
            for start in range(0, len(order), _TEXTS):
                chosen = order[start : start + _TEXTS]
                rows = [ids[i] for i in chosen]
                kinds = [types[i] for i in chosen] if types else None
                loop = asyncio.get_running_loop()
                vectors = await loop.run_in_executor(self._thread, run, rows, _TEXTS, kinds)
                found |= dict(zip(chosen, vectors, strict=True))
            return [found[i] for i in range(len(ids))]
        finally:
            self._requests.remove(mark)

    def close(self, wait_s: float) -> None:
        """End its thread, after the run that it is in."""
        self._thread.shutdown(wait=True, cancel_futures=True)


class EncoderModel(TextModel[Encoder]):
    """A package that gives vectors, in service."""

    gives: ClassVar[str] = "embeddings"

    @property
    def encoder(self) -> Encoder:
        """The package."""
        return self.package

    async def embed(self, ids: Sequence[Sequence[int]], types: Types) -> list[Floats]:
        """Vectors of token ids, in their order.

        Raises:
            FullError: too many requests are waiting.
        """
        return await self._in_turns(self.package.embed_ids, ids, types)


class ClassifierModel(TextModel[Classifier]):
    """A package that says how relevant documents are, in service."""

    gives: ClassVar[str] = "scores"

    async def relevance(self, ids: Sequence[Sequence[int]], types: Types) -> list[float]:
        """Scores of pairs of a query and a document, in their order.

        Raises:
            FullError: too many requests are waiting.
            UnsupportedError: the model has several labels.
        """
        self.package.relevance(np.zeros((1, len(self.package.labels)), np.float32))  # refuses before any run
        logits = await self._in_turns(self.package.logits_of_ids, ids, types)
        return [float(score) for score in self.package.relevance(np.stack(logits))]


Model = DecoderModel | EncoderModel | ClassifierModel | SpeechModel
M = TypeVar("M", bound=Model)


class Models:
    """The packages of a server.

    Args:
        models: at least one, names differing.
    """

    def __init__(self, models: Sequence[Model]) -> None:
        self._models = {model.name: model for model in models}

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def named(self, name: str) -> Model:
        """The model of that name.

        Raises:
            ApiError: 404, with the names that there are.
        """
        if name not in self._models:
            known = ", ".join(self._models)
            raise ApiError(
                404, f"the model {name[:100]!r} is not here; there are: {known}", param="model", code="model_not_found"
            )
        return self._models[name]

    def decoder(self, name: str | None) -> DecoderModel:
        """The decoder of that name; the only one where the request names none.

        Raises:
            ApiError: there is none of that name, it is an encoder, or several could be meant.
        """
        return self._chosen(DecoderModel, name, "gives {gives}, not text")

    def encoder(self, name: str | None) -> EncoderModel:
        """The encoder of that name; the only one where the request names none.

        Raises:
            ApiError: there is none of that name, it is a decoder, or several could be meant.
        """
        return self._chosen(EncoderModel, name, "gives {gives}; it gives no embeddings")

    def reranker(self, name: str | None) -> ClassifierModel:
        """The model of that name that ranks documents; the only one where the request names none.

        Raises:
            ApiError: there is none of that name, it does not rank, or several could be meant.
        """
        return self._chosen(ClassifierModel, name, "does not rank documents; cross-encoders do")

    def speech(self, name: str | None) -> SpeechModel:
        """The model of that name that writes down speech; the only one where the request names none.

        Raises:
            ApiError: there is none of that name, it does not hear, or several could be meant.
        """
        return self._chosen(SpeechModel, name, "does not hear; packages whose task is transcribe do")

    def _chosen(self, kind: type[M], name: str | None, otherwise: str) -> M:
        """The model of that kind and name; ``otherwise``: what is said of one of another kind."""
        if name is None:
            found = [model for model in self if isinstance(model, kind)]
            if len(found) != 1:
                raise refused(f"name a model; there are: {', '.join(self._models)}", "model")
            return found[0]
        named = self.named(name)
        if not isinstance(named, kind):
            raise refused(f"the model {named.name!r} {otherwise.format(gives=named.gives)}", "model")
        return named

    def close(self, wait_s: float = 0) -> None:
        """End all threads; answers not finished after so many seconds are dropped."""
        for model in self:
            model.close(wait_s)


def split_name(given: str) -> tuple[str, Path]:
    """Name and folder of ``NAME=FOLDER`` or ``FOLDER``.

    Raises:
        UsageError: the name has letters that a model's name cannot have.
    """
    name, found, folder = given.partition("=")
    if found and not Path(given).exists():
        path = Path(folder)
    else:
        path = Path(given)
        whole = path.resolve()
        name = f"{whole.parent.name}-{whole.name}" if whole.name in _TARGETS and whole.parent.name else whole.name
        name = re.sub(r"[^A-Za-z0-9._-]", "-", name).strip("-._") or "model"
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} cannot be a model's name; use letters, digits, dot, dash and underscore")
    return name, path


def open_models(
    packages: Sequence[str],
    settings: ServerSettings,
    *,
    engine: str = "auto",
    device: str = "CPU",
    threads: int | None = None,
    properties: Mapping[str, str] | None = None,
) -> Models:
    """Open packages for a server.

    Args:
        packages: ``FOLDER`` or ``NAME=FOLDER`` of each.
        settings: rows and queue of each.
        engine: see `load`.
        device: see `load`.
        threads: see `load`.
        properties: see `load`.

    Raises:
        UsageError: no package, or two of one name.
        ArtifactError: a package is damaged.
        UnsupportedError: an engine is missing, or a vendor's loop, which admits no rows (decision 0021).
    """
    named = [split_name(package) for package in packages]
    if not named:
        raise UsageError("give at least one package to serve")
    twice = sorted({name for name, _ in named if [other for other, _ in named].count(name) > 1})
    if twice:
        raise UsageError(f"two packages are called {twice[0]}; call one of them otherwise: NAME={named[0][1]}")
    found: list[Model] = []
    try:
        for name, folder in named:
            package = load(folder, engine=engine, device=device, threads=threads, properties=properties)
            if isinstance(package, LoopDecoder):
                raise UnsupportedError(
                    f"engine {engine} is its vendor's loop, which admits no rows; serve with engine auto"
                )
            if not isinstance(package, Decoder | Encoder | Classifier | Transcriber):
                raise UnsupportedError(f"{folder}: a package whose task is {package.manifest.task} is not served")
            _LOG.info("%s: %s", name, package.choice)
            found.append(_opened(name, folder, settings, package))
    except BaseException:
        for model in found:
            model.close(0)
        raise
    return Models(found)


def _opened(
    name: str, folder: Path, settings: ServerSettings, package: Decoder | Encoder | Classifier | Transcriber
) -> Model:
    if isinstance(package, Transcriber):
        return SpeechModel(name, package, card(folder, package, {}), settings.queue)
    longest = longest_token(package.tokenizer)
    if isinstance(package, Encoder):
        return EncoderModel(name, package, card(folder, package, {}), longest, settings.queue)
    if isinstance(package, Classifier):
        return ClassifierModel(name, package, card(folder, package, {}), longest, settings.queue)
    config = read_json(ListedFiles(folder, package.manifest.files).find("generation_config.json"))
    defaults = defaults_of(config, str(folder / "generation_config.json"))
    scheduler = Scheduler(package, rows=settings.rows, queue=settings.queue, cache_tokens=settings.cache_tokens)
    texts, memory = TokenTexts(package.tokenizer), PromptMemory(package.tokenizer)
    return DecoderModel(name, package, scheduler, defaults, texts, memory, card(folder, package, defaults), longest)


def longest_token(tokenizer: Tokenizer) -> int:
    """Bytes of the longest text that one token can stand for."""
    return max((len(token.encode("utf-8", "replace")) for token in tokenizer.raw.get_vocab()), default=1)
