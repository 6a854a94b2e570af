"""docs/configuration.md says what is."""

import re
from dataclasses import fields

import pytest

from hydra_llm.config import OLDER_NAMES, HydraSettings, settings_table
from hydra_llm.exceptions import ConfigurationError
from hydra_llm.types import Node
from tests.config.conftest import WriteToml
from tests.config.table import PAGE, with_table

TEXT = PAGE.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_every_setting_has_its_row() -> None:
    for row in settings_table():
        lines = [line for line in TEXT.splitlines() if line.startswith(f"| `{row.name}` | `HYDRA")]
        assert len(lines) == 1, row.name
        cells = [cell.strip().strip("`") for cell in lines[0].strip("|").split("|")]
        assert cells == list(row)


def test_the_table_is_the_one_that_the_code_gives() -> None:
    assert with_table(TEXT) == TEXT, "write it anew: python -m tests.config.table"


def test_every_setting_has_a_meaning() -> None:
    assert [row.name for row in settings_table()] == list(HydraSettings.model_fields)
    assert [row.name for row in settings_table() if not row.meaning.endswith(".")] == []


def test_every_argument_of_a_node_has_its_row() -> None:
    assert re.findall(r"^\| `(\w+)`", section("Nodes"), flags=re.MULTILINE) == [
        each.name for each in fields(Node)
    ]


def test_every_older_name_has_its_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|$", section("Older names"), flags=re.MULTILINE)

    assert rows == [
        (f"SOLLOL_{name.upper()}", f"HYDRA_LLM_{name.upper()}") for name in sorted(OLDER_NAMES)
    ]


def test_the_file_can_be_read(toml: WriteToml) -> None:
    for block in blocks("toml"):
        toml(block)
        assert HydraSettings().nodes_source == "hydra.toml"


def test_the_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks("python"):
        exec(compile(block, str(PAGE), "exec"), {})  # noqa: S102  our own page

    assert "max_queue 50 argument\n" in capsys.readouterr().out


def test_the_variable_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    (name, value), *others = re.findall(r'^export (\w+)="(.*)"$', TEXT, flags=re.MULTILINE)
    assert not others
    monkeypatch.setenv(name, value)

    assert [node.id for node in HydraSettings().nodes] == ["rig:11434", "pc"]


def test_the_problems_are_told_like_that(toml: WriteToml, monkeypatch: pytest.MonkeyPatch) -> None:
    toml("max_queu = 1")
    monkeypatch.setenv("HYDRA_LLM_NODE", "rig")
    monkeypatch.setenv("HYDRA_LLM_DASHBOARD_PORT", "70000")

    with pytest.raises(ConfigurationError) as caught:
        HydraSettings()

    assert [f"{caught.value}\n"] == blocks("text")
