"""``hydra-llm litellm-config``: the nodes and their models, as LiteLLM's ``config.yaml``."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra_llm.cli.proxy.translation import CALLBACK
from hydra_llm.cli.yamlfiles import to_yaml
from hydra_llm.exceptions import ConfigurationError, HydraError
from hydra_llm.types import InstalledModel, Node, NodeSnapshot

_OF_A_NODE = ("vram_gb", "vram_reserved_gb", "ram_gb", "slots")


def config_text(nodes: Sequence[NodeSnapshot], *, name: Path | None = None) -> str:
    """
    The file, with comments that say what it is.

    Args:
        nodes: as just seen.
        name: what the file will be called.

    Raises:
        HydraError: no node has a model.
    """
    secrets = Secrets()
    models = [
        _entry(node.node, model, secrets)
        for node in nodes
        if node.health == "up"
        for model in node.installed.values()
    ]
    # What LiteLLM calls a group stands together, its nodes in the order of the settings.
    models.sort(key=lambda entry: str(entry["model_name"]))
    if not models:
        raise HydraError(_why_none(nodes))
    config = {
        "model_list": models,
        "litellm_settings": {"callbacks": [CALLBACK]},
        "router_settings": {"num_retries": 2},
    }
    return "\n".join([*_comments(nodes, secrets, name), "", to_yaml(config)])


def write(text: str, output: Path | None, *, force: bool) -> None:
    """
    To a file, or to stdout.

    Raises:
        ConfigurationError: the file exists, or cannot be written.
    """
    if output is None:
        sys.stdout.write(text)
        return
    try:
        with output.open("w" if force else "x", encoding="ascii") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigurationError(f"{output} exists; --force overwrites it") from None
    except OSError as error:
        raise ConfigurationError(f"{output}: it cannot be written ({error.strerror})") from None


class Secrets:
    """The variables that take the place of nodes' credentials."""

    def __init__(self) -> None:
        self.meanings: dict[str, str] = {}
        """What each is to hold."""

    def reference(self, node: Node, what: str, meaning: str) -> str:
        """``os.environ/...`` for one credential of one node."""
        # Not HYDRA_LLM_...: a variable of that name that is no setting is a misspelt one.
        plain = re.sub(r"\W+", "_", f"NODE_{node.id}_{what}", flags=re.ASCII).upper()
        name, count = plain, 1
        while self.meanings.setdefault(name, meaning) != meaning:
            count += 1
            name = f"{plain}_{count}"
        return f"os.environ/{name}"


def _entry(node: Node, model: InstalledModel, secrets: Secrets) -> dict[str, Any]:
    short = model.name.removesuffix(":latest")
    capabilities = model.capabilities or frozenset()
    embeds = "embedding" in capabilities and "completion" not in capabilities
    params = {
        # What LiteLLM calls ollama sends chats as bare prompts; what it calls ollama_chat
        # cannot embed.
        "model": f"{'ollama' if embeds else 'ollama_chat'}/{model.name}",
        "api_base": node.url,
    }
    about: dict[str, Any] = {"node_id": node.id}
    about |= {key: value for key in _OF_A_NODE if (value := getattr(node, key))}
    if node.labels:
        about["labels"] = list(node.labels)
    headers = node.headers or {}
    if _is_token(headers):
        meaning = f"the token of node {node.id}, without 'Bearer'"
        params["api_key"] = secrets.reference(node, "API_KEY", meaning)
    elif headers:
        about["headers"] = {
            name: secrets.reference(node, name, f"the header {name} of node {node.id}")
            for name in headers
        }
    info: dict[str, Any] = {"id": f"{node.id}/{short}"}
    if embeds:
        info["mode"] = "embedding"
    return {"model_name": short, "litellm_params": params, "model_info": {**info, "hydra": about}}


def _is_token(headers: Mapping[str, str]) -> bool:
    """Whether they are what LiteLLM makes of an ``api_key``."""
    return [name.lower() for name in headers] == ["authorization"] and all(
        value.startswith("Bearer ") for value in headers.values()
    )


def _comments(nodes: Sequence[NodeSnapshot], secrets: Secrets, name: Path | None) -> list[str]:
    file = shlex.quote(str(name)) if name else "config.yaml"
    lines = [
        "LiteLLM's config for these Ollama nodes, written by `hydra-llm litellm-config`.",
        "",
        "  export LITELLM_MASTER_KEY=sk-...    # of your own; clients send it as their API key",
        f"  hydra-llm proxy --config {file}    # or: litellm --config {file}",
        "",
        "A model that several nodes have is there once for each, under one name; the callback",
        "chooses the node. model_info.hydra says what hydra-llm knows of a node from you.",
    ]
    left_out = [node for node in nodes if node.health != "up"]
    if left_out:
        lines += ["", "Left out, because they could not be asked:"]
        lines += [f"  {n.node.id} ({n.node.url}): {n.health_reason or n.health}" for n in left_out]
    empty = [node.node.id for node in nodes if node.health == "up" and not node.installed]
    if empty:
        lines += ["", f"Left out, because they have no model: {', '.join(empty)}"]
    if secrets.meanings:
        lines += [
            "",
            "Credentials are not written here. Set these variables before you start it:",
        ]
        lines += [f"  {name}: {meaning}" for name, meaning in secrets.meanings.items()]
    return [f"# {_plain(line)}".rstrip() for line in lines]


def _plain(text: str) -> str:
    """On one line and in ASCII, whatever a node said."""
    one_line = re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029]", " ", text)
    return one_line.encode("ascii", "backslashreplace").decode("ascii")


def _why_none(nodes: Sequence[NodeSnapshot]) -> str:
    reasons = [
        (node.node.id, "no model" if node.health == "up" else node.health_reason or node.health)
        for node in nodes
    ]
    listed = ", ".join(f"{node_id}: {reason}" for node_id, reason in reasons)
    return f"there is nothing to write, no node has a model ({listed})"
