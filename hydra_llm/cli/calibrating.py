"""``hydra-llm calibration``: how far off predictions were, from a log or a replayed load."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hydra_llm.calibration.errors import (
    COLD,
    COLD_ANSWERS,
    SMALL_SECONDS,
    Calibration,
    TermErrors,
    calibrate,
)
from hydra_llm.calibration.errors import Group as Answers
from hydra_llm.calibration.records import Record, read_records
from hydra_llm.cli.console import print_json, stdout
from hydra_llm.cli.simulating import progress
from hydra_llm.cli.tables import plain_table
from hydra_llm.replay.clusters import find_cluster
from hydra_llm.replay.running import HYDRA, KNOWING, replay
from hydra_llm.replay.workload import read_load
from hydra_llm.scheduling import TERMS


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What was asked for on the command line; a load is replayed unless there are logs."""

    logs: Sequence[Path]
    trace: str
    cluster: str
    seeds: int
    first_seed: int
    rate: float | None
    requests: int | None
    knows_lengths: bool


def show(wanted: Wanted, *, by_model: bool, by_node: bool, as_json: bool) -> bool:
    """Show it; whether there was anything to compare."""
    records, source = _of_logs(wanted.logs) if wanted.logs else _of_replay(wanted)
    found = calibrate(records, by_model=by_model, by_node=by_node)
    if as_json:
        print_json({"source": source, **found.to_dict()})
    else:
        stdout().print(view(found, source))
    return bool(found.groups)


def _of_logs(paths: Sequence[Path]) -> tuple[list[Record], str]:
    records = [record for path in paths for record in read_records(path)]
    return records, ", ".join(str(path) for path in paths)


def _of_replay(wanted: Wanted) -> tuple[list[Record], str]:
    load = read_load(wanted.trace, rate=wanted.rate, requests=wanted.requests)
    cluster = find_cluster(wanted.cluster)
    policy = KNOWING if wanted.knows_lengths else HYDRA
    records: list[Record] = []
    with progress(wanted.seeds) as told, tempfile.TemporaryDirectory() as folder:
        for seed in range(wanted.first_seed, wanted.first_seed + wanted.seeds):
            told(f"{cluster.name}, seed {seed}")
            asked = load.requests(cluster.shares, seed=seed, num_ctx=cluster.num_ctx)
            path = Path(folder) / f"{seed}.jsonl"
            replay(cluster, asked, policy, seed=seed, settings={"decision_log": path})
            records += read_records(path)
    knowing = "; lengths of answers are told" if wanted.knows_lengths else ""
    many = f"{wanted.seeds} seed{'s' if wanted.seeds > 1 else ''}"
    return records, f"{load}; {cluster.name}, {many}, from cold{knowing}"


# ----------------------------------------------------------------------- what is shown


def view(found: Calibration, source: str) -> RenderableType:
    """For people: a table a group, and how to read them."""
    parts: list[RenderableType] = [Text(source, style="dim")]
    for group in found.groups:
        parts += [Text(), Text(_title(group), style="bold"), _table(group)]
    if found.groups:
        parts += [Text(), *(Text(line, style="dim") for line in _legend())]
    else:
        parts += [Text(), Text("no whole answer with a prediction to compare", style="yellow")]
    if found.left_out:
        parts.append(Text(f"{found.left_out} requests without an outcome left out", style="dim"))
    return Group(*parts)


def _title(group: Answers) -> str:
    whose = ", ".join(name for name in (group.model, group.node) if name is not None)
    when = f"the first {COLD_ANSWERS}" if group.stage == COLD else f"after {COLD_ANSWERS}"
    stage = f"{when} answers of a model from a node"
    count = f"{group.answers} answer{'s' if group.answers > 1 else ''}"
    return f"{whose + ': ' if whose else ''}{stage} ({count})"


def _table(group: Answers) -> Table:
    table = plain_table()
    table.add_column("term")
    for name in ("count", "error", "p90", "bias", "mean off", "small", "off by"):
        table.add_column(name, justify="right")
    for name, errors in group.terms.items():
        if errors.off is not None:
            table.add_row(*map(Text, _cells(name, errors)))
    return table


def _cells(name: str, errors: TermErrors) -> Iterator[str]:
    unit = "" if name.endswith("_tokens") else " s"
    yield TERMS[name]
    yield str(errors.count)
    yield _share(errors.error)
    yield _share(errors.p90)
    yield _share(errors.bias, sign="+")
    yield "–" if errors.off is None else f"{errors.off:.{0 if not unit else 2}f}{unit}"
    yield str(errors.small) if errors.small else "–"
    yield "–" if errors.small_off_ms is None else f"{errors.small_off_ms:.0f} ms"


def _share(value: float | None, *, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.0%}".replace("-", "−")


def _legend() -> Iterator[str]:
    limit = f"{SMALL_SECONDS * 1000:.0f} ms"
    yield "error: median of |predicted − actual| ÷ actual; bias: with its sign, + for too much"
    yield "mean off: of all answers; what a term has in the error of the whole answer"
    yield f"small: took less than {limit}, and are off by so many milliseconds (median)"
