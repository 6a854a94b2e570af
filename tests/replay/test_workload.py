"""Requests: drawn, or from a trace, the same for one seed."""

from __future__ import annotations

import gzip
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from hydra_llm import ConfigurationError
from hydra_llm.replay import workload
from hydra_llm.replay.workload import (
    TRACES,
    Asked,
    PoissonLoad,
    Prompts,
    Shared,
    TraceLoad,
    read_load,
    read_priorities,
)
from hydra_llm.simulation.runner import common_tokens
from hydra_llm.simulation.text import as_prompt

SHARES = {"small:1b": 3.0, "large:8b": 1.0}
TRACE = """arrival_s,input_tokens,output_tokens,prefix_row,shared_blocks
10,600,50,-1,0
11,2000,60,0,1
13,700,70,0,1
20,100,80,-1,0
"""


def requests(text: str, *, seed: int = 1, num_ctx: int = 4096, **given: Any) -> list[Asked]:
    return read_load(text, **given).requests(SHARES, seed=seed, num_ctx=num_ctx)


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "mine.csv"
    path.write_text(TRACE, encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------- drawn


def test_a_poisson_load_has_the_rate_and_the_lengths_that_were_asked_for() -> None:
    asked = requests("poisson:rate=2,requests=4000,input=100,output=50,spread=0.5")

    assert len(asked) == 4000
    assert asked[-1].at == pytest.approx(2000.0, rel=0.1)
    assert fmean(one.input_tokens for one in asked) == pytest.approx(100, rel=0.05)
    assert fmean(one.output_tokens for one in asked) == pytest.approx(50, rel=0.05)
    assert sum(one.model == "small:1b" for one in asked) / 4000 == pytest.approx(0.75, abs=0.03)


def test_a_seed_gives_the_same_requests_and_another_one_others() -> None:
    assert requests("poisson", seed=7) == requests("poisson", seed=7)
    assert requests("poisson", seed=7) != requests("poisson", seed=8)


def test_another_mix_of_models_leaves_times_and_lengths_as_they_are() -> None:
    def rest(asked: list[Asked]) -> list[tuple[float, int, int]]:
        return [(one.at, one.input_tokens, one.output_tokens) for one in asked]

    assert rest(requests("poisson")) == rest(requests("poisson", zipf=2.0, shift=True))


def test_a_duration_stands_for_a_number() -> None:
    assert len(requests("poisson:rate=0.5,duration=60")) == 30


def test_options_beat_what_the_text_says() -> None:
    load = read_load("poisson:rate=0.5,requests=10", rate=3.0, requests=20)

    assert isinstance(load, PoissonLoad)
    assert (load.rate, load.count) == (3.0, 20)


def test_a_shift_turns_the_popularities_round() -> None:
    asked = requests("poisson:requests=2000", shift=True)

    def share(some: list[Asked]) -> float:
        return sum(one.model == "small:1b" for one in some) / len(some)

    assert share(asked[:1000]) == pytest.approx(0.75, abs=0.05)
    assert share(asked[1000:]) == pytest.approx(0.25, abs=0.05)


def test_zipf_goes_by_the_order_of_the_models() -> None:
    asked = requests("poisson:requests=3000", zipf=1.0)

    assert sum(one.model == "small:1b" for one in asked) / 3000 == pytest.approx(2 / 3, abs=0.03)


def test_priorities_are_drawn_by_their_shares() -> None:
    asked = requests("poisson:requests=2000", priorities=read_priorities("10=1,5=3"))

    assert {one.priority for one in asked} == {5, 10}
    assert sum(one.priority == 10 for one in asked) / 2000 == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("poisson:rat=1", "has no 'rat'; did you mean 'rate'?"),
        ("poisson:rate=0", "rate should be a number above 0, not '0'"),
        ("poisson:rate=nan", "rate should be a number above 0, not 'nan'"),
        ("poisson:requests=1,duration=1", "requests or duration, not both"),
        ("azure2023_con", "did you mean 'azure2023_conv'?"),
    ],
)
def test_a_wrong_load_says_what_would_be_right(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_load(text)

    assert says in str(caught.value)


@pytest.mark.parametrize("text", ["", "11=1", "five=1", "5=0", "5=x"])
def test_wrong_priorities_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--priorities"):
        read_priorities(text)


# ------------------------------------------------------------------------- traces


@pytest.mark.parametrize("name", TRACES)
def test_the_traces_are_here_and_say_whose_they_are(name: str) -> None:
    asked = requests(name)
    folder = Path(workload.__file__).parent / "traces"

    assert len(asked) > 3000
    assert name in (folder / "README.md").read_text(encoding="utf-8")
    assert "CC-BY-4.0" in (folder / "README.md").read_text(encoding="utf-8")
    assert "Apache License" in (folder / "LICENSE-APACHE-2.0.txt").read_text(encoding="utf-8")


def test_the_traces_are_small() -> None:
    folder = Path(workload.__file__).parent / "traces"

    assert sum(file.stat().st_size for file in folder.iterdir()) < 300_000


def test_time_is_stretched_and_no_row_is_dropped(trace: str) -> None:
    asked = requests(trace, rate=0.1)

    assert [one.at for one in asked] == [0.0, 4.0, 12.0, 40.0]
    assert [one.output_tokens for one in asked] == [50, 60, 70, 80]


def test_the_first_rows_are_taken(trace: str) -> None:
    assert [one.at for one in requests(trace, requests=2)] == [0.0, 1.0]


def test_prompts_are_cut_to_what_the_context_holds(trace: str) -> None:
    assert [one.input_tokens for one in requests(trace, num_ctx=1024)] == [600, 768, 700, 100]


def test_one_conversation_has_one_model_whatever_is_drawn(trace: str) -> None:
    seen = set()
    for seed in range(20):
        first, second, third, alone = requests(trace, seed=seed)
        assert first.model == second.model == third.model
        assert first.session == second.session == third.session is not None
        assert alone.session is None
        seen.add((first.model, alone.model))
    assert len(seen) == 4


def test_a_short_common_beginning_is_no_conversation(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(TRACE.replace("2000", "4000"), encoding="utf-8")

    first, second, _, _ = requests(str(path))
    assert second.shared == Shared(0, 512)
    assert second.session != first.session


def test_a_packed_file_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv.gz"
    path.write_bytes(gzip.compress(TRACE.encode()))

    load = read_load(str(path))
    assert isinstance(load, TraceLoad)
    assert str(load) == "mine.csv.gz, its own pace, 4 requests"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "lacks the columns arrival_s, input_tokens, output_tokens"),
        ("arrival_s,input_tokens,output_tokens\n", "has no row"),
        ("arrival_s,input_tokens,output_tokens\n1,2,x\n", "row 1 has something else than numbers"),
        ("arrival_s,input_tokens,output_tokens\n1,2\n", "row 1 has something else than numbers"),
        ("arrival_s,input_tokens,output_tokens\n2,1,1\n1,1,1\n", "row 2 is out of order"),
        ("arrival_s,input_tokens,output_tokens\nnan,1,1\n", "row 1 is out of order"),
        (
            "arrival_s,input_tokens,output_tokens,prefix_row,shared_blocks\n1,1,1,0,1\n",
            "row 1 is out of order",
        ),
    ],
)
def test_a_file_that_is_no_trace_says_why(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(ConfigurationError) as caught:
        read_load(str(path))
    assert says in str(caught.value)


# ------------------------------------------------------------------------- prompts


def test_a_prompt_has_a_token_for_each_four_bytes_and_ends_with_its_answers_length() -> None:
    (asked,) = requests("poisson:requests=1,input=300")
    text = Prompts([asked]).of(asked)

    assert len(as_prompt(text)) == asked.input_tokens + 1
    assert len(text) / 4 == pytest.approx(asked.input_tokens, abs=3)
    assert text.split()[-1] == str(asked.output_tokens)


def test_prompts_begin_alike_as_far_as_the_trace_says(trace: str) -> None:
    asked = requests(trace)
    first, second, third, alone = (as_prompt(Prompts(asked).of(one)) for one in asked)

    assert common_tokens(first, second) == 512
    assert common_tokens(second, third) == 512
    assert common_tokens(first, alone) == 0


def test_what_is_shared_with_a_row_may_be_what_that_shares_with_another() -> None:
    rows = [
        Asked(number=0, at=0.0, model="m", input_tokens=100, output_tokens=9),
        Asked(number=1, at=0.0, model="m", input_tokens=200, output_tokens=9, shared=Shared(0, 80)),
        Asked(
            number=2, at=0.0, model="m", input_tokens=300, output_tokens=9, shared=Shared(1, 150)
        ),
        Asked(number=3, at=0.0, model="m", input_tokens=300, output_tokens=9, shared=Shared(1, 50)),
    ]
    prompts = [as_prompt(Prompts(rows).of(one)) for one in rows]

    assert [len(prompt) for prompt in prompts] == [101, 201, 301, 301]
    assert common_tokens(prompts[0], prompts[1]) == 80
    assert common_tokens(prompts[1], prompts[2]) == 150
    assert common_tokens(prompts[0], prompts[2]) == 80
    assert common_tokens(prompts[0], prompts[3]) == 50
