"""
Checks the lock, and asks whether anything in it is known to be vulnerable.

::

    python -m tests.packaging.audit

1. `constraints.txt` has one exact version for everything that any extra of ours brings, and what is
   installed here is that.
2. pip-audit, from an environment of its own, finds no known vulnerability that is not in
   :data:`ACCEPTED`. Where advisories cannot be had, as without a network or behind a mirror that
   has none, it says so and the lock alone was checked.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.packaging.lock import LOCK, ROOT, Pin, pins

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ACCEPTED: dict[str, str] = {}
"""Advisories by id that do not concern us, each with the reason. One that is no longer reported is
an error, so that the list stays as short as it can be."""

CANARY = "pycrypto", "2.6.1"
"""A package that nobody mends: who reports nothing of it has no advisories to give."""

SECONDS = 180

FALLEN_BACK = ROOT / ".venv" / ".newest"
"""Written by `make` where not all of the lock's versions could be had."""


# ------------------------------------------------------------------------- the lock


def lock_problems(text: str, project: dict[str, Any], *, is_strict: bool = True) -> list[str]:
    """
    What is wrong with a lock.

    Args:
        text: of `constraints.txt`.
        project: of `pyproject.toml`.
        is_strict: whether what is installed has to be what is pinned.
    """
    found, problems = pins(text)
    pinned = {pin.name: pin for pin in found if pin.is_for_here}
    problems += [
        f"{one.name} of pyproject.toml comes from a URL"
        for one in _all_requirements(project)
        if one.url is not None
    ]
    for name, asked in _closure(project).items():
        pin = pinned.get(name)
        if pin is None:
            problems.append(f"{name} is not pinned for this Python; run `make lock`")
            continue
        problems += [
            f"{pin.line} is not {one}, which is asked for; run `make lock`"
            for one in asked
            if not one.specifier.contains(pin.version, prereleases=True)
        ]
        installed = _installed(name)
        if is_strict and installed is not None and installed != pin.version:
            problems.append(f"{name} {installed} is installed, but {pin.version} is pinned")
    return problems


def _all_requirements(project: dict[str, Any]) -> Iterator[Requirement]:
    extras = project["optional-dependencies"].values()
    for text in (*project["dependencies"], *(one for extra in extras for one in extra)):
        yield Requirement(text)


def _closure(project: dict[str, Any]) -> dict[str, list[Requirement]]:
    """All that our extras bring here, by name, with what is asked of it; as far as installed."""
    asked: dict[str, list[Requirement]] = {}
    waiting = [(one, "") for one in _all_requirements(project)]
    seen: set[tuple[str, str]] = set()
    while waiting:
        one, extra = waiting.pop()
        name = canonicalize_name(one.name)
        if name == "hydra-llm" or not _applies(one, extra):
            continue
        asked.setdefault(name, []).append(one)
        for wanted in ("", *one.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(needed, wanted) for needed in _needs(name)]
    return asked


def _applies(asked: Requirement, extra: str) -> bool:
    return asked.marker is None or asked.marker.evaluate({"extra": extra})


def _needs(name: str) -> list[Requirement]:
    try:
        return [Requirement(text) for text in metadata.requires(name) or ()]
    except metadata.PackageNotFoundError:
        return []


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# ----------------------------------------------------------------------- advisories


def advisories(python: str, text: str) -> dict[str, str] | None:
    """
    What is known of a lock's packages: by advisory, the package; None if nobody can be asked.

    Args:
        python: of an environment with pip-audit.
        text: requirements, each with one exact version.
    """
    if not _reported(python, "{}=={}\n".format(*CANARY)):
        return None
    return _reported(python, text)


def _reported(python: str, text: str) -> dict[str, str] | None:
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "requirements.txt"
        asked.write_text(text, encoding="utf-8")
        command = ("-m", "pip_audit", "--requirement", str(asked), "--no-deps", "--disable-pip")
        how = ("--format", "json", "--progress-spinner", "off", "--timeout", "10")
        try:
            done = subprocess.run(
                [python, *command, *how],
                capture_output=True,
                text=True,
                check=False,
                timeout=SECONDS,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
    return read_report(done.stdout)


def read_report(text: str) -> dict[str, str] | None:
    """pip-audit's JSON; None if it could tell nothing of any package."""
    try:
        told = json.loads(text)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return None
    audited = [one for one in told if "vulns" in one]
    if not audited:
        return None  # pip-audit itself calls that "no known vulnerabilities"
    return {
        vulnerability["id"]: f"{one['name']} {one['version']}"
        for one in audited
        for vulnerability in one["vulns"]
    }


def advisory_problems(found: dict[str, str], accepted: dict[str, str]) -> list[str]:
    """What is known and not accepted, and what is accepted and no longer known."""
    return [
        *(f"{package}: {one}" for one, package in sorted(found.items()) if one not in accepted),
        *(f"{one} is accepted, but not reported any more" for one in accepted if one not in found),
    ]


def for_here(found: list[Pin]) -> str:
    """The lines that are meant for this Python, without their markers."""
    return "".join(f"{pin.name}=={pin.version}\n" for pin in found if pin.is_for_here)


def main(python: str) -> int:
    """Check, say what was checked, and return the exit code."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = LOCK.read_text(encoding="utf-8")
    is_strict = not FALLEN_BACK.exists()
    problems = lock_problems(text, project, is_strict=is_strict)
    for problem in problems:
        print(f"audit: {problem}")
    if not is_strict:
        print("audit: not all of the lock's versions could be had here, others are installed")
    known = advisories(python, for_here(pins(text)[0]))
    if known is None:
        print("audit: advisories could not be fetched, only the lock was checked")
    else:
        told = advisory_problems(known, ACCEPTED)
        for problem in told:
            print(f"audit: {problem}")
        problems += told
        print(f"audit: {len(known)} advisories concern the lock, {len(ACCEPTED)} are accepted")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
