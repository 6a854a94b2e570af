"""What is written into hydra.toml, and what is left as it stands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.cli.nodesfile import NodesFile
from hydra_llm.config import HydraSettings
from hydra_llm.discovery import FoundExporter, FoundNode
from hydra_llm.exceptions import ConfigurationError
from hydra_llm.types import GB, Node

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DCGM = FoundExporter(
    url="http://10.0.0.5:9400/metrics",
    name="dcgm-exporter",
    gpus=1,
    total_bytes=24 * GB,
    uuids=frozenset(),
)


def found(url: str = "http://10.0.0.5:11434", *more: str, **about: Any) -> FoundNode:
    return FoundNode(urls=(url, *more), **{"version": "0.32.15", "models": ("a", "b"), **about})


def added_to(path: Path, *nodes: FoundNode) -> bytes:
    file = NodesFile.read(path)
    file.add(file.missing(nodes))
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hydra.toml"


def test_a_new_file_is_what_the_settings_read(path: Path) -> None:
    added_to(path, found(exporter=DCGM), found("http://[fd00::5]:11500"))

    settings = HydraSettings()
    assert settings.nodes == (
        Node("http://10.0.0.5:11434", exporter="http://10.0.0.5:9400/metrics"),
        Node("http://[fd00::5]:11500"),
    )
    assert settings.nodes_source == "hydra.toml"


@pytest.mark.parametrize(
    "before",
    [
        b"",
        b"max_queue = 7",
        b"max_queue = 7\n",
        b"# mine\r\nmax_queue = 7\r\n\r\n[[nodes]]\r\nurl='http://rig:11434'\r\n",
        b"\xef\xbb\xbfmax_queue=7  # odd   \t\n\n\n",
        b'[[nodes]]\nurl = "http://rig:11434"\n[nodes.headers]\nAuthorization = "Bearer k"\n',
        b'[[nodes]]\nurl = "http://rig:11434"  # no newline at the end',
    ],
)
def test_what_stands_in_a_file_stays_byte_for_byte(path: Path, before: bytes) -> None:
    path.write_bytes(before)

    after = added_to(path, found())

    assert after.startswith(before)
    assert len(after) > len(before)
    urls = [node.url for node in HydraSettings().nodes]
    assert urls == (["http://rig:11434"] if b"rig" in before else []) + ["http://10.0.0.5:11434"]
    if b"\r\n" in before:
        assert after.count(b"\n") == after.count(b"\r\n")


def test_only_what_is_missing_is_added(path: Path) -> None:
    path.write_text('[[nodes]]\nurl = "http://10.0.0.5:11434/"\nid = "rig"\n')
    one = Node("http://rig:11434")
    there = found(), found("http://10.0.0.4:11434", "http://10.0.0.5:11434")

    file = NodesFile.read(path)

    assert file.missing(there) == []
    # Known, but from elsewhere: the file lacks it.
    assert len(file.missing([found("http://10.0.0.6:11434", known=(one,))])) == 1
    by_name = found("http://10.0.0.6:11434", known=file.nodes)
    assert file.missing([by_name]) == []


def test_a_doubtful_twin_stands_in_a_comment(path: Path) -> None:
    twin = found("http://[fd00::5]:11434", perhaps_same_as=("http://10.0.0.5:11434",))

    text = added_to(path, found(), twin).decode()

    assert [node.url for node in HydraSettings().nodes] == ["http://10.0.0.5:11434"]
    assert '# url = "http://[fd00::5]:11434"' in text
    # As it says: without the marks it is a node.
    body = text.replace("# [[", "[[").replace("# url", "url")
    assert len(tomllib.loads(body)["nodes"]) == 2


def test_an_exporter_that_wants_a_login_stands_in_a_comment(path: Path) -> None:
    text = added_to(path, found(locked_exporters=("http://10.0.0.5:9936/metrics",))).decode()

    assert HydraSettings().nodes[0].exporter is None
    assert '# exporter = "http://10.0.0.5:9936/metrics"  # it wants a login' in text


def test_nothing_that_a_stranger_says_gets_out_of_its_comment(path: Path) -> None:
    from hydra_llm.discovery.answers import plain

    added_to(path, found(version=plain('1\n[[nodes]]\nurl = "http://evil:1"\r\x85\u2028x')))

    assert [node.url for node in HydraSettings().nodes] == ["http://10.0.0.5:11434"]


@pytest.mark.parametrize(
    "before",
    ['nodes = ["http://rig:11434"]\n', 'nodes = [{url = "http://rig:11434"}]\n', "nodes = 'rig'\n"],
)
def test_nodes_in_another_form_are_left_alone_and_it_is_said(path: Path, before: str) -> None:
    path.write_text(before)

    with pytest.raises(ConfigurationError, match=r"no \[\[nodes\]\] tables.*by hand"):
        added_to(path, found())
    assert path.read_text() == before


def test_a_name_that_another_node_has_is_told(path: Path) -> None:
    before = '[[nodes]]\nurl = "http://rig:11434"\nid = "10.0.0.5:11434"\n'
    path.write_text(before)

    with pytest.raises(ConfigurationError, match="nothing can be added"):
        added_to(path, found())
    assert path.read_text() == before


@pytest.mark.parametrize("before", [b"not toml", b"\xff\xfe", b"[[nodes]]\nurl = 7\n"])
def test_a_file_that_cannot_be_read_is_told_before_anything_is_done(
    path: Path, before: bytes
) -> None:
    path.write_bytes(before)

    with pytest.raises(ConfigurationError, match=r"hydra\.toml"):
        NodesFile.read(path)


def test_a_file_made_meanwhile_is_not_overwritten(path: Path) -> None:
    file = NodesFile.read(path)
    path.write_text("max_queue = 7\n")

    with pytest.raises(ConfigurationError, match="made meanwhile"):
        file.add([found()])
    assert path.read_text() == "max_queue = 7\n"


def test_a_file_changed_meanwhile_is_not_added_to(path: Path) -> None:
    path.write_text("max_queue = 7\n")
    file = NodesFile.read(path)
    path.write_text("max_queue = 8\n")

    with pytest.raises(ConfigurationError, match="changed meanwhile"):
        file.add([found()])
    assert path.read_text() == "max_queue = 8\n"


def test_a_place_that_cannot_be_written_is_told(path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be written"):
        NodesFile.read(path.parent / "no" / "hydra.toml").add([found()])
    with pytest.raises(ConfigurationError, match="cannot be read"):
        NodesFile.read(path.parent)
