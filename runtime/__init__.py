"""Serving packages: `load` opens one, `generate` answers a prompt, `bench` times several.

    engine = load("out/onnx")
    for step in engine.generate(["The sea was"]):
        print(step.text[0], end="")

Imports neither torch nor transformers, and an engine's library only when a package is opened with it.
"""

from __future__ import annotations

from roundexport.runtime.benchmarking.bench import bench
from roundexport.runtime.benchmarking.contestants import Contestant, package_contestant
from roundexport.runtime.benchmarking.report import BenchReport

from .answer_finding import AnswerFinder
from .classifying import Classifier, MaskFiller, TokenClassifier
from .embedding import Encoder
from .frame_transcription import FrameTranscriber
from .generation import Decoder, Generation
from .image_package import ImageClassifier, ImageEncoder
from .loading import load
from .machine import machine_info
from .settings import GenerationSettings
from .speech.results import SpeechSettings, Transcript
from .speech.wav import Sound
from .transcription import Transcriber
from .types import DecoderEngine, EncoderEngine, Step
from .writing import generate

__all__ = [
    "AnswerFinder",
    "BenchReport",
    "Classifier",
    "Contestant",
    "Decoder",
    "DecoderEngine",
    "Encoder",
    "EncoderEngine",
    "FrameTranscriber",
    "Generation",
    "GenerationSettings",
    "ImageClassifier",
    "ImageEncoder",
    "MaskFiller",
    "Sound",
    "SpeechSettings",
    "Step",
    "TokenClassifier",
    "Transcriber",
    "Transcript",
    "bench",
    "generate",
    "load",
    "machine_info",
    "package_contestant",
]
