"""Adds found nodes to ``hydra.toml``: at its end, and nothing that stands there is touched."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_llm.config import HydraSettings
from hydra_llm.discovery import FoundNode
from hydra_llm.exceptions import ConfigurationError
from hydra_llm.types import GB, Node

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["NodesFile"]

HEAD = "# Found by `hydra-llm discover`. What else a node can have: docs/configuration.md."


@dataclass(frozen=True, slots=True, kw_only=True)
class NodesFile:
    """A ``hydra.toml``, as it was read; ``data`` is None if there is none yet."""

    path: Path
    data: bytes | None
    nodes: tuple[Node, ...]

    @classmethod
    def read(cls, path: Path) -> NodesFile:
        """
        Read it.

        Raises:
            ConfigurationError: it is there and cannot be read.
        """
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return cls(path=path, data=None, nodes=())
        except OSError as error:
            raise ConfigurationError(f"{path}: it cannot be read ({error.strerror})") from None
        return cls(path=path, data=data, nodes=_nodes_in(data, path))

    def missing(self, found: Iterable[FoundNode]) -> list[FoundNode]:
        """Those that it does not have under any of their addresses."""
        urls = {node.url for node in self.nodes}
        return [
            one
            for one in found
            if urls.isdisjoint(one.urls) and not any(node.url in urls for node in one.known)
        ]

    def addition(self, found: Sequence[FoundNode]) -> bytes:
        """
        What is to stand at its end.

        Raises:
            ConfigurationError: nothing can be added, because of how it names its nodes.
        """
        data = self.data or b""
        ending = "\r\n" if b"\r\n" in data else "\n"
        lines = [HEAD, *(line for one in found for line in ("", *_table(one)))]
        gap = ending * (2 if data and not data.endswith(b"\n") else 1) if data else ""
        added = (gap + ending.join(lines) + ending).encode()
        by_hand = "add the nodes by hand, or have another file written with --output FILE"
        try:
            after = _nodes_in(data + added, self.path)
        except ConfigurationError as error:
            why = "its nodes are no [[nodes]] tables" if self.nodes else str(error)
            raise ConfigurationError(
                f"{self.path}: nothing can be added at its end, {why}; {by_hand}"
            ) from None
        assert len(after) == len(self.nodes) + sum(not one.perhaps_same_as for one in found)
        return added

    def add(self, found: Sequence[FoundNode]) -> None:
        """
        Write them at its end.

        Raises:
            ConfigurationError: it cannot be written, or is there by now, or another one.
        """
        added = self.addition(found)
        try:
            if self.data is None:
                with self.path.open("xb") as file:
                    file.write(added)
                return
            with self.path.open("r+b") as file:
                if file.read() != self.data:
                    raise ConfigurationError(f"{self.path} has been changed meanwhile; try again")
                file.write(added)
        except FileExistsError:
            raise ConfigurationError(f"{self.path} has been made meanwhile; try again") from None
        except OSError as error:
            why = error.strerror
            raise ConfigurationError(f"{self.path}: it cannot be written ({why})") from None


def _nodes_in(data: bytes, path: Path) -> tuple[Node, ...]:
    try:
        content: dict[str, Any] = tomllib.loads(data.decode("utf-8-sig"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigurationError(f"{path}: it is not TOML ({error})") from None
    nodes = content.get("nodes")
    if not nodes:
        return ()
    try:
        return HydraSettings(nodes).nodes
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None


def _table(found: FoundNode) -> Iterator[str]:
    # Only what we made of addresses and ports stands outside the comments.
    mark = "# " if found.perhaps_same_as else ""
    if mark:
        first = " and ".join(found.perhaps_same_as)
        yield f"# It may be {first} under another address: nothing tells. If it is"
        yield "# another machine, take the marks away."
    count = len(found.models)
    yield f"{mark}[[nodes]]  # Ollama {found.version}, {count} model{'s' if count != 1 else ''}"
    yield f'{mark}url = "{found.url}"'
    if found.exporter is not None:
        size = found.exporter.total_bytes / GB
        yield f'{mark}exporter = "{found.exporter.url}"  # {found.exporter.name}, {size:.1f} GB'
    for url in found.locked_exporters:
        yield f'# exporter = "{url}"  # it wants a login: set exporter_headers'
