"""Gathers what the checks judge by; the only part of the doctor that touches the world."""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from hydra_llm.cli.doctor.finding import Finding, Look
from hydra_llm.cli.options import without_discovery
from hydra_llm.config import HydraSettings
from hydra_llm.exceptions import ConfigurationError
from hydra_llm.types import Node

GPU_SECONDS = 3.0
"""How long this machine's GPUs are waited for."""


def settings_problems(error: ConfigurationError) -> list[Finding]:
    """A finding for each line of a settings error: nothing else can be looked at then."""
    lines = [line.strip() for line in str(error).splitlines()]
    if len(lines) > 1 and lines[0].endswith("problems in the settings:"):
        lines = lines[1:]
    return [
        Finding(
            level="problem",
            check="settings",
            says=line,
            do="mend it; the nodes are looked at once the settings can be read",
        )
        for line in lines
    ]


def look_at(settings: HydraSettings) -> Look:
    """Ask every node once."""
    from hydra_llm.router import Router  # takes its time; a wrong setting needs none of it

    # A look leaves nothing behind.
    quiet = without_discovery(settings).model_copy(update={"keep_rates": False})
    with Router(settings=quiet) as router:
        nodes = router.refresh()
    is_missed = any(
        node.node.local and node.health == "up" and node.free_vram_bytes is None for node in nodes
    )
    return Look(
        settings=settings,
        nodes=nodes,
        addresses={node.id: _listener_of(node.node) for node in nodes if node.health == "up"},
        gpu_extra_installed=find_spec("pynvml") is not None,
        local_reasons=_why_no_gpu() if is_missed and settings.vram_monitoring else (),
        rates_file=settings.rates_file,
        rates_reason=_why_not_kept(settings.rates_file),
    )


def _why_not_kept(file: Path | None) -> str:
    """Why learned rates cannot be written there; empty if they can."""
    if file is None:
        return ""
    try:
        if file.exists() and not file.is_file():
            return "it is no file"
        folder = next(parent for parent in file.parents if parent.exists())
        if not folder.is_dir():
            return f"{folder} is no folder"
        return "" if os.access(folder, os.W_OK) else f"{folder} cannot be written to"
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)


def _why_no_gpu() -> tuple[str, ...]:
    """Why this machine's GPUs tell nothing."""
    from hydra_llm.probes.local import LocalDevices
    from hydra_llm.probes.thread import Errands

    devices = LocalDevices()
    reading = Errands().submit(devices.read, time.monotonic())
    reasons: tuple[str, ...]
    try:
        _, reasons = reading.result(GPU_SECONDS)
    except FutureTimeoutError:
        return ("the GPU's driver does not answer",)
    devices.close()
    return reasons


def _listener_of(node: Node) -> str:
    """Address and port behind a node's name; all addresses of this machine are one."""
    split = urlsplit(node.url)
    try:
        found = socket.getaddrinfo(node.host, split.port, type=socket.SOCK_STREAM)
    except OSError:
        return split.netloc + split.path
    family, _, _, _, address = found[0]
    host = str(address[0])
    if host.startswith("127.") or host == "::1" or _is_own(family, address):
        host = "this machine"
    return f"{host}:{split.port}{split.path}"


def _is_own(family: int, address: tuple[object, ...]) -> bool:
    # Connecting a datagram socket sends nothing: it asks the kernel for the way there, and
    # to an own address that is the address itself.
    with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        return str(sock.getsockname()[0]) == str(address[0])
    return False
