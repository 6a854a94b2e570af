"""What LiteLLM is to read, and what is meant for us."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hydra_llm.config import HydraSettings, as_variables
from hydra_llm.exceptions import ConfigurationError

STRATEGY = "hydra"
IN_ITS_PLACE = "simple-shuffle"
"""LiteLLM's default: it draws from what our callback leaves, which is one."""
CALLBACK = "hydra_llm.integrations.litellm.instance"

Lookup = Callable[[str], str | None]
"""A variable's value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """A config in two parts."""

    config: dict[str, Any]
    """Without a word that LiteLLM does not know, and with our callback."""
    variables: dict[str, str] = field(repr=False)
    """``routing_strategy_args``, as variables for the proxy's process."""


def translate(config: Mapping[str, Any], *, lookup: Lookup) -> Translation:
    """
    Take ``routing_strategy: hydra`` and its arguments out of a config, and put our callback in.

    Args:
        config: as it stands in the file, included files merged.
        lookup: the environment, for arguments like ``redis_url: os.environ/REDIS_URL``.

    Raises:
        ConfigurationError: a section is no section, or an argument is no setting of ours.
    """
    translated = dict(config)
    arguments: dict[str, Any] = {}
    if router_settings := _section(config, "router_settings"):
        translated["router_settings"] = router_settings
        for where, part in _parts(router_settings):
            if part.get("routing_strategy") == STRATEGY:
                part["routing_strategy"] = IN_ITS_PLACE
                _add(arguments, part.pop("routing_strategy_args", None), where)
    litellm_settings = _section(config, "litellm_settings")
    litellm_settings["callbacks"] = _with_ours(litellm_settings.get("callbacks"))
    translated["litellm_settings"] = litellm_settings
    return Translation(config=translated, variables=_variables(arguments, lookup))


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, Mapping):
        raise ConfigurationError(f"{name}: should be keys and values")
    return dict(section)


def _parts(router_settings: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The settings and those of each routing group, each with its place; all may be changed."""
    yield "router_settings", router_settings
    groups = router_settings.get("routing_groups")
    if not isinstance(groups, list):
        return
    groups = router_settings["routing_groups"] = [
        dict(group) if isinstance(group, Mapping) else group for group in groups
    ]
    for number, group in enumerate(groups):
        if isinstance(group, dict):
            yield f"router_settings.routing_groups[{number}]", group


def _add(arguments: dict[str, Any], more: object, where: str) -> None:
    where += ".routing_strategy_args"
    if more is None:
        return
    if not isinstance(more, Mapping) or not all(isinstance(name, str) for name in more):
        raise ConfigurationError(f"{where}: should be settings by name")
    for name, value in more.items():
        if value is None:  # as an empty variable, it is not set
            continue
        if name in arguments and arguments[name] != value:
            raise ConfigurationError(
                f"{where}.{name}: it has another value elsewhere, and holds for the whole proxy"
            )
        arguments[name] = value


def _with_ours(callbacks: object) -> list[Any]:
    if callbacks is None:
        callbacks = []
    elif isinstance(callbacks, str):
        callbacks = [callbacks]
    if not isinstance(callbacks, list):
        raise ConfigurationError("litellm_settings.callbacks: should be a list of names")
    return callbacks if CALLBACK in callbacks else [*callbacks, CALLBACK]


def _variables(arguments: Mapping[str, Any], lookup: Lookup) -> dict[str, str]:
    where = "routing_strategy_args"
    given = {name: _resolved(value, f"{where}.{name}", lookup) for name, value in arguments.items()}
    try:
        settings = HydraSettings(**given)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}") from None
    return as_variables(settings, given)


def _resolved(value: Any, where: str, lookup: Lookup) -> Any:
    """With the variables' values in place of LiteLLM's references to them."""
    if isinstance(value, Mapping):
        return {key: _resolved(each, f"{where}.{key}", lookup) for key, each in value.items()}
    if isinstance(value, list):
        return [_resolved(each, f"{where}[{at}]", lookup) for at, each in enumerate(value)]
    if not isinstance(value, str) or not value.startswith("os.environ/"):
        return value
    name = value.removeprefix("os.environ/")
    found = lookup(name)
    if found is None:
        raise ConfigurationError(f"{where}: the variable {name} is not set")
    return found
