"""Fuzzes by hand, for as long as one likes: the same targets as in the suite.

::

    python -m tests.fuzz.byhand                       # all targets, a minute in all
    python -m tests.fuzz.byhand api page --seconds 600 --seed 7
    python -m tests.fuzz.byhand api --only 1234       # one seed again

With atheris (``pip install atheris``; Linux and macOS), which follows the code's branches, one
target at a time and for ever, until Ctrl-C or what libFuzzer is told after ``--``::

    python -m tests.fuzz.byhand api --atheris -- -max_total_time=600 -max_len=20000

It ends with status 1 if anything was found, and prints how to see it again.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import time
import traceback
from random import Random
from typing import Any

# atheris has to see modules before they are loaded, so the targets are imported where needed.


class Fed(Random):
    """Draws from a fuzzer's bytes; zeros when they have run out."""

    def __new__(cls, data: bytes) -> Fed:
        return super().__new__(cls)

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data = data
        self._at = 0

    def getrandbits(self, k: int, /) -> int:
        """As Random's."""
        count = -(-k // 8)
        taken = self._data[self._at : self._at + count].ljust(count, b"\0")
        self._at += count
        return int.from_bytes(taken, "little") & ((1 << k) - 1)

    def random(self) -> float:
        """As Random's."""
        return self.getrandbits(16) / (1 << 16)


def plain(names: list[str], seconds: float, first: int, only: int | None) -> int:
    """Seed after seed, each target for its share of the time; how many faults there were."""
    from tests.fuzz.targets import TARGETS

    faults = 0
    for name in names or list(TARGETS):
        until = time.monotonic() + seconds / len(names or TARGETS)
        seed, slowest, seen = first if only is None else only, 0.0, set()
        while time.monotonic() < until:
            began = time.perf_counter()
            try:
                TARGETS[name](Random(seed))
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                if (kind := (type(error), where.filename, where.lineno)) not in seen:
                    seen.add(kind)
                    traceback.print_exc()
                    print(f"again: python -m tests.fuzz.byhand {name} --only {seed}")
            slowest = max(slowest, time.perf_counter() - began)
            seed += 1
            if only is not None:
                break
        faults += len(seen)
        print(
            f"{name}: {seed - (first if only is None else only)} seeds, slowest {slowest:.3f} s, "
            f"{len(seen)} faults"
        )
    return faults


def guided(name: str, arguments: list[str]) -> None:
    """By atheris; it does not return."""
    atheris: Any = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["hydra_llm"]):
        target = importlib.import_module("tests.fuzz.targets").TARGETS[name]

    def once(data: bytes) -> None:
        target(Fed(data))

    atheris.Setup([sys.argv[0], *arguments], once)
    atheris.Fuzz()


def main() -> int:
    """Run it."""
    arguments, _, rest = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", help="names in tests/fuzz/targets.py; all of them")
    parser.add_argument("--seconds", type=float, default=60.0, help="in all")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--only", type=int, help="one seed, to see it again")
    parser.add_argument("--atheris", action="store_true", help="guided, one target")
    given = parser.parse_args(arguments.split())
    logging.disable(logging.CRITICAL)
    if given.atheris:
        if len(given.targets) != 1:
            parser.error("--atheris takes one target")
        guided(given.targets[0], rest.split())
    return 1 if plain(given.targets, given.seconds, given.seed, given.only) else 0


if __name__ == "__main__":
    sys.exit(main())
