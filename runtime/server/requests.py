"""Bodies of requests, decoded and checked in one pass; what they ask for is turned into settings in wishes.py.

Types are strict: ``"1"`` is not a number.  At the top, a key that is not known here is refused, as OpenAI does, because
a misspelled setting that is silently dropped is worse than an error; known keys that only matter to OpenAI's own
service (``user``, ``store``, ``metadata``, …) are accepted and do nothing.  Inside messages and tools further keys are
ignored, because clients send back whatever they once got.

Values of any shape (schemas, a template's variables) may be nested 100 levels, as a package's own files may: what is
deeper would be met by recursion, here, in a grammar or in a template.

Extensions to OpenAI's bodies: ``top_k``, ``min_p``, ``repetition_penalty``, ``ignore_eos``, ``chat_template_kwargs``,
``prompt_name``.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from roundexport.runtime.settings import MOST_LOGPROBS
from roundexport.storage.strict_json import MAX_DEPTH, too_deep

from .errors import ApiError, refused

Body = TypeVar("Body", bound=msgspec.Struct)
Count = Annotated[int, msgspec.Meta(ge=1)]
Whole = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Penalty = Annotated[float, msgspec.Meta(ge=-100, le=100)]
Text = Annotated[str, msgspec.Meta(min_length=1)]
Ids = Annotated[list[Whole], msgspec.Meta(min_length=1)]
Rows = Annotated[list[Text | Whole | Ids], msgspec.Meta(min_length=1)]
_AT = re.compile(r" - at `\$\.?(.*)`$")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")


def _check_depth(name: str, value: dict[str, Any] | None) -> None:
    if value is not None and too_deep(value):
        raise ValueError(f"{name} is nested too deeply; {MAX_DEPTH} levels may be")


class StreamOptions(msgspec.Struct):
    """What a stream tells beside its text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class ImageUrl(msgspec.Struct):
    """Where a picture is: in the request itself, ``data:image/…;base64,…``."""

    url: str


class ContentPart(msgspec.Struct):
    """A part of a message's content: a text, or a picture."""

    type: str
    text: str | None = None
    image_url: ImageUrl | None = None


class Function(msgspec.Struct):
    """The function that a tool is."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        _check_depth("parameters", self.parameters)


class Tool(msgspec.Struct):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class CalledFunction(msgspec.Struct):
    """Name and arguments (JSON) of a call."""

    name: str
    arguments: str = "{}"


class ToolCall(msgspec.Struct):
    """A call that an assistant made before."""

    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"


class Message(msgspec.Struct):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class JsonSchema(msgspec.Struct):
    """A named schema."""

    name: str = ""
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        _check_depth("schema", self.schema)


class ResponseFormat(msgspec.Struct):
    """What an answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class NamedFunction(msgspec.Struct):
    """A function by name."""

    name: str


class NamedTool(msgspec.Struct):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class Choosing(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How tokens are chosen, for chats and completions alike."""

    model: str | None = None
    max_tokens: Whole | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Whole | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Penalty] | None = None
    seed: int | None = None
    stop: Text | list[Text] | None = None
    ignore_eos: bool | None = None
    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class ChatBody(Choosing, kw_only=True):
    """Of ``/v1/chat/completions``."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    reasoning_effort: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def __post_init__(self) -> None:
        _check_depth("chat_template_kwargs", self.chat_template_kwargs)


class CompletionBody(Choosing, kw_only=True):
    """Of ``/v1/completions``."""

    prompt: Text | Rows
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Count | None = None
    suffix: str | None = None


class EmbeddingBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Of ``/v1/embeddings``."""

    input: Text | Rows
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None
    prompt_name: str | None = None
    user: str | None = None


class Document(msgspec.Struct):
    """A document of a ranking; further fields are ignored."""

    text: str


class RerankBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Of ``/v1/rerank``."""

    query: Text
    documents: Annotated[list[str | Document], msgspec.Meta(min_length=1)]
    model: str | None = None
    top_n: Count | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Count | None = None
    user: str | None = None


def decode(data: bytes, kind: type[Body]) -> Body:
    """A body of a kind.

    Raises:
        ApiError: not JSON, too deep, not UTF-8, a key that is not known or missing, or a value of another type; with
            its path.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        text = str(error)
        found = _AT.search(text)
        param = found[1] or None if found else None
        text = text[: found.start()] if found else text
        if unknown := _UNKNOWN.search(text):
            param = f"{param}.{unknown[1]}" if param else unknown[1]
            raise refused(f"unrecognized request argument: {param}", param, "unknown_parameter") from None
        raise refused(f"{param or 'body'}: {text}", param, "invalid_value") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error}", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is JSON, but nested too deeply", code="invalid_json") from None


def rows(given: Text | Rows, param: str) -> list[str] | list[list[int]]:
    """Texts or token ids of a prompt or input in any of OpenAI's four forms.

    Raises:
        ApiError: forms are mixed.
    """
    if isinstance(given, str):
        return [given]
    texts = [one for one in given if isinstance(one, str)]
    lists = [one for one in given if isinstance(one, list)]
    ids = [one for one in given if isinstance(one, int)]
    if len(given) not in (len(texts), len(lists), len(ids)):
        raise refused(f"{param} mixes texts and token ids; give one or the other", param)
    return texts or lists or [ids]
