"""The lock pins everything, and the audit of it can fail."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.packaging import audit
from tests.packaging.audit import advisories, advisory_problems, lock_problems, read_report
from tests.packaging.lock import LOCK, pins, text_of

PROJECT: dict[str, Any] = {
    "dependencies": ["httpx>=0.27,<1"],
    "optional-dependencies": {"dev": ["pytest>=8.3"], "all": ["hydra-llm[dev]"]},
}


@pytest.fixture(scope="module")
def text() -> str:
    return LOCK.read_text(encoding="utf-8")


def without(text: str, name: str) -> str:
    lines = text.splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(f"{name}==")]
    assert kept != lines
    return "".join(kept)


def with_line(text: str, name: str, line: str) -> str:
    return f"{without(text, name)}{line}\n"


def test_every_line_is_one_exact_version(text: str) -> None:
    found, problems = pins(text)

    assert problems == []
    assert len(found) > 100
    assert "hydra-llm" not in {pin.name for pin in found}


def test_every_python_that_we_run_on_has_a_version_of_everything(text: str) -> None:
    found, _ = pins(text)
    for version in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        pinned = [
            pin.name
            for pin in found
            if pin.requirement.marker is None
            or pin.requirement.marker.evaluate({"python_version": version})
        ]
        assert sorted(pinned) == sorted({pin.name for pin in found})


def test_a_lock_is_written_in_runs_of_pythons() -> None:
    newest = {"a": "2", "b": "5"}
    told = {"3.10": {"a": "1", "b": "5", "c": "7"}, "3.11": newest, "3.12": {**newest, "b": "6"}}

    assert [line for line in text_of(told).splitlines() if not line.startswith("#")] == [
        'a==1; python_version < "3.11"',
        'a==2; python_version >= "3.11"',
        'b==5; python_version < "3.12"',
        'b==6; python_version >= "3.12"',
        "c==7",
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "h11 is not pinned for this Python"),
        ("h11", "is not one exact version"),
        ("h11>=0.16", "is not one exact version"),
        ("h11==0.*", "is not one exact version"),
        ("h11 @ https://example.com/h11.zip", "comes from a URL"),
        ("h11==0.16.0\nh11==0.15.0", "h11 is pinned twice"),
        ("h11==0.0.1", "h11 .* is installed, but 0.0.1 is pinned"),
        ("-r other.txt", "is no requirement"),
        ('h11==0.16.0; python_version < "3"', "h11 is not pinned for this Python"),
    ],
)
def test_a_lock_that_pins_less_is_found_out(text: str, line: str, says: str) -> None:
    problems = lock_problems(with_line(text, "h11", line), PROJECT)

    assert any(re.search(says, problem) for problem in problems), problems


def test_what_is_asked_for_has_to_fit_what_is_pinned(text: str) -> None:
    too_new = {**PROJECT, "dependencies": ["httpx>=99"]}
    by_url = {**PROJECT, "dependencies": ["h11 @ https://example.com/x.zip"]}

    [problem] = lock_problems(text, too_new, is_strict=False)
    assert "is not httpx>=99, which is asked for" in problem
    assert "h11 of pyproject.toml comes from a URL" in lock_problems(text, by_url, is_strict=False)


def test_another_version_is_no_problem_where_the_locks_could_not_be_had(text: str) -> None:
    other = with_line(text, "h11", "h11==0.16.9")

    assert lock_problems(other, PROJECT, is_strict=False) == []


# ----------------------------------------------------------------------- advisories


def report(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": packages, "fixes": []})


SKIPPED = {"name": "x", "skip_reason": "Dependency not found"}
GOOD = {"name": "y", "version": "1", "vulns": []}
BAD = {"name": "z", "version": "2", "vulns": [{"id": "PYSEC-1", "fix_versions": []}]}


def test_a_report_in_which_all_is_skipped_is_no_good_news() -> None:
    assert read_report(report(SKIPPED)) is None
    assert read_report("") is None
    assert read_report("[]") is None
    assert read_report(report(SKIPPED, GOOD)) == {}
    assert read_report(report(GOOD, BAD)) == {"PYSEC-1": "z 2"}


def test_known_vulnerabilities_fail_unless_they_are_accepted_for_a_reason() -> None:
    assert advisory_problems({"PYSEC-1": "z 2"}, {}) == ["z 2: PYSEC-1"]
    assert advisory_problems({"PYSEC-1": "z 2"}, {"PYSEC-1": "never called"}) == []
    [stale] = advisory_problems({}, {"PYSEC-1": "never called"})
    assert "not reported any more" in stale
    assert all(len(reason.split()) > 3 for reason in audit.ACCEPTED.values())


def fake(folder: Path, knows: dict[str, str]) -> str:
    """A Python whose pip-audit knows of these vulnerabilities."""
    script = folder / "python"
    script.write_text(
        f"""#!{sys.executable}
import json, sys
asked = open(sys.argv[sys.argv.index("--requirement") + 1]).read().split()
knows = {knows!r}
told = []
for line in asked:
    name, version = line.split("==")
    vulns = [{{"id": knows[name]}}] if name in knows else []
    told.append({{"name": name, "version": version, "vulns": vulns}})
print(json.dumps({{"dependencies": told}}))
"""
    )
    script.chmod(0o755)
    return str(script)


@pytest.mark.skipif(sys.platform == "win32", reason="the fake is a script with a first line")
def test_who_knows_nothing_of_the_canary_is_not_believed(tmp_path: Path) -> None:
    assert advisories(fake(tmp_path, {"h11": "PYSEC-9"}), "h11==0.16.0\n") is None
    knows = {"pycrypto": "PYSEC-1", "h11": "PYSEC-9"}
    assert advisories(fake(tmp_path, knows), "h11==0.16.0\n") == {"PYSEC-9": "h11 0.16.0"}
    assert advisories(fake(tmp_path, {"pycrypto": "PYSEC-1"}), "h11==0.16.0\n") == {}


def test_without_pip_audit_nobody_is_asked(tmp_path: Path) -> None:
    assert advisories(str(tmp_path / "python"), "h11==0.16.0\n") is None
