"""How many words a speech package gets wrong: twenty sentences spoken by espeak-ng, written down by several packages.

    apt install espeak-ng
    python samples/whisper_words.py MODEL PACKAGE…       MODEL is a Hugging Face folder, as of samples/whisper_tiny.py
    python samples/whisper_words.py --speak FOLDER 64    sentences of samples/text/calibration.txt, to tune on

Each sentence is spoken by itself; the column "in one" is all of them in one sound of more than a minute, which is
written window by window.  Words are compared in small letters without punctuation:

    word error rate = (words put in + left out + exchanged, as few as possible) / words of the sentences

``MODEL`` is transformers' own ``generate`` in float32; speed is seconds of speech per second of computing.
"""

import re
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

from roundexport.runtime import Sound, SpeechSettings, Transcriber, load
from roundexport.runtime.speech.resampling import resample
from roundexport.runtime.speech.wav import read_wav
from roundexport.runtime.tokenizer import Tokenizer

SENTENCES = """\
The weather was cold and wet, so we stayed at home and read books all day.
My brother works in a hospital and comes home late in the evening.
Please open the window and let some fresh air into the room.
She bought bread, milk and apples at the small shop on the corner.
We took the train to the city and walked along the river.
The teacher asked the children to be quiet and listen to the story.
He could not remember where he had put the keys to his car.
There is a large garden behind the house with many old trees.
They have been waiting for the bus for more than half an hour.
I would like a cup of coffee with sugar, but without milk.
The meeting begins on Monday morning and ends on Friday afternoon.
Our neighbors have a black dog that likes to sleep in the sun.
If you want to learn a language, you should speak it every day.
The doctor told him to drink more water and to sleep longer.
A strong wind blew from the north and the sea was very rough.
The old man sat on a bench in the park and fed the birds.
Nobody knew the answer, so we had to look for it in the library.
The company opened a new office in London at the end of last year.
After dinner we washed the dishes and watched a film together.
The road to the village is narrow and full of holes.""".splitlines()
RATE = 16_000
_PAUSE_S = 0.5


def speak(sentence: str, voice: str = "en-us") -> Sound:
    """A sentence as espeak-ng says it, 16,000 samples a second."""
    with tempfile.TemporaryDirectory() as aside:
        path = Path(aside) / "said.wav"
        subprocess.run(["espeak-ng", "-v", voice, "-s", "140", "-w", str(path), sentence], check=True)
        return Sound(resample(read_wav(path), RATE), RATE)


def together(sounds: list[Sound]) -> Sound:
    """All of them, one after another."""
    pause = np.zeros(round(_PAUSE_S * RATE), np.float32)
    return Sound(np.concatenate([part for one in sounds for part in (one.samples, pause)]), RATE)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z']+|\d+", text.lower())


def errors(said: list[str], heard: list[str]) -> int:
    """Words to put in, leave out or exchange, at least."""
    row = list(range(len(heard) + 1))
    for place, word in enumerate(said, 1):
        before, row[0] = row[0], place
        for column, other in enumerate(heard, 1):
            best = min(row[column] + 1, row[column - 1] + 1, before + (word != other))
            before, row[column] = row[column], best
    return row[-1]


def of_transformers(folder: Path) -> Callable[[Sound], str]:
    """Transformers' own way from sound to words."""
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    heard, words = WhisperFeatureExtractor.from_pretrained(folder), Tokenizer(folder)
    times = model.generation_config.no_timestamps_token_id + 1

    def write(sound: Sound) -> str:
        long = sound.seconds > heard.chunk_length
        inputs = heard(
            sound.samples, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True, truncation=not long,
            padding="longest" if long else "max_length",
        )  # fmt: skip
        ids = model.generate(**inputs, return_timestamps=long)
        return words.decode([token for token in ids[0].tolist() if token < times])

    return write


def of_package(folder: Path) -> Callable[[Sound], str]:
    """The package's way."""
    opened = load(folder)
    if not isinstance(opened, Transcriber):
        raise SystemExit(f"{folder}: not a package for speech")
    settings = SpeechSettings("en")
    return lambda sound: opened.transcribe(sound, settings).text


def speak_to(folder: Path, count: int) -> None:
    """Sentences of the calibration text as WAV files."""
    folder.mkdir(parents=True, exist_ok=True)
    text = (Path(__file__).parent / "text" / "calibration.txt").read_text(encoding="utf-8")
    sentences = [one for one in re.findall(r"[A-Z][a-z ,]{40,140}[.]", text.replace("\n", " "))]
    for number, sentence in enumerate(sentences[:count]):
        sound = np.round(speak(sentence).samples * 32767).astype("<i2")
        with wave.open(str(folder / f"{number:03d}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(RATE)
            file.writeframes(sound.tobytes())


def main() -> None:
    if sys.argv[1] == "--speak":
        speak_to(Path(sys.argv[2]), int(sys.argv[3]))
        return
    model, *packages = map(Path, sys.argv[1:])
    sounds = [speak(sentence) for sentence in SENTENCES]
    long, total = together(sounds), sum(len(words_of(sentence)) for sentence in SENTENCES)
    print(f"{len(SENTENCES)} sentences, {total} words, {sum(one.seconds for one in sounds):.1f} s of speech")
    print(f"{'':44s}{'wrong':>6s}{'rate':>8s}{'in one':>8s}{'speed':>7s}{'MiB':>7s}")
    writers = [(str(model), of_transformers(model)), *((str(one), of_package(one)) for one in packages)]
    for (name, write), folder in zip(writers, (model, *packages), strict=True):
        write(sounds[0])
        began = time.perf_counter()
        heard = [write(sound) for sound in sounds]
        speed = sum(one.seconds for one in sounds) / (time.perf_counter() - began)
        wrong = sum(errors(words_of(a), words_of(b)) for a, b in zip(SENTENCES, heard, strict=True))
        in_one = errors(words_of(" ".join(SENTENCES)), words_of(write(long)))
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 2**20
        print(f"{name[-43:]:44s}{wrong:6d}{wrong / total:8.1%}{in_one / total:8.1%}{speed:7.1f}{size:7.1f}", flush=True)
        for said, got in zip(SENTENCES, heard, strict=True):
            if words_of(said) != words_of(got):
                print(f"    {said}  →  {got.strip()}")


if __name__ == "__main__":
    main()
