"""Where learned rates are kept."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.config import HydraSettings, _user_state_dir
from hydra_llm.exceptions import ConfigurationError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's home, of which no variable says anything."""
    for name in ("XDG_STATE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("platform", "folder"),
    [
        ("linux", ".local/state/hydra-llm"),
        ("freebsd14", ".local/state/hydra-llm"),
        ("darwin", "Library/Application Support/hydra-llm"),
        ("win32", "AppData/Local/hydra-llm"),
    ],
)
def test_each_system_has_its_place(
    home: Path, monkeypatch: pytest.MonkeyPatch, platform: str, folder: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)

    assert _user_state_dir() == home / folder


@pytest.mark.parametrize(
    ("platform", "variable"),
    [("linux", "XDG_STATE_HOME"), ("darwin", "XDG_STATE_HOME"), ("win32", "LOCALAPPDATA")],
)
def test_a_variable_names_another(
    home: Path, monkeypatch: pytest.MonkeyPatch, platform: str, variable: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv(variable, str(home / "elsewhere"))

    assert _user_state_dir() == home / "elsewhere" / "hydra-llm"


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_relative_state_home_is_passed_over(
    home: Path, monkeypatch: pytest.MonkeyPatch, platform: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("XDG_STATE_HOME", "state")

    assert home in (_user_state_dir() or Path()).parents


def test_a_user_without_a_home_keeps_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)

    assert _user_state_dir() is None


def test_the_file_is_in_the_users_folder_or_in_that_of_the_settings(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_llm.config._user_state_dir", lambda: home / "ours")

    assert HydraSettings().rates_file == home / "ours" / "rates.json"
    assert HydraSettings(state_dir="~").rates_file == home / "rates.json"
    assert HydraSettings(state_dir=home / "x").rates_file == home / "x" / "rates.json"
    assert HydraSettings(state_dir=home / "x", keep_rates=False).rates_file is None


@pytest.mark.parametrize("text", ["0", "false", "No", "off"])
def test_a_variable_switches_it_off(home: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HYDRA_LLM_STATE_DIR", str(home))
    assert HydraSettings().rates_file is not None

    monkeypatch.setenv("HYDRA_LLM_KEEP_RATES", text)
    assert HydraSettings().rates_file is None


def test_a_relative_folder_stays_where_it_was_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = HydraSettings(state_dir="here")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    assert settings.rates_file == tmp_path / "here" / "rates.json"


@pytest.mark.parametrize("value", [7, b"x", ["x"], "~nobody-of-that-name/x"])
def test_what_is_no_folder_is_said_so(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="should be the path of a folder"):
        HydraSettings(state_dir=value)
