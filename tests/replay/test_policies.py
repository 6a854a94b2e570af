"""Rules of others: each chooses as its original does, by what that can know."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from hydra_llm.replay.clusters import find_cluster
from hydra_llm.replay.placing import Placed, Wanted, place_by_hand
from hydra_llm.replay.policies import RULES, Answered, Rule, Seen, Told
from hydra_llm.replay.workload import Asked

GB = 1_000_000_000
MODEL = "llama3.1:8b"
SIZES = {MODEL: 5 * GB, "big:32b": 20 * GB}


def asked(model: str = MODEL, *, input_tokens: int = 100) -> Asked:
    return Asked(number=0, at=0.0, model=model, input_tokens=input_tokens, output_tokens=50)


def seen(name: str, *, vram_gb: int = 24, in_flight: int = 0, **loaded_gb: int) -> Seen:
    loaded = {MODEL if key == "model" else key: size * GB for key, size in loaded_gb.items()}
    return Seen(name, vram_gb * GB, in_flight, Counter({MODEL: in_flight}), loaded)


def rule(name: str, placed: Placed | None = None) -> Rule:
    return RULES[name](random.Random(1), Told(SIZES, lambda: placed or Placed({})))


def answered(seconds: float, *, at: float = 0.0, ok: bool = True) -> Answered:
    return Answered(ok, seconds, seconds, at)


def chosen(
    rule: Rule, nodes: list[Seen], *, now: float = 0.0, input_tokens: int = 100
) -> Counter[str]:
    request = asked(input_tokens=input_tokens)
    return Counter(rule.choose(request, nodes, now).id for _ in range(60))


def test_random_takes_any() -> None:
    assert set(chosen(rule("random"), [seen("a", in_flight=9), seen("b")])) == {"a", "b"}


def test_round_robin_takes_one_after_the_other() -> None:
    nodes = [seen("a", in_flight=9), seen("b"), seen("c")]

    assert chosen(rule("round-robin"), nodes) == {"a": 20, "b": 20, "c": 20}


def test_least_connections_counts_requests_and_draws_among_equals() -> None:
    nodes = [seen("a", in_flight=1, model=5), seen("b"), seen("c")]

    assert set(chosen(rule("least-connections"), nodes)) == {"b", "c"}


def test_p2c_takes_the_better_of_two_by_latency_times_requests() -> None:
    p2c = rule("p2c-ewma")
    fast, slow = seen("fast"), seen("slow")
    p2c.told(asked(), fast, answered(1.0))
    p2c.told(asked(), slow, answered(10.0))

    assert set(chosen(p2c, [fast, slow])) == {"fast"}
    fast.in_flight = 19
    assert set(chosen(p2c, [fast, slow])) == {"slow"}


def test_p2c_rises_at_once_and_forgets_slowly() -> None:
    p2c = rule("p2c-ewma")
    one, other = seen("one"), seen("other")
    for seconds in (1.0, 1.0, 1.0, 30.0):
        p2c.told(asked(), one, answered(seconds))
    p2c.told(asked(), other, answered(20.0))
    assert set(chosen(p2c, [one, other])) == {"other"}

    p2c.told(asked(), one, answered(0.1, at=30.0))
    p2c.told(asked(), other, answered(20.0, at=30.0))
    assert set(chosen(p2c, [one, other], now=30.0)) == {"one"}


def test_warm_first_goes_where_the_model_is_however_many_wait() -> None:
    nodes = [seen("warm", in_flight=50, model=5), seen("cold")]

    assert set(chosen(rule("warm-first"), nodes)) == {"warm"}
    assert set(chosen(rule("warm-first"), [seen("a", in_flight=1), seen("b")])) == {"b"}


def test_the_additive_score_weighs_warmth_against_the_line() -> None:
    additive = rule("additive")
    warm = seen("warm", model=5)
    assert set(chosen(additive, [warm, seen("cold")])) == {"warm"}

    # A line of five costs thirty; that is not what a loaded model is worth.
    warm.in_flight = 50
    assert set(chosen(additive, [warm, seen("cold")])) == {"warm"}
    # With slow answers besides it is.
    for _ in range(5):
        additive.told(asked(), warm, answered(60.0))
    assert set(chosen(additive, [warm, seen("cold")])) == {"cold"}


def test_the_additive_score_has_room_for_large_models_on_large_nodes() -> None:
    nodes = [seen("large", vram_gb=24), seen("small", vram_gb=8)]

    assert rule("additive").choose(asked("big:32b"), nodes, 0.0).id == "large"


def test_sollol_gives_a_loaded_model_half_more() -> None:
    assert set(chosen(rule("sollol"), [seen("cold"), seen("warm", model=5)])) == {"warm"}
    # The first among equals.
    assert set(chosen(rule("sollol"), [seen("a"), seen("b")])) == {"a"}


def test_sollol_turns_from_a_node_whose_answers_took_long() -> None:
    sollol = rule("sollol")
    warm = seen("warm", model=5)
    sollol.told(asked(), warm, answered(0.3))

    assert set(chosen(sollol, [seen("cold"), warm])) == {"cold"}


def test_sollol_takes_a_remote_node_with_nothing_loaded_for_one_without_a_gpu() -> None:
    nodes = [seen("empty"), seen("other", other=3)]

    assert set(chosen(rule("sollol"), nodes, input_tokens=900)) == {"other"}


def test_least_busy_counts_for_each_model_and_takes_the_first() -> None:
    busy = seen("a", in_flight=9)
    busy.of_model = Counter({"big:32b": 9})

    assert set(chosen(rule("litellm-least-busy"), [busy, seen("b")])) == {"a"}
    assert set(chosen(rule("litellm-least-busy"), [seen("a", in_flight=1), seen("b")])) == {"b"}


def test_latency_based_tries_what_it_does_not_know_and_then_keeps_to_the_best() -> None:
    latency = rule("litellm-latency")
    one, other = seen("one"), seen("other")
    latency.told(asked(), one, answered(1.0))
    assert set(chosen(latency, [one, other])) == {"other"}

    latency.told(asked(), other, answered(5.0))
    assert set(chosen(latency, [one, other])) == {"one"}
    # Ten answers are remembered, failed ones are not.
    for _ in range(10):
        latency.told(asked(), other, answered(0.5))
    latency.told(asked(), other, answered(60.0, ok=False))
    assert set(chosen(latency, [one, other])) == {"other"}


def test_hand_placed_goes_to_the_shortest_line_among_those_meant() -> None:
    placed = Placed({MODEL: {"a": 1.0, "b": 2.0}})
    by_hand = rule("hand-placed", placed)
    nodes = [seen("a"), seen("b"), seen("c")]

    first = [by_hand.choose(asked(), nodes, 0.0).id for _ in range(5)]
    assert first.count("a") in (3, 4)
    assert "c" not in first
    for _ in range(first.count("a")):
        by_hand.told(asked(), nodes[0], answered(1.0))
    assert by_hand.choose(asked(), nodes, 0.0).id == "a"


# --------------------------------------------------------------------- by hand


def wanted(**rates: float) -> dict[str, Wanted]:
    names = {
        "tiny": "qwen3:1.7b",
        "small": "llama3.2:3b",
        "middle": MODEL,
        "large": "qwen3:14b",
        "huge": "qwen3:32b",
    }
    return {names[key]: Wanted(rate, 300.0, 150.0) for key, rate in rates.items()}


def test_everything_has_a_place_where_it_fits() -> None:
    cluster = find_cluster("24+24+12+8")
    load = wanted(tiny=0.05, small=0.1, middle=0.2, large=0.07, huge=0.04)
    placed = place_by_hand(cluster, load)

    assert all(placed.seconds[model] for model in load)
    (holder,) = placed.seconds["qwen3:32b"]
    assert holder.endswith("24gb")
    assert placed.models_on(holder) == ["qwen3:32b"]
    for machine in cluster.machines:
        sizes = [cluster.model(name).size_gb for name in placed.models_on(machine.id)]
        assert sum(sizes) < machine.vram_gb
        assert len(sizes) <= 3


def test_what_is_asked_for_most_has_more_than_one_place() -> None:
    placed = place_by_hand(find_cluster("12+12+12"), wanted(middle=2.0, large=0.02))

    assert len(placed.seconds[MODEL]) == 2


def test_large_clusters_are_placed_too() -> None:
    cluster = find_cluster("+".join(["24", "12", "8"] * 5))
    load = wanted(tiny=1.0, small=1.0, middle=1.0, large=0.3, huge=0.2)

    assert all(place_by_hand(cluster, load).seconds.values())


@pytest.mark.parametrize("name", RULES)
def test_every_rule_can_do_with_one_node(name: str) -> None:
    only = seen("only", in_flight=3)

    assert rule(name, Placed({MODEL: {"only": 1.0}})).choose(asked(), [only], 0.0) is only
