"""What the programs beside have in common."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor


def processes(jobs: int) -> ProcessPoolExecutor:
    """A pool of so many. Not forked: a run has threads."""
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
