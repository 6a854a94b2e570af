"""`ChatOllama` over several nodes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import ollama
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import LangSmithParams, LanguageModelInput
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatGenerationChunk, ChatResult
from langchain_core.runnables import Runnable
from langchain_ollama import ChatOllama
from pydantic import Field, model_validator
from typing_extensions import Self

from hydra_llm import RoutingWords, StreamBrokenError
from hydra_llm.integrations.langchain.routed import WORDS, RoutedModel

RESTART_OF = "restart_of"
"""Argument of the clients: the error in which the same call ended before."""

OPTIONS = frozenset(ollama.Options.model_fields) - {"stop"} | {"min_p"}
"""Ollama's options, which a call may give by name; the ollama package does not list them all."""
_SETTINGS = (*sorted(OPTIONS), "max_tokens", "reasoning", "format", "logprobs", "top_logprobs")
"""Fields that an answer depends on, as far as a model has them."""


class ChatHydra(RoutedModel, ChatOllama):
    """
    `ChatOllama` over several nodes: each call goes to the one that will answer soonest.

    ::

        model = ChatHydra(model="llama3.2", nodes=["http://rig:11434", "http://gaming:11434"])
        model.invoke("Why is the sky blue?")
        model.invoke("And at night?", node_id="gaming", priority=8)

    It takes what `ChatOllama` takes. An answer's ``response_metadata["routing_decision"]``
    tells where it came from and why, as plain data; of a stream, one chunk has it.

    Args:
        max_tokens: LangChain's name for ``num_predict``.
        max_retries: how often `invoke` and `ainvoke` ask again elsewhere after an answer broke
            off; never for a pinned call. A stream that was handed out is not asked for again.

    The arguments about nodes, and the routing words, are those of :class:`RoutedModel`.

    Raises:
        hydra_llm.ConfigurationError: a node, a setting or a routing word is wrong.
        ValueError: with ``validate_model_on_init``, if no node has the model.
    """

    max_tokens: int | None = None
    max_retries: int = Field(default=2, ge=0)

    # ------------------------------------------------------------ construction

    # By this name it takes the place of upstream's, which would open connections of its own.
    @model_validator(mode="after")
    def _set_clients(self) -> Self:
        """Have our clients stand where ChatOllama has those of one server."""
        if self.top_logprobs is not None:
            self._check_logprobs()
        self._client, self._async_client = self._connect()
        if self.validate_model_on_init:
            self._validate_model(self.model)
        return self

    def _check_logprobs(self) -> None:
        """Apply upstream's rule, which is part of how it makes its clients."""
        stand_in = ChatOllama.model_construct(
            model=self.model,
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            client_kwargs={"verify": False},
        )
        ChatOllama._set_clients(stand_in)  # type: ignore[operator]  # pydantic's wrapper is
        self.logprobs = stand_in.logprobs

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        if self.__dict__.get("profile") is None:
            self.__dict__.pop("profile", None)  # worked out when asked for

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name == "profile":
                return self._profile_of_the_nodes()
            return super().__getattr__(name)

    def _profile_of_the_nodes(self) -> dict[str, Any] | None:
        """
        Tell what the nodes say the model can do, as LangChain's model profile.

        ``max_input_tokens`` is the smallest context that a call can be sure of on the nodes
        that have the model. None if no node is up that has it.
        """
        info = self.router.get_model_info(self.model, num_ctx=self.num_ctx, **self._own_words())
        if info is None:
            return None
        profile = {
            "max_input_tokens": info["usable_context_length"],
            "text_inputs": True,
            "text_outputs": True,
            "structured_output": True,  # Ollama holds every model to a schema
        }
        limit = self.max_tokens if self.num_predict is None else self.num_predict
        if limit is not None and limit > 0:  # negative means until it is done
            profile["max_output_tokens"] = limit
        if info["capabilities"] is not None:
            profile["tool_calling"] = "tools" in info["capabilities"]
            profile["image_inputs"] = "vision" in info["capabilities"]
            profile["reasoning_output"] = "thinking" in info["capabilities"]
        return profile

    # ------------------------------------------------------------ what is sent

    def _chat_params(
        self, messages: list[BaseMessage], stop: list[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Add the routing words, and options given by name, to what ChatOllama sends."""
        words, rest = RoutingWords.split(kwargs)
        named = {name: rest.pop(name) for name in OPTIONS.intersection(rest)}
        if "max_tokens" in rest:
            named["num_predict"] = rest.pop("max_tokens")
        params = super()._chat_params(messages, stop, **rest)
        if self.max_tokens is not None and self.num_predict is None and "options" not in rest:
            named.setdefault("num_predict", self.max_tokens)
        if named:
            merged = {**params["options"], **named}
            params["options"] = {k: v for k, v in merged.items() if v is not None}
        return {**params, **self._own_words(), **words}

    def bind(self, **kwargs: Any) -> Any:  # LangChain's own type for it is private
        """
        As LangChain's, and routing words stay with the model.

        LangChain itself forgets what was bound when tools or a schema are bound after it.
        """
        words, rest = RoutingWords.split(kwargs)
        model = self.with_routing(**words) if words else self
        return super(ChatHydra, model).bind(**rest)

    def with_structured_output(
        self, schema: Any, **kwargs: Any
    ) -> Runnable[LanguageModelInput, Any]:
        """As ChatOllama's; takes routing words too."""
        words, rest = RoutingWords.split(kwargs)
        model = self.with_routing(**words) if words else self
        return super(ChatHydra, model).with_structured_output(schema, **rest)

    # -------------------------------------------------------------- what comes

    def _create_chat_stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, **kwargs: Any
    ) -> Iterator[Mapping[str, Any] | str]:
        for part in super()._create_chat_stream(messages, stop, **kwargs):
            yield _as_told(part)

    async def _acreate_chat_stream(
        self, messages: list[BaseMessage], stop: list[str] | None = None, **kwargs: Any
    ) -> AsyncIterator[Mapping[str, Any] | str]:
        # Not closed from here: at the end of asyncio.run() all generators are closed at once, and
        # one that another is just closing complains.
        async for part in super()._acreate_chat_stream(messages, stop, **kwargs):
            yield _as_told(part)

    def _chat_stream_with_aggregation(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        verbose: bool = False,
        **kwargs: Any,
    ) -> ChatGenerationChunk:
        """As ChatOllama's, but chunks are added up once and not anew with each of them."""
        chunks: list[ChatGenerationChunk] = []
        for chunk in self._iterate_over_stream(messages, stop, **kwargs):
            chunks.append(chunk)
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk, verbose=verbose)
        return _sum(chunks)

    async def _achat_stream_with_aggregation(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        verbose: bool = False,
        **kwargs: Any,
    ) -> ChatGenerationChunk:
        """As ChatOllama's, but chunks are added up once and not anew with each of them."""
        chunks: list[ChatGenerationChunk] = []
        async for chunk in self._aiterate_over_stream(messages, stop, **kwargs):
            chunks.append(chunk)
            if run_manager:
                await run_manager.on_llm_new_token(chunk.text, chunk=chunk, verbose=verbose)
        return _sum(chunks)

    # ---------------------------------------------------------------- restarts

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        for _ in range(self._restarts(kwargs)):
            try:
                return super()._generate(messages, stop, run_manager, **kwargs)
            except StreamBrokenError as broken:
                kwargs[RESTART_OF] = broken
        return super()._generate(messages, stop, run_manager, **kwargs)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        for _ in range(self._restarts(kwargs)):
            try:
                return await super()._agenerate(messages, stop, run_manager, **kwargs)
            except StreamBrokenError as broken:
                kwargs[RESTART_OF] = broken
        return await super()._agenerate(messages, stop, run_manager, **kwargs)

    def _restarts(self, kwargs: Mapping[str, Any]) -> int:
        """How often a whole answer may be asked for again; a pinned one stays where it is."""
        return self.max_retries if kwargs.get("node_id", self.node_id) is None else 0

    # --------------------------------------------------------- how it is known

    @property
    def _identifying_params(self) -> dict[str, Any]:
        """What is asked for, for tracing."""
        values = self.__dict__
        known = {name: values[name] for name in _SETTINGS if values.get(name) is not None}
        return {"model": self.model, **known, **self._own_words()}

    def _get_llm_string(self, stop: list[str] | None = None, **kwargs: Any) -> str:
        """
        The key of LangChain's caches: all that an answer depends on.

        Where it was computed is no part of it. ChatOllama leaves out the model.
        """
        params = self._get_invocation_params(stop=self.stop if stop is None else stop, **kwargs)
        for name in (*WORDS, RESTART_OF):
            params.pop(name, None)
        return str(sorted(params.items()))

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop, **kwargs)
        params["ls_model_name"] = kwargs.get("model") or self.model
        asked = (kwargs.get("max_tokens"), kwargs.get("num_predict"))
        limits = (*asked, self.num_predict, self.max_tokens)
        limit = next((one for one in limits if one is not None), None)
        if limit is not None:
            params["ls_max_tokens"] = limit
        return params


def _sum(chunks: list[ChatGenerationChunk]) -> ChatGenerationChunk:
    if not chunks:
        raise ValueError("No data received from Ollama stream.")  # ChatOllama's words
    first, *others = chunks
    return first + others if others else first


def _as_told(part: Any) -> Any:
    """
    A part of an answer as ChatOllama expects it, which fills its metadata from the last one.

    The decision becomes plain data there, which LangChain can store. Only the last part has
    one: chunks that are added up would repeat its texts.
    """
    decision = part.get("routing_decision")
    if decision is None:
        return part
    # By way of ollama's type, so that the fields are those that ChatOllama's metadata has.
    told = dict(ollama.ChatResponse(**dict(part)))
    return {**told, "logprobs": part.get("logprobs"), "routing_decision": decision.to_dict()}
