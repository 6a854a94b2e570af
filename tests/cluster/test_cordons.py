"""Which nodes an operator has taken out of use, for all routers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from hydra_llm.cluster.cordons import MAX_BYTES, CordonsFile
from tests.cluster.ledgers import ledger, seen

RIG = "http://rig:11434"


@pytest.fixture
def file(tmp_path: Path) -> CordonsFile:
    return CordonsFile(tmp_path / "folder" / "cordoned.json")


def test_a_file_that_is_not_there_cordons_nobody(file: CordonsFile) -> None:
    assert file.read() == frozenset()


def test_what_one_writes_another_reads(file: CordonsFile) -> None:
    other = CordonsFile(file.path)
    assert other.read() == frozenset()

    file.change(RIG, cordoned=True)
    file.change("http://pc:11434", cordoned=True)
    assert other.read() == {RIG, "http://pc:11434"}

    other.change(RIG, cordoned=False)
    assert file.read() == {"http://pc:11434"}
    file.path.unlink()
    assert file.read() == frozenset()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_it_is_for_its_owners_eyes(file: CordonsFile) -> None:
    file.change(RIG, cordoned=True)

    assert file.path.stat().st_mode & 0o077 == 0
    assert os.listdir(file.path.parent) == ["cordoned.json"]  # noqa: PTH208


BROKEN = {
    "torn": b'{"hydra_llm_cordoned": 1, "nod',
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "another's": b'{"nodes": ["http://rig:11434"]}',
    "a newer one": b'{"hydra_llm_cordoned": 2, "nodes": ["http://rig:11434"]}',
    "a list": b"[]",
    "wrong": b'{"hydra_llm_cordoned": 1, "nodes": 7}',
    "bytes": b"\xff\xfe",
    "too long": b" " * (MAX_BYTES + 1),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_cannot_be_read_changes_nothing(file: CordonsFile, data: bytes) -> None:
    fresh = CordonsFile(file.path)
    file.change(RIG, cordoned=True)
    assert file.read() == {RIG}
    file.path.write_bytes(data)

    assert file.read() == {RIG}
    assert fresh.read() == frozenset()
    with pytest.raises(ValueError):  # noqa: PT011  # json's own, and ours
        file.change(RIG, cordoned=False)
    assert file.path.read_bytes() == data


def test_what_is_no_text_is_passed_over(file: CordonsFile) -> None:
    file.path.parent.mkdir()
    file.path.write_text(json.dumps({"hydra_llm_cordoned": 1, "nodes": [7, None, RIG]}))

    assert file.read() == {RIG}


def test_each_who_cordons_has_to_let_go() -> None:
    cluster = ledger(seen("a"), seen("b"))

    def cordoned() -> list[str]:
        return [node.id for node in cluster.nodes() if node.cordoned]

    cluster.set_cordons("file", {"a"})
    cluster.set_cordoned("a", True)
    cluster.set_cordons("Redis", {"a", "b"})
    assert cordoned() == ["a", "b"]
    cluster.set_cordons("file", set())
    cluster.set_cordoned("a", False)
    assert cordoned() == ["a", "b"]
    cluster.set_cordons("Redis", {"b"})
    assert cordoned() == ["b"]
