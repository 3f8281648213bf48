"""What clients of OpenAI's routes send: its fields, and those that vLLM's clients send besides.

A field that nobody knows is refused, as OpenAI does: misspelt, it would be left out in silence. A field that is null is a
field left out, whatever its name: many clients send all that they know of so.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request as HttpRequest
from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, field_validator, model_validator

from weft.serve.requests.request import MAX_LOGPROBS
from weft.serve.server.errors import FieldError, HttpError
from weft.serve.server.openai.messages import Message, read_messages
from weft.serve.server.openai.tools import Choice, Tool, read_choice, read_tools

INT64 = 2**63
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]

Prompt = list[str] | list[list[int]]
Messages = Annotated[list[Message], PlainValidator(read_messages)]


class Table(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _left_out(cls, value: Any) -> Any:
        return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value


class Body(Table):
    model: str | None = None
    user: Any = None


class StreamOptions(Table):
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's: what there is so far, in every event
    include_obfuscation: bool = False


class JsonSchema(Table):
    name: str = "answer"
    description: str | None = None
    form: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Table):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Table):
    """vLLM's: one of them."""

    form: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class Generation(Body):
    """What completions and chats have in common."""

    max_tokens: Annotated[int, Field(ge=0)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None  # the same, and goes before it
    temperature: float = 1.0
    top_p: float = 1.0
    n: Annotated[int, Field(ge=1)] = 1
    stop: list[str] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[Int32, float] = {}
    response_format: ResponseFormat | None = None
    # vLLM's
    top_k: Int32 | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: list[Int32] = []
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    add_special_tokens: bool = True
    prompt_logprobs: Logprobs | None = None
    return_token_ids: bool = False
    priority: Int32 = 0
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    # weft's
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = None

    @field_validator("stop", mode="plain")
    @classmethod
    def _stop(cls, value: Any) -> list[str]:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise ValueError("must be a text or a list of texts")
        return stops


class CompletionBody(Generation):
    prompt: Any  # Prompt, and whether it was one of several
    suffix: str | None = None
    echo: bool = False
    logprobs: Logprobs | None = None
    best_of: Annotated[int, Field(ge=1)] | None = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompt(cls, value: Any) -> Prompt:
        if isinstance(value, str):
            return [value]
        if isinstance(value, list) and value:
            if all(isinstance(one, str) for one in value):
                return value
            if all(type(one) is int for one in value):
                return [value]
            if all(isinstance(one, list) and all(type(id) is int for id in one) for one in value):
                return value
        raise ValueError("must be a text, a list of texts, a list of token ids, or a list of such lists")


class ChatText(Body):
    """What a chat's template makes a text of, beside the messages."""

    tools: Annotated[list[Tool], PlainValidator(read_tools)] = []
    tool_choice: Annotated[Choice, PlainValidator(read_choice)] = Choice("auto")
    add_generation_prompt: bool | None = None  # vLLM's, as the next one; True, but where the last message goes on
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}


class ChatBody(Generation, ChatText):
    messages: Messages
    logprobs: bool = False
    top_logprobs: Logprobs | None = None
    parallel_tool_calls: bool = True
    # known to OpenAI, and nothing to a model of ours
    metadata: Any = None
    modalities: list[Literal["text"]] | None = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    verbosity: Any = None


class EmbeddingBody(Body):
    input: Any
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = None

    @field_validator("input", mode="plain")
    @classmethod
    def _input(cls, value: Any) -> Prompt:
        return CompletionBody._prompt(value)


class TokenizeBody(ChatText):
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeBody(Body):
    tokens: list[Int32]


Kind = TypeVar("Kind", bound=Body)


async def read(kind: type[Kind], http: HttpRequest) -> Kind:
    """The body of a request.

    Raises:
        HttpError: it is no JSON by its own account: a page elsewhere cannot send one here without asking.
        FieldError: it is not as it must be; the first thing that is not.
    """
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HttpError(415, "send the body as Content-Type: application/json", "unsupported_media_type")
    try:
        return kind.model_validate_json(await http.body())
    except ValidationError as error:
        raise field_error(error) from None


def field_error(error: ValidationError) -> FieldError:
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:200]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        return FieldError(str(cause), cause.param)
    if first["type"] == "extra_forbidden":
        return FieldError(f"Unrecognized request argument supplied: {where}", where)
    if first["type"] == "json_invalid":
        return FieldError(f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')[:200]}", None)
    words = str(cause) if cause is not None else first["msg"]
    return FieldError(f"{where}: {words}" if where else words, where or None)
