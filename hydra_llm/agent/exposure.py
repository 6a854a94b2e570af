"""Where the agent may be reached, and by whom."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
import ssl
from pathlib import Path

from pydantic import SecretStr

from hydra_llm.exceptions import ConfigurationError

__all__ = ["addresses_of", "bears_token", "check_exposure", "is_loopback", "names_loopback", "tls"]


def addresses_of(host: str) -> tuple[str, ...]:
    """
    The IP addresses to listen on. Looked up once, so that what was checked is what is bound.

    Raises:
        ConfigurationError: the name leads nowhere, or is empty, which would be anywhere.
    """
    if not host.strip():
        raise ConfigurationError("--host is empty; write 127.0.0.1, or an address of this machine")
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ConfigurationError(f"--host {host}: no such address") from None
    return tuple(dict.fromkeys(str(address[0]) for *_, address in found))


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach an IP address."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def names_loopback(host_header: str) -> bool:
    """
    Whether a request means this machine by a name of its own.

    A web page that has its own name lead to 127.0.0.1 could read an open agent through the
    browser on this machine; its name gives it away.
    """
    name = host_header.strip().lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    return name == "localhost" or is_loopback(name)


def check_exposure(host: str, addresses: tuple[str, ...], token: SecretStr | None) -> None:
    """
    Refuse to tell the network who runs what here, unless a token is asked for it.

    Raises:
        ConfigurationError: there is none, and others could reach it.
    """
    if token is None and not all(map(is_loopback, addresses)):
        raise ConfigurationError(
            f"--host {host}: other machines can reach it there, so it needs a token: write one "
            "into a file and add --token-file FILE (or set HYDRA_LLM_AGENT_TOKEN), or leave "
            "--host out to listen on 127.0.0.1"
        )


def bears_token(authorization: bytes, token: SecretStr) -> bool:
    """Whether that is ``Bearer`` and the token; it takes as long if it is another one."""
    scheme, _, sent = authorization.partition(b" ")
    digests = [
        hashlib.sha256(text).digest() for text in (sent.strip(), token.get_secret_value().encode())
    ]
    return hmac.compare_digest(*digests) and scheme.lower() == b"bearer"


def tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """
    TLS with a certificate; None without one.

    Args:
        certificate: in PEM, with those that vouch for it.
        key: in PEM; None if it is in the file of the certificate.

    Raises:
        ConfigurationError: they cannot be used.
    """
    if certificate is None:
        if key is not None:
            raise ConfigurationError("--tls-key needs --tls-cert beside it")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    files = f"--tls-cert {certificate}" + ("" if key is None else f" --tls-key {key}")
    try:
        # A password that is asked for would be waited for without end in a service.
        context.load_cert_chain(certificate, key, password=lambda: b"")
    except ssl.SSLError as error:
        why = (error.reason or "no PEM").lower().replace("_", " ")
        raise ConfigurationError(
            f"{files}: not a certificate and its key without a password, in PEM ({why})"
        ) from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise ConfigurationError(f"{files}: {why}") from None
    return context
