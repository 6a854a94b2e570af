"""``hydra-llm simulate``: what routing would do to a load, on machines that one may not have."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from hydra_llm.cli.console import NotInstalledError, print_json, stderr, stdout
from hydra_llm.cli.tables import plain_table
from hydra_llm.exceptions import ConfigurationError
from hydra_llm.replay import plotting
from hydra_llm.replay.clusters import Machines, add_machine, find_cluster
from hydra_llm.replay.measures import Figure, Measured, measured
from hydra_llm.replay.running import HYDRA, POLICIES, Run, replay
from hydra_llm.replay.workload import PoissonLoad, TraceLoad, read_load, read_priorities

USUAL_POLICIES = (HYDRA, "least-connections", "hand-placed")
EVERY = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What was asked for on the command line."""

    trace: str
    cluster: str
    policies: Sequence[str]
    seeds: int
    first_seed: int
    rate: float | None
    requests: int | None
    zipf: float | None
    shift: bool
    priorities: str | None
    slo_s: float
    add: Sequence[str]
    sockets: float | None


def simulate(wanted: Wanted, *, by_priority: bool, plot: Path | None, as_json: bool) -> None:
    """Run everything, and show it."""
    if plot is not None:
        try:
            plotting.check_plot(plot)
        except ImportError as exc:
            raise NotInstalledError(
                "--plot needs matplotlib: pip install 'hydra-llm[plot]'"
            ) from exc
    load = read_load(
        wanted.trace,
        rate=wanted.rate,
        requests=wanted.requests,
        zipf=wanted.zipf,
        shift=wanted.shift,
        priorities=None if wanted.priorities is None else read_priorities(wanted.priorities),
    )
    clusters = _clusters(wanted)
    policies = _policies(wanted.policies, is_about_cluster=len(clusters) > 1)
    results = _results(load, clusters, policies, wanted)
    found = [one for one, _ in results]
    if as_json:
        print_json(document(load, found, wanted))
    else:
        stdout().print(view(load, found, wanted, by_priority=by_priority))
    if plot is not None:
        plotting.draw(plot, results, title=str(load))
        stderr().print(Text(f"wrote {plot}"))


def _clusters(wanted: Wanted) -> list[Machines]:
    now = find_cluster(wanted.cluster)
    then = now
    for text in wanted.add:
        then = add_machine(then, text)
    if then is now:
        return [now]
    added = " and ".join(text.partition("=")[0] for text in wanted.add)
    return [now, replace(then, name=f"with {added}")]


def _policies(given: Sequence[str], *, is_about_cluster: bool) -> tuple[str, ...]:
    names = [name.strip() for text in given for name in text.split(",") if name.strip()]
    if not names:
        return (HYDRA,) if is_about_cluster else USUAL_POLICIES
    if EVERY in names:
        return POLICIES
    for name in names:
        if name not in POLICIES:
            raise ConfigurationError(
                f"--policy {name!r}: there are {', '.join(POLICIES)}, and {EVERY}"
            )
    return tuple(dict.fromkeys(names))


def _results(
    load: PoissonLoad | TraceLoad,
    clusters: Sequence[Machines],
    policies: Sequence[str],
    wanted: Wanted,
) -> list[tuple[Measured, list[Run]]]:
    results: list[tuple[Measured, list[Run]]] = []
    seeds = range(wanted.first_seed, wanted.first_seed + wanted.seeds)
    with progress(len(clusters) * len(policies) * wanted.seeds) as told:
        for policy in policies:
            for cluster in clusters:
                runs = []
                for seed in seeds:
                    told(f"{policy}, {cluster.name}, seed {seed}")
                    asked = load.requests(cluster.shares, seed=seed, num_ctx=cluster.num_ctx)
                    runs.append(replay(cluster, asked, policy, seed=seed, speed=wanted.sockets))
                one = measured(runs, cluster=cluster.name, slo_s=wanted.slo_s)
                results.append((one, runs))
    return results


@contextmanager
def progress(total: int) -> Iterator[Any]:
    """A bar on stderr; what it gives is called before each of ``total`` runs, with its name."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeElapsedColumn(), console=stderr(), transient=True)
    with bar:
        task = bar.add_task("", total=total)
        begun = 0

        def told(what: str) -> None:
            nonlocal begun
            bar.update(task, description=what, completed=begun, refresh=True)
            begun += 1

        yield told


# ----------------------------------------------------------------------- what is shown


def document(
    load: PoissonLoad | TraceLoad, found: Sequence[Measured], wanted: Wanted
) -> dict[str, Any]:
    """For programs."""
    return {
        "load": str(load),
        "cluster": wanted.cluster,
        "added": list(wanted.add),
        "seeds": list(range(wanted.first_seed, wanted.first_seed + wanted.seeds)),
        "slo_s": wanted.slo_s,
        "sockets": wanted.sockets,
        "results": [one.to_dict() for one in found],
    }


def view(
    load: PoissonLoad | TraceLoad,
    found: Sequence[Measured],
    wanted: Wanted,
    *,
    by_priority: bool,
) -> RenderableType:
    """For people: two tables, and what to make of them."""
    slo_s = wanted.slo_s
    seeds = len(found[0].figures["loads"].values)
    head = f"{load}; {seeds} seed{'s' if seeds > 1 else ''}, from cold"
    if wanted.sockets is not None:
        head += f"; over sockets, {wanted.sockets:g} times as fast as in life"
    parts: list[RenderableType] = [Text(head, style="dim"), Text()]
    parts += [_first_tokens(found, slo_s), Text(), _whole_answers(found)]
    if by_priority:
        parts += [Text(), _by_priority(found)]
    if seeds > 1:
        parts += [Text(), Text("± is the 95 % interval of the mean over the seeds", style="dim")]
    if len({one.cluster for one in found}) > 1:
        parts += [Text(), *_what_it_brings(found, slo_s)]
    return Group(*parts)


def _labels(found: Sequence[Measured]) -> list[tuple[str, ...]]:
    several = len({one.cluster for one in found}) > 1
    return [(one.policy, one.cluster) if several else (one.policy,) for one in found]


def _table(found: Sequence[Measured], *columns: str) -> Table:
    table = plain_table()
    table.add_column("policy", overflow="fold")
    if len(_labels(found)[0]) > 1:
        table.add_column("cluster", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _first_tokens(found: Sequence[Measured], slo_s: float) -> RenderableType:
    names = ("first token, s", "p50", "p95", "p99", f"in {slo_s:g} s")
    table = _table(found, *names)
    for label, one in zip(_labels(found), found, strict=True):
        figures = one.figures
        table.add_row(
            *map(Text, label),
            _with_interval(figures["first_mean"]),
            _number(figures["first_p50"].mean),
            _with_interval(figures["first_p95"]),
            _with_interval(figures["first_p99"]),
            f"{figures['in_time'].mean:.1%}",
        )
    return table


def _whole_answers(found: Sequence[Measured]) -> RenderableType:
    names = ("whole answer, s", "p50", "p95", "p99", "loads", "evicted", "errors")
    table = _table(found, *names)
    for label, one in zip(_labels(found), found, strict=True):
        figures = one.figures
        table.add_row(
            *map(Text, label),
            _with_interval(figures["whole_mean"]),
            *(_number(figures[f"whole_{share}"].mean) for share in ("p50", "p95", "p99")),
            *(_number(figures[name].mean, 1) for name in ("loads", "evictions", "errors")),
        )
    return table


def _by_priority(found: Sequence[Measured]) -> RenderableType:
    names = ("priority", "requests", "first token, s", "p50", "p95", "p99", "errors")
    table = _table(found, *names)
    for label, one in zip(_labels(found), found, strict=True):
        for rank, figures in one.priorities.items():
            table.add_row(
                *map(Text, label),
                str(rank),
                _number(figures["requests"].mean, 0),
                *(
                    _number(figures[f"first_{share}"].mean)
                    for share in ("mean", "p50", "p95", "p99")
                ),
                _number(figures["errors"].mean, 1),
            )
    return table


def _number(value: float, digits: int = 2) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _with_interval(figure: Figure) -> str:
    half = figure.half
    return _number(figure.mean) + ("" if half is None else f" ±{half:.2f}")


def _what_it_brings(found: Sequence[Measured], slo_s: float) -> Iterator[Text]:
    """A sentence a policy: the same requests, without and with what is added."""
    for before, after in zip(found[::2], found[1::2], strict=True):
        old, new = before.figures["first_p95"], after.figures["first_p95"]
        pairs = list(zip(old.values, new.values, strict=False))
        better = sum(b < a for a, b in pairs)
        text = Text.assemble(("→ ", "bold green" if better * 2 > len(pairs) else "bold yellow"))
        text.append(
            f"{after.cluster}, {after.policy}: 95 % of first tokens within {new.mean:.1f} s "
            f"instead of {old.mean:.1f} s ({_change(old.mean, new.mean)}), "
            f"sooner with {better} of {len(pairs)} seeds; "
            f"{after.figures['in_time'].mean:.1%} in {slo_s:g} s instead of "
            f"{before.figures['in_time'].mean:.1%}"
        )
        yield text


def _change(old: float, new: float) -> str:
    return f"{(new - old) / old:+.0%}".replace("-", "−") if old else "no change"
