"""The verb `transcribe`: what is said in WAV files, by a speech package."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from roundexport.errors import UnsupportedError

from . import printing
from .shared_options import Engine, Json, Properties, RuntimeDevice, Threads, named_values

if TYPE_CHECKING:
    from roundexport.runtime.speech.results import Segment


def transcribe(  # noqa: PLR0913, PLR0917
    package: Path,
    sounds: Annotated[list[Path], typer.Argument(metavar="WAV…", help="WAV files; any rate and number of channels.")],
    language: Annotated[
        str | None, typer.Option(help="What is spoken: en, de, …; default: the model's, or what it hears.")
    ] = None,
    task: Annotated[Literal["transcribe", "translate"], typer.Option(help="translate: into English.")] = "transcribe",
    timestamps: Annotated[bool, typer.Option("--timestamps", help="Say when each piece begins and ends.")] = False,
    subtitles: Annotated[Literal["srt", "vtt"] | None, typer.Option(help="Print subtitles instead.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Text that came before, or names to spell right.")] = None,
    engine: Engine = "auto",
    device: RuntimeDevice = "CPU",
    threads: Threads = None,
    properties: Properties = None,
    json: Json = False,
) -> None:
    """Write down what is said in WAV files; needs neither torch nor transformers."""
    from roundexport.runtime import FrameTranscriber, SpeechSettings, Transcriber, load
    from roundexport.runtime.speech.subtitles import srt, vtt

    settings = SpeechSettings(language, task, timestamps or subtitles is not None, prompt)
    told = named_values(properties, "--property")
    opened = load(package, engine=engine, device=device, threads=threads, properties=told)
    if not isinstance(opened, Transcriber | FrameTranscriber):
        raise UnsupportedError(f"{package} does not hear; its task is {opened.manifest.task}, not transcribe or ctc")
    streams = timestamps and subtitles is None and not json
    found = []
    for sound in sounds:
        transcript = opened.transcribe(sound, settings, on_segment=_line if streams else None)
        found.append({"file": str(sound), **asdict(transcript)})
        if json or streams:
            continue
        if subtitles is not None:
            printing.piece((srt if subtitles == "srt" else vtt)(transcript.segments))
        else:
            printing.line(transcript.text)
    if json:
        printing.document(found[0] if len(found) == 1 else found)


def _line(segment: Segment) -> None:
    printing.line(f"{segment.start:7.2f} to {segment.end:7.2f}  {segment.text.strip()}")
