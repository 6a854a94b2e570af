"""Which program a PID is, and whether it is Ollama's, from ``/proc``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

__all__ = ["Program", "Programs"]

OLLAMA = frozenset({"ollama", "llama-server", "ollama_llama_server"})
"""Its server, which from 0.5 to 0.24 is the runner too (``ollama runner``), and the runners
after and before those."""

COMM_LENGTH = 15
"""What the kernel keeps of a program's name."""

MOST_ANCESTORS = 64

FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""The host's own, as the kernel numbers it (``PROC_PID_INIT_INO``)."""


class Program(NamedTuple):
    """One program; its name is empty where the system does not tell."""

    name: str = ""
    owner: Literal["ollama", "other"] = "other"


class Programs:
    """
    The programs that run on this machine.

    Args:
        root: where ``proc`` lies.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._proc = root / "proc"

    def are_the_hosts(self) -> bool:
        """
        Whether PIDs mean here what they mean to a driver.

        In a container with PIDs of its own they are others, or nobody. Where there is no such
        thing as a namespace, they do.
        """
        try:
            return (self._proc / "self/ns/pid").readlink().name == FIRST_PID_NAMESPACE
        except OSError:
            return True

    def program(self, pid: int, told_name: str = "") -> Program:
        """
        Who that is.

        Args:
            pid: whom to look for.
            told_name: what another source calls it, for where there is no ``/proc``.
        """
        name = self._name(pid) or _base_name(told_name)
        is_ollamas = _is_ollama(name) or any(map(_is_ollama, self._ancestors(pid)))
        return Program(name, "ollama" if is_ollamas else "other")

    def _ancestors(self, pid: int) -> list[str]:
        names: list[str] = []
        while len(names) < MOST_ANCESTORS:
            # "4711 (a name (with) brackets) S 1203 ..."
            after_name = (_read(self._proc / f"{pid}/stat")).rpartition(")")[2].split()
            if len(after_name) < 2 or not after_name[1].isdecimal() or int(after_name[1]) <= 1:
                break
            pid = int(after_name[1])
            names.append(self._name(pid))
        return names

    def _name(self, pid: int) -> str:
        comm = _read(self._proc / f"{pid}/comm").rstrip("\n")
        if len(comm.encode()) < COMM_LENGTH:
            return comm
        whole = _base_name(_read(self._proc / f"{pid}/cmdline").partition("\0")[0])
        return whole if whole.startswith(comm) else comm


def _base_name(path: str) -> str:
    name = path.replace("\\", "/").rpartition("/")[2]
    return name[:-4] if name.lower().endswith(".exe") else name


def _is_ollama(name: str) -> bool:
    return name.lower() in OLLAMA


def _read(file: Path) -> str:
    try:
        # Any user can give a program a name that is no UTF-8.
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
