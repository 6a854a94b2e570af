"""Nodes that an operator has cordoned for every router of this user, in a file.

::

    {"hydra_llm_cordoned": 1, "nodes": ["http://rig:11434"]}

Every router looks at it once a second. A file that is not there, or cannot be read, cordons
nobody: a node that is used although it should rest does less harm than none at all.
"""

from __future__ import annotations

import json
from pathlib import Path

from hydra_llm.cluster.files import replace_file

__all__ = ["CordonsFile"]

VERSION = 1
MAX_BYTES = 1_000_000
"""A file this long is not ours."""
NOT_OURS = "the file is not hydra-llm's, or a newer one's"


class CordonsFile:
    """
    The file; read again only when it has changed.

    Args:
        path: where it is, or will be.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._urls: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"<CordonsFile {self.path}>"

    def read(self) -> frozenset[str]:
        """The URLs of the nodes that are cordoned."""
        try:
            status = self.path.stat()
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
            if seen != self._seen:
                self._urls = self._read(status.st_size)
                self._seen = seen
        except FileNotFoundError:
            self._seen, self._urls = None, frozenset()
        except (OSError, ValueError):
            # What was known stays: the file may be whole again in a moment.
            pass
        return self._urls

    def _read(self, size: int) -> frozenset[str]:
        if size > MAX_BYTES or not self.path.is_file():
            raise ValueError(NOT_OURS)
        try:
            told = json.loads(self.path.read_bytes())
        except RecursionError:
            told = {}
        is_ours = isinstance(told, dict) and told.get("hydra_llm_cordoned") == VERSION
        nodes = told.get("nodes") if is_ours else None
        if not isinstance(nodes, list):
            raise ValueError(NOT_OURS)  # noqa: TRY004  # of a file, its type is its value
        return frozenset(url for url in nodes if isinstance(url, str))

    def change(self, url: str, *, cordoned: bool) -> None:
        """
        Cordon a node, or no longer.

        Raises:
            OSError: the file cannot be written.
            ValueError: it holds something else.
        """
        try:
            urls = self._read(self.path.stat().st_size)
        except FileNotFoundError:
            urls = frozenset()
        urls = urls | {url} if cordoned else urls - {url}
        told = {"hydra_llm_cordoned": VERSION, "nodes": sorted(urls)}
        replace_file(self.path, json.dumps(told) + "\n")
        self._seen = None
