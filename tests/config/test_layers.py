"""Where settings come from, and which of two wins."""

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.config import HydraSettings, describe_settings
from hydra_llm.exceptions import ConfigurationError
from tests.config.conftest import WriteToml

ALIASES = [
    ("SOLLOL_DISCOVERY_ENABLED", "discovery_enabled", "yes", True),
    ("SOLLOL_DISCOVERY_TIMEOUT", "discovery_timeout", "3.5", 3.5),
    ("SOLLOL_VRAM_MONITORING", "vram_monitoring", "off", False),
    ("SOLLOL_DASHBOARD_ENABLED", "dashboard_enabled", "1", True),
    ("SOLLOL_DASHBOARD_PORT", "dashboard_port", "9090", 9090),
    ("SOLLOL_HEALTH_CHECK_INTERVAL", "health_check_interval", "12", 12.0),
]
OTHERS = {
    "discovery_enabled": "no",
    "discovery_timeout": "4",
    "vram_monitoring": "on",
    "dashboard_enabled": "0",
    "dashboard_port": "9091",
    "health_check_interval": "13",
}


@pytest.fixture(autouse=True)
def a_network_to_search(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Without one, discovery cannot be turned on."""
    if "variable" in request.fixturenames:
        monkeypatch.setenv("HYDRA_LLM_DISCOVERY_NETWORKS", "192.168.1.0/24")


def source_of(settings: HydraSettings, name: str) -> str:
    return {row[0]: row[2] for row in describe_settings(settings)}[name]


def test_without_anything_every_setting_has_its_default() -> None:
    settings = HydraSettings()

    assert {source for _, _, source in describe_settings(settings)} == {"default"}
    assert [node.url for node in settings.nodes] == ["http://localhost:11434"]
    assert settings.config_file is None


def test_an_argument_beats_the_environment_beats_the_file_beats_the_default(
    toml: WriteToml, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, str]] = []

    def look(settings: HydraSettings) -> None:
        seen.append((settings.max_queue, source_of(settings, "max_queue")))

    look(HydraSettings())
    path = toml("max_queue = 7")
    look(HydraSettings())
    monkeypatch.setenv("HYDRA_LLM_MAX_QUEUE", "8")
    look(HydraSettings())
    look(HydraSettings(max_queue=9))

    assert seen == [
        (1000, "default"),
        (7, "hydra.toml"),
        (8, "HYDRA_LLM_MAX_QUEUE"),
        (9, "argument"),
    ]
    assert HydraSettings().config_file == Path(path.name)


def test_nodes_have_the_same_layers_and_ollama_host_below_them(
    toml: WriteToml, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, str, bool]] = []

    def look(settings: HydraSettings) -> None:
        seen.append((settings.nodes[0].host, settings.nodes_source, settings.nodes_configured))

    look(HydraSettings())
    monkeypatch.setenv("OLLAMA_HOST", "host")
    look(HydraSettings())
    toml('[[nodes]]\nurl = "http://file:11434"')
    look(HydraSettings())
    monkeypatch.setenv("HYDRA_LLM_NODES", "variable")
    look(HydraSettings())
    look(HydraSettings("argument"))
    look(HydraSettings(nodes=None))

    assert seen == [
        ("localhost", "default", False),
        ("host", "OLLAMA_HOST", True),
        ("file", "hydra.toml", True),
        ("variable", "HYDRA_LLM_NODES", True),
        ("argument", "argument", True),
        ("variable", "HYDRA_LLM_NODES", True),
    ]


def test_a_weaker_layer_is_not_checked_where_a_stronger_one_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HYDRA_LLM_MAX_QUEUE", "many")
    monkeypatch.setenv("HYDRA_LLM_NODES", "ftp://rig")

    assert HydraSettings("rig", max_queue=1).max_queue == 1


# ------------------------------------------------------------------ environment


@pytest.mark.parametrize(("variable", "name", "text", "value"), ALIASES)
def test_an_older_name_is_read(
    monkeypatch: pytest.MonkeyPatch, variable: str, name: str, text: str, value: object
) -> None:
    monkeypatch.setenv(variable, text)

    settings = HydraSettings()

    assert getattr(settings, name) == value
    assert source_of(settings, name) == variable


@pytest.mark.parametrize(
    ("variable", "name", "text", "other"),
    [(variable, name, text, OTHERS[name]) for variable, name, text, _ in ALIASES],
)
def test_our_name_beats_the_older_one(
    monkeypatch: pytest.MonkeyPatch, variable: str, name: str, text: str, other: str
) -> None:
    monkeypatch.setenv(variable, other)
    alone = getattr(HydraSettings(), name)
    monkeypatch.setenv(f"HYDRA_LLM_{name.upper()}", text)
    both = HydraSettings()

    assert getattr(both, name) != alone
    assert source_of(both, name) == f"HYDRA_LLM_{name.upper()}"


@pytest.mark.parametrize("variable", [variable for variable, *_ in ALIASES])
def test_a_wrong_value_is_blamed_on_the_older_name_if_it_stood_there(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "perhaps")

    with pytest.raises(ConfigurationError, match=f"^{variable}='perhaps': should be "):
        HydraSettings()


def test_an_older_name_beats_the_file(toml: WriteToml, monkeypatch: pytest.MonkeyPatch) -> None:
    toml("dashboard_port = 1")
    monkeypatch.setenv("SOLLOL_DASHBOARD_PORT", "2")

    assert HydraSettings().dashboard_port == 2


def test_other_variables_of_the_older_name_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLLOL_MAX_QUEUE", "5")
    monkeypatch.setenv("SOLLOL_ANYTHING", "5")

    assert HydraSettings().max_queue == 1000


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch, empty: str) -> None:
    for name in ("MAX_QUEUE", "NODES", "REDIS_URL", "CONFIG", "NO_SUCH_SETTING"):
        monkeypatch.setenv(f"HYDRA_LLM_{name}", empty)
    monkeypatch.setenv("OLLAMA_HOST", empty)

    assert {source for _, _, source in describe_settings(HydraSettings())} == {"default"}


@pytest.mark.skipif(os.name == "nt", reason="names have no case there")
def test_names_of_variables_may_be_in_small_letters_and_capitals_win(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("hydra_llm_max_queue", "5")
    assert HydraSettings().max_queue == 5

    monkeypatch.setenv("HYDRA_LLM_MAX_QUEUE", "6")
    assert HydraSettings().max_queue == 6


def test_a_variable_without_our_prefix_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://another")
    monkeypatch.setenv("VERIFY", "off")

    settings = HydraSettings()

    assert settings.redis_url is None
    assert settings.verify is True


def test_no_dotenv_file_is_read(empty_directory: Path) -> None:
    (empty_directory / ".env").write_text("HYDRA_LLM_MAX_QUEUE=5")

    assert HydraSettings().max_queue == 1000


# ------------------------------------------------------------------- misspellings


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("HYDRA_LLM_NODE", "HYDRA_LLM_NODES"),
        ("hydra_llm_nodse", "HYDRA_LLM_NODES"),
        ("HYDRA_LLM_MAXQUEUE", "HYDRA_LLM_MAX_QUEUE"),
        ("HYDRA_LLM_COFNIG", "HYDRA_LLM_CONFIG"),
        ("HYDRA_LLM_VRAM_MONITOR", "HYDRA_LLM_VRAM_MONITORING"),
    ],
)
def test_a_misspelt_variable_is_an_error_that_names_the_nearest(
    monkeypatch: pytest.MonkeyPatch, wrong: str, right: str
) -> None:
    monkeypatch.setenv(wrong, "http://user:secret@rig")

    with pytest.raises(ConfigurationError) as caught:
        HydraSettings(max_queue=1)

    assert str(caught.value) == f"unknown variable {wrong.upper()}; did you mean {right}?"


def test_a_variable_that_is_like_no_other_has_no_suggestion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HYDRA_LLM_XYZ", "1")

    with pytest.raises(ConfigurationError, match=r"XYZ; no setting is called anything like it$"):
        HydraSettings()


def test_a_misspelt_key_in_the_file_is_an_error_that_names_the_nearest(toml: WriteToml) -> None:
    toml("max-queu = 3")

    with pytest.raises(ConfigurationError) as caught:
        HydraSettings()

    assert str(caught.value) == "hydra.toml: unknown key max-queu; did you mean max_queue?"


@pytest.mark.parametrize("name", ["max_queu", "_env_file", "nodes_source"])
def test_a_misspelt_argument_is_an_error(name: str) -> None:
    arguments: dict[str, Any] = {name: 1}
    with pytest.raises(ConfigurationError, match=f"^unknown argument {name}; "):
        HydraSettings(**arguments)


def test_all_problems_are_told_at_once_each_with_its_place(
    toml: WriteToml, monkeypatch: pytest.MonkeyPatch
) -> None:
    toml('lease_ttl = "long"\nqueue = 1\n[[nodes]]\nurl = "rig"\nvramgb = 24')
    monkeypatch.setenv("HYDRA_LLM_DASHBOARD_PORT", "70000")
    monkeypatch.setenv("HYDRA_LLM_NODE", "x")

    with pytest.raises(ConfigurationError) as caught:
        HydraSettings(max_queue=-1)

    first, *lines = str(caught.value).splitlines()
    assert first == "6 problems in the settings:"
    assert sorted(lines) == [
        "  HYDRA_LLM_DASHBOARD_PORT='70000': should be less than or equal to 65535",
        "  hydra.toml: lease_ttl = 'long': should be a valid number, "
        "unable to parse string as a number",
        "  hydra.toml: nodes: unknown key vramgb; did you mean vram_gb?",
        "  hydra.toml: unknown key queue; did you mean max_queue?",
        "  max_queue=-1: should be greater than or equal to 0",
        "  unknown variable HYDRA_LLM_NODE; did you mean HYDRA_LLM_NODES?",
    ]
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


# --------------------------------------------------------------------------- file


def test_the_file_can_be_named(empty_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (empty_directory / "hydra.toml").write_text("max_queue = 1")
    (empty_directory / "other.toml").write_text("retry_floor = 2")
    monkeypatch.setenv("HYDRA_LLM_CONFIG", "other.toml")

    settings = HydraSettings()

    assert (settings.max_queue, settings.retry_floor) == (1000, 2)
    assert settings.config_file == Path("other.toml")


def test_the_named_file_may_stand_in_the_home_directory(
    empty_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(empty_directory))
    monkeypatch.setenv("USERPROFILE", str(empty_directory))
    (empty_directory / "mine.toml").write_text("max_queue = 1")
    monkeypatch.setenv("HYDRA_LLM_CONFIG", "~/mine.toml")

    assert HydraSettings().max_queue == 1


def test_a_named_file_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_LLM_CONFIG", "no.toml")

    with pytest.raises(ConfigurationError) as caught:
        HydraSettings()

    assert str(caught.value) == "HYDRA_LLM_CONFIG=no.toml: there is no such file"


def test_a_directory_is_no_file(empty_directory: Path) -> None:
    (empty_directory / "hydra.toml").mkdir()

    with pytest.raises(ConfigurationError, match=r"^hydra\.toml: it cannot be read \("):
        HydraSettings()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("max_queue = ", 1),
        ("max_queue = 1\n\nretry_floor 2\n", 3),
        ("max_queue = 1\nmax_queue = 2\n", 2),
        ('[[nodes]]\nurl = "http://user:secret@rig\n', 2),
    ],
)
def test_an_error_in_the_file_has_its_line(toml: WriteToml, text: str, line: int) -> None:
    toml(text)

    with pytest.raises(ConfigurationError) as caught:
        HydraSettings()

    assert str(caught.value).startswith("hydra.toml: ")
    assert f"at line {line}," in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_in_another_encoding_is_an_error_with_its_line(empty_directory: Path) -> None:
    (empty_directory / "hydra.toml").write_bytes(b"verify = true\n# caf\xe9\n")

    with pytest.raises(ConfigurationError) as caught:
        HydraSettings()

    assert str(caught.value) == "hydra.toml: it is not UTF-8 (at line 2)"


def test_a_file_from_windows_can_be_read(empty_directory: Path) -> None:
    (empty_directory / "hydra.toml").write_bytes(
        b"\xef\xbb\xbfmax_queue = 1\r\nretry_floor = 2\r\n"
    )

    assert HydraSettings().retry_floor == 2


# ----------------------------------------------------------------------- as a value


def test_settings_are_frozen() -> None:
    settings = HydraSettings()

    with pytest.raises(ValueError, match="frozen"):
        settings.max_queue = 5  # type: ignore[misc]


def test_settings_are_equal_wherever_they_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    given = HydraSettings("rig", max_queue=5)
    monkeypatch.setenv("HYDRA_LLM_MAX_QUEUE", "5")
    monkeypatch.setenv("HYDRA_LLM_NODES", "rig")

    assert given == HydraSettings()
    assert hash(given) == hash(HydraSettings())
    assert given != HydraSettings(max_queue=6)
    assert HydraSettings(redis_url="redis://:a@h") != HydraSettings(redis_url="redis://:b@h")
    assert given != "rig"


def test_settings_can_be_copied_and_pickled() -> None:
    settings = HydraSettings("http://u:p@rig", redis_url="redis://:pw@h")

    for twin in (pickle.loads(pickle.dumps(settings)), copy.deepcopy(settings)):  # noqa: S301  our own
        assert twin == settings
        assert twin.nodes_source == "argument"
        assert describe_settings(twin) == describe_settings(settings)


def test_settings_can_be_made_from_a_dump() -> None:
    settings = HydraSettings(["a=http://u:secret@rig"], redis_url="redis://:secret@h", max_queue=5)

    assert HydraSettings(**settings.model_dump()) == settings
    assert "secret" not in str(settings.model_dump())
