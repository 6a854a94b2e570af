"""LiteLLM's proxy on a private copy of its config, for as long as it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from hydra_llm.cli.console import INTERRUPTED, NotInstalledError
from hydra_llm.cli.proxy import launch
from hydra_llm.cli.proxy.includes import read_config
from hydra_llm.cli.proxy.translation import translate
from hydra_llm.cli.yamlfiles import to_yaml
from hydra_llm.config import HydraSettings
from hydra_llm.exceptions import ConfigurationError

NEEDED = ("litellm", "fastapi", "uvicorn", "backoff", "apscheduler")
INSTALL = 'pip install "hydra-llm[litellm]" "litellm[proxy]"'

OTHER_CONFIGS = ("CONFIG_FILE_PATH", "LITELLM_CONFIG_BUCKET_NAME")
"""LiteLLM reads what these name instead of what ``--config`` names."""
DEFAULTS = {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
"""Without it, importing LiteLLM fetches a list of prices from the internet."""

_STOPPING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


def run_proxy(path: Path, *, host: str, port: int, more: Sequence[str] = ()) -> int:
    """
    Run LiteLLM's proxy until it ends or is stopped, and return its exit code.

    Args:
        path: the config.
        host: address to listen on.
        port: to listen on.
        more: further options of ``litellm``.

    Raises:
        ConfigurationError: the config is wrong; nothing has been started.
        NotInstalledError: LiteLLM's proxy is not installed.
    """
    check_installed()
    HydraSettings()  # what is wrong outside of the config is told without its name
    config = read_config(path)
    # The child's, not our settings: those are read by hydra_llm.config.
    environment = dict(os.environ)  # noqa: TID251
    try:
        translation = translate(config, lookup=environment.get)
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error}") from None
    environment = child_environment(environment, translation.variables)
    with signals_heeded() as stopping, private_copy(path, translation.config) as copy:
        options = ["--config", str(copy), "--host", host, "--port", str(port), *more]
        return stopping.run(command(path, options), environment)


def check_installed() -> None:
    """Find the proxy's packages without importing any: LiteLLM alone takes seconds."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise NotInstalledError(f"LiteLLM's proxy needs {', '.join(missing)}: {INSTALL}")


def child_environment(
    environment: Mapping[str, str], variables: Mapping[str, str]
) -> dict[str, str]:
    """Give the proxy's process what the config said of us, in place of what was there."""
    kept = {name: value for name, value in environment.items() if name not in OTHER_CONFIGS}
    # Names may be in small letters: hydra_llm.config takes capitals first.
    return {**DEFAULTS, **kept, **variables}


def command(path: Path, options: Sequence[str]) -> list[str]:
    """The same interpreter, on LiteLLM's command."""
    return [sys.executable, launch.__file__, str(path.absolute().parent), *options]


@contextmanager
def private_copy(path: Path, config: Mapping[str, Any]) -> Iterator[Path]:
    """
    ``config`` in a file that nobody else can read, with nothing beside it, and for a while.

    Beside the file that names them LiteLLM looks for modules before it looks at what is
    installed; so there must be no folder ``hydra_llm`` there.
    """
    with TemporaryDirectory(prefix="hydra-llm-", ignore_cleanup_errors=True) as folder:
        # LiteLLM wants this ending, and tells the user this name.
        copy = Path(folder) / f"{path.stem}.yaml"
        handle = os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(to_yaml(config))
        yield copy


class Stopping:
    """
    One child, to which what asks us to stop is handed on.

    Ctrl-C in a terminal reaches the child too. It is handed on all the same, as another
    program may have sent it to us alone, but as SIGTERM: uvicorn takes a second Ctrl-C for
    impatience, and drops what it is answering.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._asked: int | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Be asked to stop, by a signal."""
        self._asked = number
        # On Windows there is no SIGTERM, only an end without a word.
        if self._child is not None and (os.name == "posix" or number != signal.SIGINT):
            self._child.terminate()

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Exit code of the child; as a shell has it if a signal ended it."""
        if self._asked is None:
            self._child = subprocess.Popen(command, env=environment)  # noqa: S603  our own file
            if self._asked is not None:
                self._child.terminate()
            code = self._child.wait()
            if code >= 0:
                return code
            if self._asked is None:
                return 128 - code
        return INTERRUPTED if self._asked == signal.SIGINT else 128 + signal.SIGTERM


@contextmanager
def signals_heeded() -> Iterator[Stopping]:
    """What would end us at once asks us to stop instead, until the block is left."""
    stopping = Stopping()
    before = {
        number: signal.signal(number, stopping)
        for number in _STOPPING
        # What nohup, or a shell with &, has us ignore is to be ignored.
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
