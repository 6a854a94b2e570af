"""What a value may be, and what is never shown of it."""

import json
import ssl
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from hydra_llm.config import HydraSettings, as_variables, describe_settings
from hydra_llm.exceptions import ConfigurationError
from hydra_llm.types import Node
from tests.config.conftest import WriteToml

NUMBERS = [
    name for name, info in HydraSettings.model_fields.items() if type(info.default) in (int, float)
]
FLOATS = [name for name in NUMBERS if isinstance(HydraSettings.model_fields[name].default, float)]

LEAST = {
    "breaker_max_open_seconds": 5,  # what the first pause has
    "prefer_local_seconds": 0,
    "prefer_label_seconds": 0,
    "slow_start_seconds": 0,
    "max_queue": 0,
    "retry_ratio": 0,
    "retry_floor": 0,
    "health_check_interval": 0.1,
    "default_output_tokens": 1,
    "breaker_failures": 1,
    "max_body_bytes": 1,
    "dashboard_port": 1,
    "discovery_interval": 30,
}
"""The least value that may be; everything else must be above 0."""


def made_with(name: str, value: Any) -> HydraSettings:
    return HydraSettings(**{name: value})


def described(settings: HydraSettings) -> dict[str, str]:
    return {name: value for name, value, _ in describe_settings(settings)}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_has_a_least_value(name: str) -> None:
    least = LEAST.get(name, 0.001)
    too_little = 0.05 if name == "health_check_interval" else min(LEAST.get(name, 1), 1) - 1

    assert getattr(made_with(name, least), name) == least
    with pytest.raises(ConfigurationError, match=f"^{name}={too_little}: should be greater than"):
        made_with(name, too_little)


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
def test_a_number_is_finite(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    variable = f"HYDRA_LLM_{name.upper()}"
    monkeypatch.setenv(variable, text)

    with pytest.raises(ConfigurationError, match=f"^{variable}='{text}': should be "):
        HydraSettings()


@pytest.mark.parametrize("name", [name for name in FLOATS if name != "assumed_ram_gb"])
def test_no_time_is_longer_than_can_be_waited(name: str) -> None:
    with pytest.raises(ConfigurationError, match="should be less than or equal to"):
        made_with(name, 1e9)


@pytest.mark.parametrize("name", [*NUMBERS, "random_seed"])
def test_true_is_no_number(toml: WriteToml, name: str) -> None:
    toml(f"{name} = true")

    with pytest.raises(ConfigurationError) as caught:
        HydraSettings()

    assert str(caught.value) == (
        f"hydra.toml: {name} = True: should be a number, not true or false"
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [(text, True) for text in ("1", "yes", "ON", "true", " True ")]
    + [(text, False) for text in ("0", "no", "off", "FALSE", " n ")],
)
@pytest.mark.parametrize(
    "name", ["vram_monitoring", "discovery_enabled", "dashboard_enabled", "verify"]
)
def test_yes_and_no_have_many_words(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, value: bool
) -> None:
    monkeypatch.setenv(f"HYDRA_LLM_{name.upper()}", text)
    monkeypatch.setenv("HYDRA_LLM_DISCOVERY_NETWORKS", "192.168.1.0/24")

    assert getattr(HydraSettings(), name) is value


def test_a_word_that_is_neither_yes_nor_no_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_LLM_VRAM_MONITORING", "maybe")

    with pytest.raises(ConfigurationError) as caught:
        HydraSettings()

    assert str(caught.value) == (
        "HYDRA_LLM_VRAM_MONITORING='maybe': "
        "should be true or false (also 1 and 0, yes and no, on and off)"
    )


def test_the_longest_pause_is_not_shorter_than_the_first() -> None:
    with pytest.raises(ConfigurationError) as caught:
        HydraSettings(breaker_open_seconds=300)

    assert str(caught.value) == (
        "breaker_max_open_seconds: 120.0 is less than breaker_open_seconds, 300.0; "
        "raise one or lower one"
    )
    HydraSettings(breaker_open_seconds=300, breaker_max_open_seconds=300)


def test_a_long_value_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_LLM_MAX_QUEUE", "x" * 1000)

    with pytest.raises(ConfigurationError) as caught:
        HydraSettings()

    assert len(str(caught.value)) < 200


def test_verify_may_be_a_file_of_authorities(
    empty_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (empty_directory / "ca.pem").touch()
    monkeypatch.setenv("HYDRA_LLM_VERIFY", "ca.pem")

    assert HydraSettings().verify == "ca.pem"
    assert HydraSettings(verify=empty_directory / "ca.pem").verify == str(
        empty_directory / "ca.pem"
    )


def test_verify_may_be_a_context_made_in_python() -> None:
    context = ssl.create_default_context()
    settings = HydraSettings(verify=context)

    assert settings.verify is context
    assert settings == HydraSettings(verify=context) != HydraSettings()
    assert ("verify", "a TLS context", "argument") in describe_settings(settings)
    json.dumps(settings.model_dump(mode="json"))


@pytest.mark.parametrize("value", ["no.pem", ".", "", 2, None, ["ca.pem"], Path("no.pem")])
def test_verify_is_nothing_else(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^verify=.*: should be true, false, or the path"):
        HydraSettings(verify=value)


def test_the_seed_is_any_whole_number_or_none() -> None:
    assert [HydraSettings(random_seed=seed).random_seed for seed in (0, -3, None)] == [0, -3, None]


# --------------------------------------------------------------------- credentials


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://h", "redis://h"),
        ("redis://user:secret@h:6379/0", "redis://h:6379/0"),
        ("rediss://:secret@h/1?password=secret", "rediss://h/1"),
        ("unix:///run/redis.sock?password=secret", "unix:///run/redis.sock"),
    ],
)
def test_the_password_of_redis_is_kept_and_not_shown(url: str, shown: str) -> None:
    settings = HydraSettings(redis_url=url)

    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == url
    assert HydraSettings(redis_url=SecretStr(url)) == settings
    assert described(settings)["redis_url"] == shown
    assert "secret" not in f"{settings!r} {settings} {settings.model_dump_json()}"


@pytest.mark.parametrize(
    "url",
    ["secret", "http://:secret@h", "redis:", "", 5, "redis://:se/secret@h", "redis://:s#secret@h"],
)
def test_a_url_that_is_not_redis_is_an_error_that_does_not_show_it(url: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^redis_url: should ") as caught:
        HydraSettings(redis_url=url)

    assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_no_text_about_settings_shows_the_credentials_of_a_node() -> None:
    settings = HydraSettings(
        [
            "http://user:secret@one",
            {"url": "two", "headers": {"X-Key": "secret"}},
            Node("three", exporter="http://me:r'secret@three:9400/metrics"),
            {"url": "four", "exporter": "four:1", "exporter_headers": {"X-Token": "secret"}},
        ]
    )

    texts = f"{settings!r} {settings} {described(settings)} {settings.model_dump_json()}"

    assert "secret" not in texts
    assert "X-Key" in repr(settings)
    assert "exporter='http://three:9400/metrics'" in repr(settings)
    assert settings.nodes[3].exporter_headers == {"X-Token": "secret"}
    assert settings.nodes[1].headers == {"X-Key": "secret"}


def test_the_repr_has_what_is_not_default() -> None:
    assert repr(HydraSettings("rig,pc", max_queue=5)) == (
        "HydraSettings(nodes=[Node('http://rig:11434'), Node('http://pc:11434')], max_queue=5)"
    )


def test_described_nodes_have_their_ids() -> None:
    assert described(HydraSettings("rig,pc=http://10.0.0.5:1"))["nodes"] == (
        "http://rig:11434, pc=http://10.0.0.5:1"
    )


@pytest.mark.parametrize(
    "make",
    [
        HydraSettings,
        lambda url: HydraSettings([url]),
        lambda url: HydraSettings([{"url": url}]),
        lambda url: HydraSettings([f"rig={url}"]),
        lambda url: HydraSettings([{"url": "rig", "exporter": url}]),
        lambda url: Node("rig", exporter=url),
        lambda url: HydraSettings("rig", verify=url),
        lambda url: HydraSettings("rig", max_queue=url),
        lambda url: HydraSettings("rig", redis_url=url),
        lambda url: HydraSettings([{"url": "rig", "slots": url, "headers": {"a": 1, "b": url}}]),
    ],
)
@pytest.mark.parametrize(
    "url",
    [
        "ftp://user:secret@rig",
        "ftp://user:pa/secret@rig",
        "ftp://user:p@secret@rig",
        "http://user:p#secret@rig",
        "http://user:secret@rig:port",
        "ftp://user:secret,secret@rig",
        "user:secret@rig:port",
    ],
)
def test_no_error_shows_the_password_in_a_url(make: Callable[[str], Any], url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        make(url)

    assert "secret" not in "".join(traceback.format_exception(caught.value)).split("make(url)")[-1]


def test_a_password_with_a_comma_is_told_how_to_be_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HYDRA_LLM_NODES", "http://me:se,cret@rig")

    with pytest.raises(ConfigurationError) as caught:
        HydraSettings()

    assert "write a comma in a password as %2C" in str(caught.value)
    assert "me:se" not in str(caught.value)


# ---------------------------------------------------------------------- discovery


@pytest.mark.parametrize(
    ("text", "networks"),
    [
        ("192.168.1.0/24", ("192.168.1.0/24",)),
        (" 192.168.1.9/24 ,fd00::/120, 10.0.0.5 ", ("192.168.1.0/24", "fd00::/120", "10.0.0.5/32")),
        ("10.0.0.5,10.0.0.5/32", ("10.0.0.5/32",)),
    ],
)
def test_networks_are_a_list(
    monkeypatch: pytest.MonkeyPatch, toml: WriteToml, text: str, networks: tuple[str, ...]
) -> None:
    assert HydraSettings(discovery_networks=text).discovery_networks == networks
    toml(f"discovery_networks = {text.split(',')}")
    assert HydraSettings().discovery_networks == networks
    monkeypatch.setenv("HYDRA_LLM_DISCOVERY_NETWORKS", text)
    assert HydraSettings().discovery_networks == networks


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("rig", "write it like 192.168.1.0/24"),
        ("8.8.8.0/24", "not a private network"),
        ("10.0.0.0/8", "too many"),
        (7, "should be a list of networks"),
        ([7], "should be a list of networks"),
    ],
)
def test_networks_that_cannot_be_searched_are_told_at_once(value: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^discovery_networks=.*{says}"):
        HydraSettings(discovery_networks=value)


def test_ports_are_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    assert HydraSettings().discovery_ports == (11434,)
    assert HydraSettings(discovery_ports=11500).discovery_ports == (11500,)
    monkeypatch.setenv("HYDRA_LLM_DISCOVERY_PORTS", "11434, 11435,11434")
    assert HydraSettings().discovery_ports == (11434, 11435)


@pytest.mark.parametrize("value", ["", "0", "65536", "ollama", [], range(1, 18), True, [True]])
def test_ports_that_cannot_be_are_told(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^discovery_ports"):
        HydraSettings(discovery_ports=value)


def test_discovery_needs_a_network_and_says_how_to_name_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HYDRA_LLM_DISCOVERY_ENABLED", "yes")

    with pytest.raises(ConfigurationError) as caught:
        HydraSettings()

    assert str(caught.value) == (
        "HYDRA_LLM_DISCOVERY_ENABLED: it names no network to search; set "
        "HYDRA_LLM_DISCOVERY_NETWORKS, as 192.168.1.0/24, or discovery_networks in hydra.toml"
    )


def test_lists_go_to_another_process_as_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = HydraSettings(discovery_networks="10.0.0.0/30,fd00::/127", discovery_ports=[1, 2])
    for name, value in as_variables(settings, ["discovery_networks", "discovery_ports"]).items():
        monkeypatch.setenv(name, value)

    assert HydraSettings() == settings
