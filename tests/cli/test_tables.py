import io
import random
import re
from typing import Any

import pytest
from rich.console import Console, RenderableType

from hydra_llm.cli.tables import age, decision_view, in_words, nodes_summary, nodes_table
from hydra_llm.exceptions import NoEligibleNodeError
from hydra_llm.scheduling import Moment, RoutingDecision, Scheduler
from hydra_llm.types import GB, InferenceRequest, NodeSnapshot
from tests.helpers import BIG, LLAMA, request, snapshot


def shown(view: RenderableType, *, width: int = 120) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def decided(asked: InferenceRequest, *nodes: NodeSnapshot) -> RoutingDecision:
    try:
        choice = Scheduler().schedule(asked, nodes, Moment(), random.Random(1))
    except NoEligibleNodeError as refusal:
        return RoutingDecision(model=asked.model, refusal=refusal)
    return RoutingDecision(model=asked.model, choice=choice)


def resources(**about: Any) -> dict[str, Any]:
    return {
        "id": "rack",
        "is_local": False,
        "version": "0.32.15",
        "labels": [],
        "health": "up",
        "health_reason": "",
        "cordoned": False,
        "circuit": "closed",
        "load_path_stuck": False,
        "vram_total_gb": 24.0,
        "vram_available_gb": 13.8,
        "vram_source": "nvml",
        "vram_age_s": 3.2,
        "devices": [],
        "loaded_models": [],
        "in_flight": 2,
        **about,
    }


# --------------------------------------------------------------------------- nodes


def test_a_node_is_shown_with_memory_source_age_models_and_requests() -> None:
    model = {"name": LLAMA, "size_gb": 3.1, "vram_gb": 3.1, "context_length": 8192}
    text = shown(nodes_table([resources(loaded_models=[model], labels=["fast"])], width=120))

    assert "13.8 of 24.0 GB" in text
    assert "nvml, 3 s ago" in text
    assert "llama3.2:3b  3.1 GB, ctx 8192" in text.replace("   ", "  ")
    assert "fast" in text
    assert "2" in text.splitlines()[2]


def test_unknown_memory_is_never_shown_as_zero() -> None:
    text = shown(nodes_table([resources(vram_available_gb=None, vram_total_gb=None)]))

    assert "unknown" in text
    assert "set vram_gb" in text
    assert "0.0" not in text


def test_memory_seen_in_use_is_shown_as_a_lower_bound() -> None:
    text = shown(nodes_table([resources(vram_available_gb=None, vram_total_gb=4.1)]))

    assert "4.1 GB or more in all" in text


def test_a_node_that_is_down_is_shown_with_its_reason() -> None:
    text = shown(nodes_table([resources(health="down", health_reason="connection refused")]))

    assert "connection refused" in text
    assert "13.8" not in text


@pytest.mark.parametrize(
    ("state", "word"),
    [
        ({"cordoned": True}, "cordoned"),
        ({"circuit": "open"}, "circuit open"),
        ({"load_path_stuck": True}, "loads stuck"),
        ({"vram_total_gb": 0, "vram_available_gb": 0}, "none, CPU only"),
    ],
)
def test_what_keeps_requests_away_is_shown(state: dict[str, Any], word: str) -> None:
    assert word in shown(nodes_table([resources(**state)]))


def test_a_model_partly_in_system_memory_says_so() -> None:
    model = {"name": LLAMA, "size_gb": 4.0, "vram_gb": 1.0, "context_length": None}

    text = shown(nodes_table([resources(loaded_models=[model])], width=120))
    assert "25% on GPU" in text
    assert "ctx unknown" in text


def test_the_summary_counts_nodes_and_memory_that_is_known() -> None:
    nodes = [
        resources(),
        resources(vram_available_gb=None),
        resources(health="down", vram_available_gb=9.0),
    ]

    said, _, legend = nodes_summary(nodes).plain.partition("; ")
    assert said == "2 of 3 nodes up, 13.8 GB VRAM free (1 unknown)"
    assert legend == "█ models, ▓ others, ░ free"


def bars_of(**about: Any) -> list[str]:
    text = shown(nodes_table([resources(**about)]))
    return re.findall(r"[█▓░]+(?: [\d.]+)?", text)


def gpu(used: float | None, *held: tuple[str, float], total: float = 24.0) -> dict[str, Any]:
    processes = [{"pid": 1, "name": "", "owner": who, "used_gb": gb} for who, gb in held]
    return {"total_gb": total, "used_gb": used, "processes": processes if held else None}


def test_who_has_the_memory_is_a_bar_a_gpu() -> None:
    devices = [gpu(12.0, ("ollama", 6.0), ("other", 6.0)), gpu(24.0, ("ollama", 24.0)), gpu(0.0)]

    assert bars_of(devices=devices) == ["███▓▓▓░░░░░░ 12.0", "████████████ 24.0", "░" * 12 + " 0.0"]


def test_the_largest_of_other_programs_are_named() -> None:
    def held(name: str, used: float, owner: str = "other") -> dict[str, Any]:
        return {"pid": 7, "name": name, "owner": owner, "used_gb": used}

    first = gpu(20.0) | {
        "processes": [held("blender", 3.0), held("ollama", 9.0, "ollama"), held("", 1.5)]
    }
    second = gpu(20.0) | {"processes": [held("blender", 2.2), held("x", 0.4), held("y", 0.2)]}

    text = shown(nodes_table([resources(devices=[first, second])]))

    assert re.findall(r"(PID 7|\S+) (\d\.\d) GB *\n", text)[-3:] == [
        ("blender", "5.2"),
        ("PID 7", "1.5"),
        ("x", "0.4"),
    ]
    assert "ollama 9" not in text
    assert " y " not in text


def test_where_nobody_tells_whose_it_is_it_is_not_said_to_be_the_models() -> None:
    assert bars_of(devices=[gpu(6.0)]) == ["▓▓▓░░░░░░░░░"]


def test_a_node_without_such_a_source_has_a_bar_of_what_ps_shows() -> None:
    model = {"name": LLAMA, "size_gb": 6.0, "vram_gb": 6.0, "context_length": 4096}

    assert bars_of(loaded_models=[model], vram_available_gb=12.0) == ["███▓▓▓░░░░░░"]


def test_where_the_free_memory_is_unknown_there_is_no_bar() -> None:
    assert bars_of(vram_available_gb=None) == []
    assert bars_of(devices=[gpu(None)], vram_available_gb=None) == []


def test_names_from_nodes_are_no_markup() -> None:
    assert "[red]evil[/red]" in shown(nodes_table([resources(id="[red]evil[/red]")]))


@pytest.mark.parametrize(
    ("seconds", "words"), [(None, "never"), (0.2, "now"), (42.0, "42 s ago"), (300.0, "5 min ago")]
)
def test_an_age_is_told_in_words(seconds: float | None, words: str) -> None:
    assert age(seconds) == words


def test_short_times_are_told_in_milliseconds() -> None:
    assert (in_words(0.012), in_words(2.34)) == ("12 ms", "2.3 s")


# ------------------------------------------------------------------------ decisions


def test_a_decision_shows_every_candidate_with_its_terms_and_every_rejection() -> None:
    decision = decided(
        request(BIG),
        snapshot("rack", models=(BIG,)),
        snapshot("gaming", models=(BIG,), warm=(BIG,)),
        snapshot("attic", health="down", health_reason="connection refused"),
        snapshot("pc"),
    )

    text = shown(decision_view(decision, width=120))
    lines = {
        line.split()[1]: line for line in text.splitlines() if line[:1] in "→✗ " and line.strip()
    }
    assert lines["gaming"].startswith("→")
    assert "load" in text
    assert "decode" in text
    assert "connection refused" in lines["attic"]
    assert "without the model" in lines["pc"]
    assert "needs" in text


def test_terms_that_cost_nobody_anything_are_left_out() -> None:
    decision = decided(request(), snapshot("a", warm=(LLAMA,)), snapshot("b", warm=(LLAMA,)))

    assert "eviction" not in shown(decision_view(decision, width=120))


def test_a_narrow_terminal_keeps_every_word_of_the_reasons() -> None:
    decision = decided(
        request(min_vram_bytes=35 * GB),
        snapshot("workstation-downstairs", local=True, free_vram_gb=1.5),
        snapshot("attic", health="down", health_reason="no route to host"),
    )

    text = shown(decision_view(decision, width=60), width=60)
    assert max(len(line) for line in text.splitlines()) <= 60
    assert "…" not in text
    for row in decision.rows():
        for word in row["note"].replace(",", " ").split():
            assert word in text
    assert "preference" in text


def test_nobody_is_told_as_nobody() -> None:
    decision = decided(request(BIG), snapshot("a"), snapshot("b"))

    text = " ".join(shown(decision_view(decision, width=120)).split())
    assert "✗ 0/2 nodes can take 'mistral-small:24b': 2 without the model" in text


def test_a_wish_given_up_is_marked() -> None:
    decision = decided(request(min_vram_bytes=35 * GB), snapshot("a"), snapshot("b"))

    assert "! " in shown(decision_view(decision, width=120))
