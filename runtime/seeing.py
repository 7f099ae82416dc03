"""A decoder that reads pictures: vision graph, then their features among the vectors of the prompt's tokens.

    picture ─ tiles ─ vision graph ─ features [T, H] ─ numbers of rows (token_rows.py)
    message ─ chat template ─ "<image>" of each picture ─ its words (picture_words.py) ─ token ids, with those numbers

A picture is known by the sha256 of its bytes: looked at again, as every turn of a chat does, it is not computed again,
and a prompt that begins with the same pictures and words goes on from what the cache holds.

Limits: texts of a repetition penalty are the prompt's tokens alone; a picture is none.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from roundexport.errors import ArtifactError, UsageError
from roundexport.formats.package import PackageManifest, vision_manifest
from roundexport.storage.paths import ListedFiles

from .chat_template import Message
from .generation import Decoder
from .image_package import ImageEncoder
from .images import FILE, Picture, bytes_of, size_unit
from .picture_words import words_of
from .tiles import read_tiling
from .token_rows import Grid, TokenRows
from .tokenizer import read_json
from .types import DecoderBackend, EncoderBackend, Floats

if TYPE_CHECKING:
    from .prompt_memory import PromptMemory

_KNOWN = 4096  # words that are kept; features leave before them
_AT_A_TIME = 4  # tiles of one run


class SeeingDecoder(Decoder):
    """A decoder package that reads pictures.

    Args:
        backend: the opened graph of the language model, whose ``token_rows`` make the vectors it reads.
        manifest: the package's description.
        folder: the package's folder.
        vision: the opened graph that reads pictures.

    Raises:
        ArtifactError: the package does not say how pictures are read.
        UnsupportedError: pictures of such a model are not read here.

    Attributes:
        tiling: what makes a picture's pixels.
    """

    sees = True

    def __init__(
        self, backend: DecoderBackend, manifest: PackageManifest, folder: Path, vision: EncoderBackend
    ) -> None:
        super().__init__(backend, manifest, folder)
        files = ListedFiles(folder, manifest.files)
        own = vision_manifest(manifest)
        if own is None:
            raise ArtifactError(f"{folder}: its manifest does not describe a vision graph")
        self._vision = ImageEncoder(vision, own, folder)
        self._rows = cast(TokenRows, backend.token_rows)  # type: ignore[attr-defined]
        config = read_json(files.find("config.json"))
        found = config.get("image_token_id", config.get("image_token_index"))
        if not isinstance(found, int) or not 0 <= found < manifest.vocab_size:
            raise ArtifactError(f"{folder}: its config.json names no image_token_id in the vocabulary")
        self._image_id = found
        self._words_of = words_of(str(config.get("model_type")))
        prepared = read_json(files.find(FILE))
        self.tiling = read_tiling(prepared, str(folder / FILE))
        self._unit = size_unit(prepared)
        self._words: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def token_limit(self) -> int:
        """Numbers of prompts are below this: tokens, and rows of pictures."""
        return self._rows.end

    @property
    def _image(self) -> str:
        """Text of the token that stands for a row of a picture."""
        return str(self.tokenizer.raw.id_to_token(self._image_id))

    def hold(self, prompt: Sequence[int]) -> Callable[[], None]:
        """Keep a prompt's pictures until the function that is returned is called.

        Raises:
            UsageError: one is not kept any more.
        """
        return self._rows.hold(prompt)

    def see(self, pictures: Sequence[Picture]) -> list[Message]:
        """Read pictures; returns for each the part of a message that stands for it.

        Raises:
            UsageError: one cannot be read.
        """
        return [{"type": "image", "image": self._seen(picture)} for picture in pictures]

    def _seen(self, picture: Picture) -> str:
        values = bytes_of(picture)
        key = hashlib.sha256(f"{values.shape}".encode() + values.tobytes()).hexdigest()
        if key in self._words and self._rows.numbers(key) is not None:
            return key
        tiles = self.tiling(values)
        features = self._vision.hidden(tiles.pixels, _AT_A_TIME)
        words = self._words_of(tiles.rows, tiles.columns, features.shape[1], self._image)
        with self._lock:
            self._words[key] = words
            while len(self._words) > _KNOWN:
                self._words.popitem(last=False)
        self._rows.add(key, features.reshape(-1, features.shape[-1]), self._grid(tiles.pixels))
        return key

    def _grid(self, pixels: Floats) -> Grid | None:
        """Rows and columns of the features of a picture of any size."""
        return None if self._unit is None else (pixels.shape[2] // self._unit, pixels.shape[3] // self._unit)

    def encode(self, text: str, *, chat: bool = False, pictures: Sequence[Picture] = ()) -> list[int]:
        """Token ids of a prompt, and numbers of rows where its pictures are.

        Args:
            text: a text, in which the image token stands for each picture; where none does they go in front.
            chat: wrap it as a user's message in the chat template.
            pictures: files, Pillow images, or arrays [height, width, 3] of bytes.

        Raises:
            UsageError: a picture cannot be read, or the text has another number of image tokens.
        """
        parts = self.see(pictures)
        if chat:
            messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
            return self.chat_ids(messages, self.chat_text(messages))
        keys = [part["image"] for part in parts]
        if self._image not in text:
            text = self._image * len(keys) + text
        return self._placed(self.tokenizer.encode(self._expanded(text, keys)), keys)

    def chat_text(self, messages: Sequence[Message], /, **variables: Any) -> str:
        """A conversation as text, pictures as their words."""
        source = self.tokenizer.template_source(tools=variables.get("tools") is not None) or ""
        if "type" in source:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                if isinstance(message.get("content"), str)
                else message
                for message in messages
            ]
        return self._expanded(self.tokenizer.chat_prompt(messages, **variables), _keys(messages))

    def chat_ids(self, messages: Sequence[Message], text: str, memory: PromptMemory | None = None) -> list[int]:
        """Token ids of a conversation, and numbers of rows where its pictures are."""
        return self._placed(super().chat_ids(messages, text, memory), _keys(messages))

    def _expanded(self, text: str, keys: Sequence[str]) -> str:
        between = text.split(self._image)
        if len(between) != len(keys) + 1:
            raise UsageError(
                f"the prompt has {len(between) - 1} image tokens ({self._image}) and {len(keys)} pictures were given"
            )
        gone = [key for key in keys if key not in self._words]
        if gone:
            raise UsageError("a picture of this prompt is not kept any more; send it again")
        return between[0] + "".join(self._words[key] + rest for key, rest in zip(keys, between[1:], strict=True))

    def _placed(self, ids: Sequence[int], keys: Sequence[str]) -> list[int]:
        """Ids with the numbers of pictures' rows in the place of image tokens, or of rows of other pictures."""
        ranges = [self._rows.numbers(key) for key in keys]
        if None in ranges:
            raise UsageError("a picture of this prompt is not kept any more; send it again")
        numbers = [number for found in ranges for number in found or ()]
        given, vocabulary = iter(numbers), self.manifest.vocab_size
        places = [token == self._image_id or token >= vocabulary for token in ids]
        if sum(places) != len(numbers):
            raise UsageError(f"the prompt has {sum(places)} places for {len(numbers)} rows of pictures")
        return [next(given) if place else token for token, place in zip(ids, places, strict=True)]


def _keys(messages: Sequence[Message]) -> list[str]:
    """Keys of the pictures of a conversation, in order."""
    parts = [part for message in messages if isinstance(message.get("content"), list) for part in message["content"]]
    return [part["image"] for part in parts if part.get("type") == "image"]
