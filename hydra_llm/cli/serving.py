"""``hydra-llm agent``: reads its token and says where it listens."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from hydra_llm import __version__
from hydra_llm.agent import Agent, run_agent
from hydra_llm.agent.running import Announce
from hydra_llm.cli.console import NotInstalledError, stderr, stdout
from hydra_llm.config import agent_token


def serve_agent(
    *,
    host: str,
    port: int,
    token_file: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    announce: bool,
    ollama_port: int,
) -> None:
    """
    Serve until it is stopped.

    Raises:
        ConfigurationError: an option or the token is wrong, or it may not or cannot listen there.
        NotInstalledError: it is to announce itself, and zeroconf is missing.
    """
    agent = Agent(
        host=host,
        port=port,
        token=agent_token(token_file),
        tls_certificate=tls_cert,
        tls_key=tls_key,
        version=__version__,
    )
    out, err = stdout(), stderr()
    run_agent(
        agent,
        say=lambda line: out.print(Text(line), soft_wrap=True),
        warn=lambda line: err.print(Text(line), soft_wrap=True),
        announce=_announcing(ollama_port) if announce else None,
    )


def _announcing(ollama_port: int) -> Announce:
    from hydra_llm.discovery import mdns

    try:
        mdns.require_zeroconf()
    except mdns.MissingZeroconfError as error:
        raise NotInstalledError(str(error)) from None
    return lambda bound: mdns.announced(bound, ollama_port=ollama_port)
