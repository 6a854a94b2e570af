"""OpenAI's chat as LiteLLM has it, and Ollama's: the request there, the answer back."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import litellm
from litellm import exceptions as litellm_errors
from litellm.constants import DEFAULT_CHAT_COMPLETION_PARAM_VALUES
from litellm.types.utils import Delta, ModelResponseStream, StreamingChoices
from pydantic import BaseModel

from hydra_llm.integrations.litellm.telling import beside_an_answer

__all__ = ["StreamReader", "body_of_chat", "fill_answer"]

_OPENAI = frozenset(DEFAULT_CHAT_COMPLETION_PARAM_VALUES)
_PENALTIES = ("frequency_penalty", "presence_penalty")
_OF_NO_EFFECT = frozenset({"max_retries", "metadata", "stream", "stream_options", "user"})
"""OpenAI's parameters that LiteLLM lets through to providers that do nothing with them."""

# ------------------------------------------------------------------------- request


def body_of_chat(
    model: str, messages: list[Any], params: Mapping[str, Any], *, drop_params: bool
) -> dict[str, Any]:
    """
    Give the body for Ollama's `/api/chat`, as LiteLLM's `ollama_chat/` would send it.

    Args:
        model: without the provider's prefix.
        messages: OpenAI's.
        params: OpenAI's parameters, and Ollama's fields and options by name.
        drop_params: leave out what Ollama has no word for, instead of raising.

    Raises:
        litellm.UnsupportedParamsError: Ollama has no word for one of them.
        litellm.BadRequestError: the messages make no sense.
    """
    config = litellm.OllamaChatConfig()
    openai = {name: value for name, value in params.items() if name in _OPENAI}
    own = {name: value for name, value in params.items() if name not in _OPENAI}
    # Ollama has these two itself; LiteLLM makes `repeat_penalty` of the first, where 0 means
    # something else.
    own |= {name: openai.pop(name) for name in _PENALTIES if name in openai}
    if isinstance(openai.get("stop"), str):
        openai["stop"] = [openai["stop"]]
    if openai.pop("tool_choice", None) == "none":
        openai.pop("tools", None)
    _check(openai, {*config.get_supported_openai_params(model)} - {"functions"}, model, drop_params)
    mapped = config.map_openai_params(openai, {}, model, drop_params)
    messages = [_plain(message) for message in messages]
    try:
        body: dict[str, Any] = config.transform_request(
            model=model,
            messages=messages,
            optional_params={**mapped, **own, "stream": params.get("stream") is True},
            litellm_params={},
            headers={},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        # What the exception says may be a part of the prompt.
        raise litellm_errors.BadRequestError(
            message=f"hydra-llm: these messages are not OpenAI's ({type(exc).__name__})",
            model=model,
            llm_provider="hydra",
        ) from None
    _name_tools(messages, body["messages"])
    return body


def _plain(message: Any) -> Any:
    return message.model_dump(exclude_none=True) if isinstance(message, BaseModel) else message


def _check(openai: dict[str, Any], supported: set[str], model: str, drop_params: bool) -> None:
    if openai.get("n") == 1:
        del openai["n"]
    unsupported = sorted(openai.keys() - supported - _OF_NO_EFFECT)
    if unsupported and not drop_params:
        raise litellm_errors.UnsupportedParamsError(
            message=f"hydra-llm: Ollama does not support parameters: {unsupported}; "
            "drop_params leaves them out",
            model=model,
            llm_provider="hydra",
        )
    for name in unsupported:
        del openai[name]


def _name_tools(messages: list[Any], translated: list[dict[str, Any]]) -> None:
    """Say which tool a result is of: OpenAI tells by the call's id, Ollama by the tool's name."""
    names: dict[Any, str] = {}
    for message, ours in zip(messages, translated, strict=True):
        calls = message.get("tool_calls") or ()
        names |= {call.get("id"): call["function"].get("name") for call in calls}
        if message.get("role") == "tool" and (name := names.get(message.get("tool_call_id"))):
            ours["tool_name"] = name


# -------------------------------------------------------------------------- answer


def fill_answer(answer: Any, document: Mapping[str, Any], model: str) -> None:
    """Fill LiteLLM's `ModelResponse` from a whole answer of Ollama's."""
    message = document.get("message") or {}
    calls = [_call(call, index) for index, call in enumerate(message.get("tool_calls") or ())]
    told = {"reasoning_content": message["thinking"]} if message.get("thinking") else {}
    answer.choices[0].message = litellm.Message(
        role="assistant", content=message.get("content") or "", tool_calls=calls or None, **told
    )
    answer.choices[0].finish_reason = _finish_reason(document, has_called=bool(calls))
    answer.created = int(time.time())
    answer.model = f"hydra/{model}"
    answer.usage = usage_of(document)


def _call(call: Mapping[str, Any], index: int) -> dict[str, Any]:
    function = call["function"]
    return {
        "index": index,
        "id": call.get("id") or f"call_{uuid.uuid4().hex}",
        "type": "function",
        "function": {
            "name": function.get("name") or "",
            "arguments": json.dumps(function.get("arguments") or {}, ensure_ascii=False),
        },
    }


def _finish_reason(document: Mapping[str, Any], *, has_called: bool) -> str:
    if has_called:
        return "tool_calls"
    return "length" if document.get("done_reason") == "length" else "stop"


def usage_of(document: Mapping[str, Any]) -> Any:
    """Give LiteLLM's `Usage` from Ollama's counts."""
    prompt, completion = document.get("prompt_eval_count") or 0, document.get("eval_count") or 0
    return litellm.Usage(
        prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion
    )


class StreamReader:
    """
    Makes LiteLLM's chunks of the parts of one answer.

    All chunks of a stream share their `_hidden_params`, since the first ones are long gone when
    the answer is complete and the decision can be told.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._hidden: dict[str, Any] = {"custom_llm_provider": "hydra"}  # as in its own chunks
        self._calls = 0
        self._has_begun = False

    def chunks_of(self, part: Mapping[str, Any], decision: Any) -> Iterator[Any]:
        """Yield one part's chunks; a decision is given with the last part."""
        message = part.get("message") or {}
        calls = [_call(c, self._calls + n) for n, c in enumerate(message.get("tool_calls") or ())]
        self._calls += len(calls)
        told = {
            "content": message.get("content") or None,
            "reasoning_content": message.get("thinking") or None,
            "tool_calls": calls or None,
        }
        if any(told.values()):
            yield self._chunk(told)
        if decision is not None:
            usage = usage_of(part)
            # There too, for who puts the chunks together that LiteLLM has taken the usage out of.
            self._hidden.update(beside_an_answer(decision.to_dict()), usage=usage)
            # In a chunk of its own, before the end: LiteLLM keeps what the chunk with the
            # finish reason says only if there is content beside it.
            yield self._chunk({}, usage=usage)
            yield self._chunk({}, _finish_reason(part, has_called=self._calls > 0))

    def _chunk(self, told: dict[str, Any], finish_reason: str | None = None, **more: Any) -> Any:
        role = None if self._has_begun else "assistant"
        self._has_begun = True
        chunk = ModelResponseStream(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[StreamingChoices(delta=Delta(role=role, **told), finish_reason=finish_reason)],
            **more,
        )
        chunk._hidden_params = self._hidden  # LiteLLM's own name for it
        return chunk
