"""What a routed LangChain model has beside what the one it stands in for has."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import httpx
from langchain_ollama._utils import validate_model
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    PrivateAttr,
    SecretStr,
    SkipValidation,
    ValidationError,
)
from typing_extensions import Self

from hydra_llm import (
    AsyncClient,
    Client,
    ConfigurationError,
    HydraSettings,
    Router,
    RoutingError,
    RoutingWordError,
    RoutingWords,
)
from hydra_llm.integrations.langchain.connection import Connection, Nodes

WORDS = tuple(RoutingWords.model_fields)

_NEAR = 0.75
"""Likeness from which on an unknown argument is taken for a misspelt one of ours."""
_LED_TO_THE_ROUTER = frozenset(
    "nodes settings base_url client_kwargs sync_client_kwargs async_client_kwargs".split()
)


class RoutedModel(BaseModel):
    """
    Mixed into a model of `langchain_ollama`: whom it may ask, and the routing words.

    Args:
        nodes: URLs or :class:`hydra_llm.Node`; by default what the settings say, and
            ``OLLAMA_HOST`` is one of them. Models of the same nodes share one router.
        router: one that exists already, instead of nodes.
        settings: for a router made here.
        timeout: httpx's, for each attempt; by default only silence is limited, by the settings.
        api_key: sent to every node as a bearer token; ``Node(headers=...)`` is for one of them.

    The other fields are the routing words of :class:`hydra_llm.RoutingWords`; None leaves a
    word at its default.
    """

    # A pydantic error shows what it was given, and that may be a URL with a password in it.
    model_config = ConfigDict(arbitrary_types_allowed=True, hide_input_in_errors=True)

    nodes: SkipValidation[Nodes | Router | None] = Field(default=None, exclude=True)
    settings: InstanceOf[HydraSettings] | None = Field(default=None, exclude=True)
    timeout: SkipValidation[Any] = None
    # Whichever is given, pydantic makes a SecretStr of it; a plain one is for type checkers.
    api_key: SecretStr | str | None = Field(default=None, exclude=True)

    # Checked by RoutingWords.read, whose errors say more than pydantic's.
    node_id: SkipValidation[str | None] = None
    min_vram_gb: SkipValidation[float | None] = None
    prefer_local: SkipValidation[bool | None] = None
    priority: SkipValidation[int | None] = None
    session: SkipValidation[str | None] = None
    exclude_nodes: SkipValidation[Sequence[str] | None] = None
    require_labels: SkipValidation[Sequence[str] | None] = None
    prefer_labels: SkipValidation[Sequence[str] | None] = None
    deadline_s: SkipValidation[float | None] = None
    pin: SkipValidation[str | None] = None
    vram: SkipValidation[str | None] = None
    continue_streams: SkipValidation[bool | None] = None

    def __init__(self, **given: Any) -> None:
        self._check_names(given)
        if (router := given.pop("router", None)) is not None:
            if given.get("nodes") is not None:
                raise ConfigurationError("give either nodes or router, not both")
            given["nodes"] = router
        try:
            super().__init__(**given)
        except ValidationError as exc:
            raise _told_plainly(exc) from None

    @classmethod
    def _check_names(cls, given: Mapping[str, Any]) -> None:
        """A misspelt name of ours is an error; others are what they are upstream."""
        ours = (*RoutedModel.model_fields, "router")
        known = {*cls.model_fields, *ours}
        known |= {field.alias for field in cls.model_fields.values() if field.alias}
        for name in given.keys() - known:
            if near := difflib.get_close_matches(name, ours, n=1, cutoff=_NEAR):
                raise RoutingWordError(
                    f"{cls.__name__} knows no argument {name!r}; did you mean {near[0]!r}?"
                )
            if cls.model_config.get("extra") != "forbid":
                warnings.warn(
                    f"{cls.__name__} knows no argument {name!r} and ignores it",
                    UserWarning,
                    stacklevel=4,
                )

    # -------------------------------------------------------------- connecting

    if TYPE_CHECKING:
        # An argument that need not be given, and an attribute that is there in any case.
        router: Router = Field(default=cast("Any", None))
    else:

        @property
        def router(self) -> Router:
            """The router behind it: ``model.router.explain("llama3.2")``."""
            return self._client.router

    _connection: Connection = PrivateAttr()

    def _connect(self, **words: Any) -> tuple[Client, AsyncClient]:
        """Make the clients; they add ``words`` to every call."""
        upstream: Any = self  # what it is mixed into has ChatOllama's arguments
        if upstream.base_url and self.nodes is not None:
            raise ConfigurationError("give nodes (or router) or base_url, not both")
        RoutingWords.read(self._own_words())
        self._connection = Connection(
            upstream.client_kwargs,
            upstream.sync_client_kwargs,
            upstream.async_client_kwargs,
            timeout=self.timeout,
            api_key=self.api_key,
        )
        return self._connection.open(upstream.base_url or self.nodes, self.settings, words)

    def _validate_model(self, model: str) -> None:
        """Raise upstream's ValueError if no node that may be used has the model."""
        client, _ = self._connection.over(self.router, {})
        validate_model(_Catalogue(client, self._own_words()), model)  # type: ignore[arg-type]  # all it needs

    # ------------------------------------------------------------------- words

    def _own_words(self) -> dict[str, Any]:
        """The routing words that this model was given."""
        values = self.__dict__
        return {name: values[name] for name in WORDS if values.get(name) is not None}

    def with_routing(self, **words: Any) -> Self:
        """
        A copy with other routing words, over the same router and connections.

        ::

            model.with_routing(node_id="rig").bind_tools([search]).invoke("...")

        They stay through everything that is made of the copy: tools, structured output, agents.
        None takes a word away.

        Raises:
            RoutingWordError: a word is misspelt or its value is wrong.
        """
        # None is no value to be checked, but its name may be misspelt all the same.
        unknown = dict.fromkeys(words.keys() - set(WORDS), True)
        RoutingWords.read({**self._own_words(), **words, **unknown})
        copy = self.model_copy(update=words)
        copy.__dict__.pop("_serialized", None)  # LangChain keeps a description there
        return copy

    # --------------------------------------------------------------- life cycle

    def __repr_args__(self) -> Any:
        """The router instead of what led to it, which may hold credentials."""
        for name, value in super().__repr_args__():
            if name not in _LED_TO_THE_ROUTER:
                yield name, value
        yield "router", self.router


class _Catalogue:
    """What upstream's check asks, answered by the nodes that may be used."""

    def __init__(self, client: Client, words: Mapping[str, Any]) -> None:
        self._client = client
        # A pin that may be given up rules out no other node.
        self._words = {
            name: value
            for name, value in words.items()
            if name != "node_id" or words.get("pin") == "require"
        }

    def list(self) -> Any:
        try:
            return self._client.list(**self._words)
        except RoutingError as exc:
            raise httpx.ConnectError(str(exc)) from exc


def _told_plainly(exc: ValidationError) -> Exception:
    """Our own error out of pydantic's wrapping, if there is one in it."""
    for error in exc.errors(include_url=False, include_input=False):
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, ConfigurationError):
            return cause
    return exc
