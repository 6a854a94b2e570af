from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from hydra_llm.agent.exposure import (
    addresses_of,
    bears_token,
    check_exposure,
    is_loopback,
    names_loopback,
    tls,
)
from hydra_llm.exceptions import ConfigurationError

HERE = Path(__file__).parent
TOKEN = SecretStr("s3cret-t0ken")


@pytest.mark.parametrize("address", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
def test_loopback_is_loopback(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize(
    "address",
    ["0.0.0.0", "::", "192.168.1.20", "10.0.0.1", "fe80::1%eth0", "::ffff:10.0.0.1", "rig", ""],
)
def test_all_else_is_not(address: str) -> None:
    assert not is_loopback(address)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.20"])
def test_a_public_address_is_refused_without_a_token(host: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_exposure(host, addresses_of(host), None)

    message = str(caught.value)
    assert host in message
    assert "--token-file FILE" in message
    assert "HYDRA_LLM_AGENT_TOKEN" in message
    assert "127.0.0.1" in message


def test_a_name_is_public_if_one_of_its_addresses_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*args: Any, **about: Any) -> Any:
        return [(2, 1, 6, "", ("127.0.0.1", 0)), (2, 1, 6, "", ("192.168.1.20", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    assert addresses_of("rig") == ("127.0.0.1", "192.168.1.20")
    with pytest.raises(ConfigurationError):
        check_exposure("rig", addresses_of("rig"), None)


def test_with_a_token_it_may_be_anywhere_and_on_loopback_without() -> None:
    check_exposure("0.0.0.0", ("0.0.0.0",), TOKEN)
    check_exposure("127.0.0.1", ("127.0.0.1",), None)
    check_exposure("localhost", ("::1", "127.0.0.1"), None)


@pytest.mark.parametrize("host", ["", "  "])
def test_an_empty_host_would_be_anywhere_and_is_refused(host: str) -> None:
    with pytest.raises(ConfigurationError, match="empty"):
        addresses_of(host)


def test_a_name_that_leads_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*args: Any, **about: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)

    with pytest.raises(ConfigurationError, match="--host nosuch: no such address"):
        addresses_of("nosuch")


# ------------------------------------------------------------------------- the token


@pytest.mark.parametrize(
    "authorization", [b"Bearer s3cret-t0ken", b"bearer s3cret-t0ken", b"BEARER  s3cret-t0ken "]
)
def test_the_token_is_let_in(authorization: bytes) -> None:
    assert bears_token(authorization, TOKEN)


@pytest.mark.parametrize(
    "authorization",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer s3cret-t0ke",
        b"Bearer s3cret-t0kens",
        b"Bearer S3CRET-T0KEN",
        b"s3cret-t0ken",
        b"Basic s3cret-t0ken",
        b"Bearer s3cret-t0ken s3cret-t0ken",
        b"Bearer \xff\xfe",
    ],
)
def test_all_else_is_kept_out(authorization: bytes) -> None:
    assert not bears_token(authorization, TOKEN)


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return False

    monkeypatch.setattr("hmac.compare_digest", compare)

    assert not bears_token(b"Bearer s3cret-t0ken", TOKEN)
    assert not bears_token(b"Basic x", TOKEN)
    # Digests: of one length, whatever was sent.
    assert [len(text) for pair in compared for text in pair] == [32] * 4


@pytest.mark.parametrize(
    "header", ["localhost", "LOCALHOST:9936", "127.0.0.1:9936", "[::1]:9936", "::1", "127.0.0.1"]
)
def test_names_of_this_machine(header: str) -> None:
    assert names_loopback(header)


@pytest.mark.parametrize(
    "header",
    ["", "evil.example", "evil.example:9936", "localhost.evil.example", "127.0.0.1.evil.example",
     "192.168.1.20:9936", "[fe80::1]:9936"],
)  # fmt: skip
def test_names_that_a_web_page_could_have(header: str) -> None:
    assert not names_loopback(header)


# ------------------------------------------------------------------------------- TLS


def test_without_a_certificate_there_is_no_tls() -> None:
    assert tls(None, None) is None


def test_a_certificate_and_its_key_may_be_one_file(tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_text((HERE / "certificate.pem").read_text() + (HERE / "key.pem").read_text())

    assert tls(both, None) is not None
    assert tls(HERE / "certificate.pem", HERE / "key.pem") is not None


@pytest.mark.parametrize(
    ("certificate", "key", "says"),
    [
        (None, "key.pem", "--tls-key needs --tls-cert"),
        ("nosuch.pem", "key.pem", "No such file"),
        ("certificate.pem", None, "not a certificate and its key"),
        ("key.pem", "certificate.pem", "not a certificate and its key"),
        ("certificate.pem", "locked-key.pem", "without a password"),
        ("hydra-agent.prom", None, "not a certificate and its key"),
    ],
)
def test_files_that_cannot_be_used_are_told(
    certificate: str | None, key: str | None, says: str
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        tls(certificate and HERE / certificate, key and HERE / key)  # type: ignore[arg-type]
