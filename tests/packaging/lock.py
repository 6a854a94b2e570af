"""
The lock: exact versions of all that the developers' and CI environment is made of.

::

    python -m tests.packaging.lock python3.10 python3.13    # writes constraints.txt

It is a file of constraints and not of requirements: one file serves all Pythons, pip still installs
what `pyproject.toml` asks for, and people who install the package are not bound by it. What differs
between Pythons has a line for each. Hashes are not in it: with them pip would install neither this
project as editable nor a package for a platform on which the lock was not made.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "constraints.txt"
EXTRAS = ".[all,dev]"

HEADER = """\
# What the developers' and CI environment is made of; written by `make lock`, on Linux, with
# Python {pythons}. Nobody who installs hydra-llm is bound by it: what that
# needs stands in pyproject.toml.
"""


@dataclass(frozen=True, slots=True)
class Pin:
    """One line."""

    name: str
    version: str
    line: str
    requirement: Requirement

    @property
    def is_for_here(self) -> bool:
        """Whether it is meant for this Python."""
        return self.requirement.marker is None or self.requirement.marker.evaluate()


def pins(text: str) -> tuple[list[Pin], list[str]]:
    """The lines of a lock, and what is wrong with those that pin nothing."""
    found: list[Pin] = []
    problems: list[str] = []
    for line in map(str.strip, text.splitlines()):
        if not line or line.startswith("#"):
            continue
        try:
            asked = Requirement(line)
        except InvalidRequirement:
            problems.append(f"{line!r} is no requirement")
            continue
        exact = [one for one in asked.specifier if one.operator in ("==", "===")]
        if asked.url is not None:
            problems.append(f"{line!r} comes from a URL")
        elif len(asked.specifier) != 1 or not exact or "*" in exact[0].version or asked.extras:
            problems.append(f"{line!r} is not one exact version")
        else:
            found.append(Pin(canonicalize_name(asked.name), exact[0].version, line, asked))
    here = [pin.name for pin in found if pin.is_for_here]
    problems += [
        f"{name} is pinned twice" for name in sorted({n for n in here if here.count(n) > 1})
    ]
    return found, problems


# ------------------------------------------------------------------------- writing


def resolved(python: str) -> tuple[str, dict[str, str]]:
    """That Python's version, and what pip would install with it for all extras, newest first."""
    version = _said(python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    with tempfile.TemporaryDirectory() as folder:
        environment, report = Path(folder) / "venv", Path(folder) / "report.json"
        _said(python, "-m", "venv", str(environment))
        pip = str(environment / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"
        _said(*pip, "install", "--quiet", "--upgrade", "pip")
        asked = ("--dry-run", "--ignore-installed", "--quiet", "--report", str(report), EXTRAS)
        _said(*pip, "install", *asked)
        told = json.loads(report.read_text())
    found: dict[str, str] = {}
    for item in told["install"]:
        name = canonicalize_name(item["metadata"]["name"])
        if item.get("is_yanked"):
            raise SystemExit(f"{name} {item['metadata']['version']} was withdrawn; exclude it")
        if name != "hydra-llm":
            found[name] = item["metadata"]["version"]
    return version, found


def _said(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def text_of(by_python: Mapping[str, Mapping[str, str]]) -> str:
    """The lock, of what each Python needs; the oldest comes first."""
    lines = [HEADER.format(pythons=", ".join(by_python))]
    for name in sorted({name for found in by_python.values() for name in found}):
        versions = {python: found[name] for python, found in by_python.items() if name in found}
        lines += [f"{line}\n" for line in _lines(name, versions)]
    return "".join(lines)


def _lines(name: str, versions: Mapping[str, str]) -> Iterator[str]:
    """One line for each run of Pythons with the same version; the last is for later ones too."""
    if len(set(versions.values())) == 1:
        yield f"{name}=={next(iter(versions.values()))}"
        return
    runs = [(version, list(run)) for version, run in groupby(versions, versions.__getitem__)]
    for number, (version, run) in enumerate(runs):
        bounds = [f'python_version >= "{run[0]}"'] if number else []
        if number + 1 < len(runs):
            bounds.append(f'python_version < "{runs[number + 1][1][0]}"')
        yield f"{name}=={version}; {' and '.join(bounds)}"


def main(pythons: Iterable[str]) -> None:
    """Resolve for each Python, and write."""
    by_python: dict[str, dict[str, str]] = {}
    for python in pythons:
        print(f"lock: asking pip with {python}", flush=True)
        version, found = resolved(python)
        by_python[version] = found
    LOCK.write_text(text_of(by_python), encoding="utf-8")
    print(f"lock: {LOCK.name} is written")


if __name__ == "__main__":
    main(sys.argv[1:] or [sys.executable])
