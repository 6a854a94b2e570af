"""A config with the files it includes, merged as LiteLLM does it.

LiteLLM would look for them beside the copy that it is given, and one of them may be what says
``routing_strategy: hydra``, or put a ``litellm_settings`` without our callback over ours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra_llm.cli.yamlfiles import read_mapping
from hydra_llm.exceptions import ConfigurationError

INCLUDE = "include"


def read_config(path: Path) -> dict[str, Any]:
    """
    The whole config: lists of an included file are appended, anything else of it goes first.

    Raises:
        ConfigurationError: a file is missing, empty, or not YAML with keys and values.
    """
    config = read_mapping(path)
    if not config:
        raise ConfigurationError(
            f"{path}, line 1: it is empty; 'hydra-llm litellm-config' writes one"
        )
    pending = deque((name, path) for name in _named(config, path))
    seen = {path.resolve()}
    while pending:
        name, said_in = pending.popleft()
        included = _beside(name, said_in, path)
        if included.resolve() in seen:
            continue
        seen.add(included.resolve())
        more = read_mapping(included, said_in=f"{said_in}: {INCLUDE}")
        pending.extend((name, included) for name in _named(more, included))
        for key, value in more.items():
            config[key] = _merged(config.get(key), value)
    config.pop(INCLUDE, None)
    return config


def _named(config: Mapping[str, Any], path: Path) -> list[str]:
    names = config.get(INCLUDE, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(f"{path}: {INCLUDE}: should be a list of files")
    return names


def _beside(name: str, said_in: Path, root: Path) -> Path:
    """Beside the file that includes it, else beside the first one."""
    places = [each.parent / name for each in (said_in, root)]
    return next((place for place in places if place.exists()), places[0])


def _merged(before: object, value: object) -> object:
    if isinstance(before, list) and isinstance(value, list):
        return [*before, *value]
    return value
