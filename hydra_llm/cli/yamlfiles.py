"""YAML files; PyYAML comes with LiteLLM and is asked for where one is read or written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra_llm.cli.console import NotInstalledError
from hydra_llm.exceptions import ConfigurationError


def read_mapping(path: Path, *, said_in: str = "") -> dict[str, Any]:
    """
    What a file holds, which is keys and values; nothing for an empty one.

    Args:
        path: the file.
        said_in: the place that names it, for messages.

    Raises:
        ConfigurationError: naming the file, and the line where there is one.
    """
    yaml = _yaml()
    lead = f"{said_in}: " if said_in else ""
    try:
        content = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        raise ConfigurationError(f"{lead}{path}: there is no such file") from None
    except OSError as error:
        raise ConfigurationError(f"{lead}{path}: it cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: the 13th month
        # Its own text quotes the line, and there may be a key in it.
        raise ConfigurationError(f"{lead}{path}{_place_and_reason(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else "no more than one value"
        raise ConfigurationError(f"{lead}{path}, line 1: it holds {kind}, not keys and values")
    return content


def to_yaml(document: Any) -> str:
    """As text in ASCII: LiteLLM reads files in the machine's encoding, whichever that is."""
    text: str = _yaml().safe_dump(document, sort_keys=False, width=100)
    return text


def _place_and_reason(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "it is no YAML"
    if mark is None:
        return f": {reason}"
    return f", line {mark.line + 1}, column {mark.column + 1}: {reason}"


# Any: PyYAML has no types of its own.
def _yaml() -> Any:
    try:
        import yaml  # type: ignore[import-untyped,unused-ignore]
    except ModuleNotFoundError:
        raise NotInstalledError(
            'PyYAML is missing, which comes with LiteLLM: pip install "hydra-llm[litellm]"'
        ) from None
    return yaml
