"""One prompt answered: opened, written, summed up; with twins, guesses and log-probabilities where they are asked for.

    generate   a package and a prompt                     write   the same with an opened one, several answers if wanted

Twins (``n``) share the reading of their prompt and draw by themselves.  A drafter guesses for an answer that is written
alone, so twins go without.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from roundexport.errors import UnsupportedError, UsageError

from .answer import Answer, Piece
from .batch import Batch, Counts, Drafter
from .drafting import DraftModel, PromptLookup
from .generation import Decoder, Generation
from .images import Picture
from .loading import load
from .settings import GenerationSettings, Grammar
from .types import LENGTH, OnText
from .vendor_loop import LoopDecoder


def generate(  # noqa: PLR0913  (the parameters are the verb's flags)
    package: str | Path,
    prompt: str,
    *,
    chat: bool = False,
    pictures: Sequence[Picture] = (),
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    ignore_eos: bool = False,
    logprobs: int | None = None,
    grammar: Grammar | None = None,
    draft: str | Path | None = None,
    lookup: bool = False,
    engine: str = "auto",
    device: str = "CPU",
    threads: int | None = None,
    on_text: OnText | None = None,
    properties: Mapping[str, str] | None = None,
    draft_properties: Mapping[str, str] | None = None,
) -> Generation:
    """Load a package and answer one prompt.

    Args:
        package: package folder of a decoder.
        prompt: the text to go on from.
        chat: wrap the prompt as a user's message in the package's chat template.
        pictures: what the prompt is about, of a package that reads pictures; see `SeeingDecoder.encode`.
        max_new_tokens: see `GenerationSettings`, as for the next twelve.
        temperature: 0 is greedy.
        top_k: 0 keeps all.
        top_p: 1 keeps all.
        min_p: 0 keeps all.
        repetition_penalty: 1 changes nothing.
        presence_penalty: 0 changes nothing.
        frequency_penalty: 0 changes nothing.
        seed: fixes sampled tokens.
        stop: strings that end the answer.
        ignore_eos: go on after end-of-sequence tokens.
        logprobs: likeliest alternatives to tell with each token.
        grammar: what the answer must look like.
        draft: package folder of a smaller decoder with the same tokens, which guesses ahead; the text stays the same.
        lookup: guess ahead from what stands in the prompt and the answer.
        engine: ``auto``, or an engine's name.
        device: ``CPU``, or one that the engine lists.
        threads: worker threads; None: as `load` chooses.
        on_text: called with every piece of text as it comes.
        properties: what OpenVINO's plugin is told, see `load`.
        draft_properties: the same of the draft package.

    Raises:
        ArtifactError: a package is damaged.
        UnsupportedError: it is an encoder, or its engine is not installed.
        UsageError: a setting is out of range, the prompt does not fit, or the draft package has other tokens.
    """
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty, presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
        seed=seed, stop=tuple(stop), ignore_eos=ignore_eos, logprobs=logprobs, grammar=grammar,
    )  # fmt: skip
    alone = settings if draft is None and not lookup else None
    decoder = load_decoder(package, engine=engine, device=device, threads=threads, request=alone, properties=properties)
    drafter = drafter_for(decoder, draft, lookup, device=device, threads=threads, properties=draft_properties)
    return write(decoder, prompt, settings, chat=chat, pictures=pictures, drafter=drafter, on_text=on_text)[0]


def load_decoder(
    package: str | Path,
    *,
    engine: str = "auto",
    device: str = "CPU",
    threads: int | None = None,
    precise: bool = False,
    request: GenerationSettings | None = None,
    properties: Mapping[str, str] | None = None,
) -> Decoder:
    """Open a package that writes text; see `load`.

    Raises:
        UnsupportedError: it is an encoder.
    """
    decoder = load(
        package, engine=engine, device=device, threads=threads, precise=precise, request=request, properties=properties
    )
    if not isinstance(decoder, Decoder):
        raise UnsupportedError(f"{package} is an encoder: it gives embeddings, not text")
    return decoder


def drafter_for(
    decoder: Decoder,
    draft: str | Path | None,
    lookup: bool,
    *,
    device: str = "CPU",
    threads: int | None = None,
    precise: bool = False,
    properties: Mapping[str, str] | None = None,
) -> Drafter | None:
    """What guesses ahead for a decoder: a draft package, the row itself, or nothing.

    Raises:
        UsageError: both were asked for, or the draft package has other tokens.
    """
    if draft is None and properties:
        raise UsageError("draft_properties are for a draft package; name one as draft")
    if draft is None:
        return PromptLookup() if lookup else None
    if lookup:
        raise UsageError("a draft package and prompt lookup both guess ahead; choose one")
    smaller = load_decoder(draft, device=device, threads=threads, precise=precise, properties=properties)
    if smaller.tokenizer.raw.get_vocab() != decoder.tokenizer.raw.get_vocab():
        raise UsageError(f"{draft} has other tokens than the package that it is to guess for; take one of its family")
    return DraftModel(smaller.backend, smaller.manifest.max_context, vocabulary=decoder.manifest.vocab_size)


def write(
    decoder: Decoder,
    prompt: str,
    settings: GenerationSettings,
    *,
    chat: bool = False,
    pictures: Sequence[Picture] = (),
    n: int = 1,
    drafter: Drafter | None = None,
    on_text: OnText | None = None,
) -> list[Generation]:
    """Answer a prompt with an opened package.

    Args:
        decoder: the package.
        prompt: the text to go on from.
        settings: choice of tokens and end.
        chat: wrap the prompt as a user's message in the chat template.
        pictures: what the prompt is about.
        n: answers to write, drawn independently.
        drafter: guesses ahead, where n is 1.
        on_text: called with every piece of the first answer as it comes.

    Raises:
        UsageError: the prompt does not fit, or n is below 1.
        UnsupportedError: a vendor's loop, and something that it does not have; or pictures, and a package of text.
    """
    if n < 1:
        raise UsageError(f"n must be at least 1, not {n}")
    began = time.perf_counter_ns()
    ids = decoder.encode(prompt, chat=chat, pictures=pictures)
    if isinstance(decoder, LoopDecoder):
        if n > 1 or drafter is not None:
            raise UnsupportedError(
                "a vendor's loop writes one answer, without a drafter; open the package with engine auto for more"
            )
        come: list[Piece] = []
        for piece in decoder.pieces(ids, settings):
            _take(piece, come, on_text)
        return [_summed(come, len(ids), settings, began)]
    answers = [decoder.answer(ids, settings, number) for number in range(n)]
    batch = Batch(decoder.backend, rows=n, expected=len(ids) + answers[0].room, drafter=drafter)
    pieces: dict[Answer, list[Piece]] = {answer: [] for answer in answers}
    try:
        for answer in answers:
            batch.admit(answer)
        while len(batch):
            for answer, piece in batch.advance():
                _take(piece, pieces[answer], on_text if answer is answers[0] else None)
    finally:
        batch.close()
    return [_summed(pieces[answer], len(ids), settings, began, batch.counts) for answer in answers]


def _take(piece: Piece, come: list[Piece], on_text: OnText | None) -> None:
    come.append(piece)
    if on_text is not None and piece.text:
        on_text(piece.text)


def _summed(
    pieces: list[Piece], prompt_tokens: int, settings: GenerationSettings, began: int, counts: Counts | None = None
) -> Generation:
    times = [piece.t_ns for piece in pieces]
    return Generation(
        text="".join(piece.text for piece in pieces),
        tokens=tuple(piece.choice.token for piece in pieces),
        finished=pieces[-1].finished or LENGTH,
        prompt_tokens=prompt_tokens,
        ttft_ms=(times[0] - began) / 1e6,
        tpot_ms=(times[-1] - times[0]) / 1e6 / (len(times) - 1) if len(times) > 1 else None,
        choices=tuple(piece.choice for piece in pieces) if settings.logprobs is not None else (),
        counts=counts,
    )
