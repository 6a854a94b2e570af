"""``python -m tests.soak``: see docs/soak.md."""

from __future__ import annotations

import argparse
import random
import sys

from tests.soak.running import soak_for_real, soak_in_virtual_time


def main() -> int:
    """Soak, and exit with 1 where a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=None, help="of all that is drawn")
    parser.add_argument("--hours", type=float, default=24.0, help="virtual hours (24)")
    parser.add_argument("--real", action="store_true", help="over sockets and in real time")
    parser.add_argument("--minutes", type=float, default=10.0, help="real minutes (10)")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1_000_000) if given.seed is None else given.seed
    again = f"--real --minutes {given.minutes:g}" if given.real else f"--hours {given.hours:g}"
    again = f"python -m tests.soak {again} --seed {seed}"
    print(again, flush=True)

    def say(line: str) -> None:
        print(line, flush=True)

    if given.real:
        report = soak_for_real(given.minutes, seed, say=say)
    else:
        report = soak_in_virtual_time(given.hours, seed, say=say)
    print(report.text())
    if not report.is_good:
        print(f"again: {again}")
    return 0 if report.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
