"""Sounds over HTTP by OpenAI's own client, and forms that are refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from server_toys import Running
from speech_toys import TIMES, Scripted, transcriber, wav

from roundexport.runtime.scheduler import FullError
from roundexport.runtime.server.errors import ApiError
from roundexport.runtime.server.models import Models
from roundexport.runtime.server.multipart import parts_of
from roundexport.runtime.server.settings import ServerSettings
from roundexport.runtime.server.speech_model import SpeechModel
from roundexport.runtime.speech.results import SpeechSettings

TONE = wav(np.sin(np.arange(8000) / 5) * 0.5, rate=8000)
"""A second."""


@pytest.fixture(scope="module")
def hearing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    package = transcriber(tmp_path_factory.mktemp("speech"), Scripted([[TIMES, 40, 41, TIMES + 50]]))
    settings = ServerSettings(port=0, drain_s=5.0, max_upload=100_000, max_sound_s=3.0)
    found = Running(Models([SpeechModel("hears", package, {"target": "onnx"}, 4)]), settings)
    yield found
    found.stop()


@pytest.fixture(scope="module")
def client(hearing: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=hearing.v1, api_key="unused", max_retries=0) as found:
        yield found


def test_openais_client_gets_words_and_times(hearing: Running, client: openai.OpenAI, tmp_path: Path) -> None:
    words = transcriber(tmp_path, Scripted([[40, 41]])).tokenizer.decode([40, 41])
    plain = client.audio.transcriptions.create(model="hears", file=("a.wav", TONE), language="en")
    assert plain.text == words.strip()
    told = client.audio.transcriptions.create(
        model="hears", file=("a.wav", TONE), response_format="verbose_json", timestamp_granularities=["segment"]
    )
    assert (told.text, told.language, told.duration) == (words.strip(), "de", 1.0)
    assert told.segments is not None
    (piece,) = told.segments
    assert (piece.id, piece.start, piece.end, piece.text, piece.tokens, piece.seek) == (0, 0.0, 1.0, words, [40, 41], 0)
    subtitles = client.audio.transcriptions.create(model="hears", file=("a.wav", TONE), response_format="srt")
    assert "00:00:00,000 --> 00:00:01,000" in str(subtitles)
    where, form = f"{hearing.v1}/audio/translations", {"response_format": "text"}
    assert hearing.client.post(where, data=form, files={"file": ("a.wav", TONE)}).text.strip() == words.strip()


@pytest.mark.parametrize(
    ("fields", "file", "status", "said"),
    [
        ({}, ("a.mp3", b"ID3" + bytes(50)), 400, "a.mp3: not a WAV file, it is MP3"),
        ({}, None, 400, "send a WAV file as the part file"),
        ({"language": "fr"}, ("a.wav", TONE), 400, "it knows en, de"),
        ({"temperature": "0.5"}, ("a.wav", TONE), 400, "temperature"),
        ({"temperature": "warm"}, ("a.wav", TONE), 400, "must be a number"),
        ({"stream": "true"}, ("a.wav", TONE), 400, "do not stream"),
        ({"timestamp_granularities[]": "word"}, ("a.wav", TONE), 400, "may be segment"),
        ({"response_format": "html"}, ("a.wav", TONE), 400, "one of json"),
        ({"colour": "red"}, ("a.wav", TONE), 400, "unrecognized request argument: colour"),
        ({"model": "other"}, ("a.wav", TONE), 404, "there are: hears"),
        ({}, ("a.wav", wav(np.zeros(8000 * 4), rate=8000)), 400, "may have 3 seconds here, this one has 4"),
        ({}, ("a.wav", bytes(200_000)), 413, "100000 bytes"),
    ],
)  # fmt: skip
def test_what_is_not_done_here_is_refused(
    hearing: Running, fields: dict[str, str], file: tuple[str, bytes] | None, status: int, said: str
) -> None:
    sent = {"file": file} if file else {"language": (None, "en")}
    found = hearing.client.post(f"{hearing.v1}/audio/transcriptions", data=fields, files=sent)
    assert (found.status_code, said in found.json()["error"]["message"]) == (status, True), found.text


def test_only_forms_are_taken_and_only_from_here(hearing: Running) -> None:
    where = f"{hearing.v1}/audio/transcriptions"
    assert hearing.client.post(where, json={"model": "hears"}).status_code == 415
    foreign = {"origin": "http://elsewhere.example"}
    assert hearing.client.post(where, files={"file": ("a.wav", TONE)}, headers=foreign).status_code == 403
    assert hearing.client.post(f"{hearing.v1}/chat/completions", files={"file": TONE}).status_code == 415
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    assert (
        "gives transcripts of speech, not text"
        in hearing.post("chat/completions", {**chat, "model": "hears"}).json()["error"]["message"]
    )
    assert hearing.client.get(f"{hearing.url}/openapi.json").json()["paths"]["/v1/audio/transcriptions"]
    assert hearing.client.get(f"{hearing.v1}/models").json()["data"][0]["task"] == "transcribe"


FIELD = b"---x y\r\nContent-Disposition: form-data; name=a\r\n"
KIND = 'multipart/form-data; boundary="-x y"'


def test_a_form_is_taken_apart() -> None:
    body = (
        b'--- x\r\n---x y\r\nContent-Disposition: form-data; name="file"; filename="a b.wav"\r\n'
        b"Content-Type: audio/wav\r\n\r\n\r\n--\x00\r\n---x z\r\n---x y\r\ncontent-disposition: form-data; name=model"
        b"\r\n\r\nme\r\n---x y--\r\nafterwards"
    )
    file, model = parts_of(KIND, body)
    assert (file.name, file.file, file.data) == ("file", "a b.wav", b"\r\n--\x00\r\n---x z")
    assert (model.name, model.file, model.text()) == ("model", None, "me")


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=" + "a" * 71, b""),
        (KIND, b""),
        (KIND, b'---x y\r\nContent-Disposition: form-data; name="a"\r\n\r\ncut'),
        (KIND, b"---x y\r\nContent-Disposition: form-data\r\n\r\nno name\r\n---x y--"),
        (KIND, b"---x y\r\nContent-Disposition: attachment; name=a\r\n\r\n\r\n---x y--"),
        (KIND, b"---x y\r\n\r\n\r\n---x y--"),
        (KIND, FIELD + b"Content-Transfer-Encoding: base64\r\n\r\n\r\n---x y--"),
        (KIND, b"---x y\r\nx: " + b"a" * 5000 + b"\r\n\r\n\r\n---x y--"),
        (KIND, (FIELD + b"\r\n\r\n") * 40 + b"---x y--"),
    ],
)  # fmt: skip
def test_broken_forms_are_refused(kind: str, body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parts_of(kind, body)
    assert caught.value.status == 400


def test_a_client_that_leaves_ends_the_work(tmp_path: Path) -> None:
    backend = Scripted([[40] * 59])
    backend.slow_s = 0.01
    model = SpeechModel("hears", transcriber(tmp_path, backend), {}, 1)

    async def leave() -> None:
        work = asyncio.ensure_future(model.transcribe(TONE, "a.wav", SpeechSettings("en"), 60.0))
        while not backend.prompts:
            await asyncio.sleep(0.001)
        with pytest.raises(FullError):
            await model.transcribe(TONE, "b.wav", SpeechSettings("en"), 60.0)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)

    asyncio.run(leave())
    model.close(0)
    assert model.busy() == 0 and backend.steps < 40
