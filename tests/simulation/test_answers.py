"""What a simulated model says: it follows from the request, and obeys it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hydra_llm.simulation.answers import Answer, Question, answer
from hydra_llm.simulation.catalog import SimulatedModel
from hydra_llm.simulation.schema import Hints, UnusableSchemaError, value_for
from hydra_llm.simulation.text import embedding, prose, rng_of, tokens_of
from hydra_llm.simulation.toolcalls import choose_call
from hydra_llm.simulation.wire import RequestError, duration_s, go_json

PLAIN = SimulatedModel("plain")
THINKING = SimulatedModel("thinking", capabilities=("completion", "tools", "thinking"))


def said(prompt: str = "Why is the sky blue?", *, model: SimulatedModel = PLAIN, **more: Any
         ) -> Answer:  # fmt: skip
    messages = more.pop("messages", [{"role": "user", "content": prompt}])
    return answer(Question(model=model, rendered=json.dumps(messages), messages=messages, **more))


def content(given: Answer) -> str:
    return "".join(token.text for token in given.tokens if token.kind == "content")


def tool(name: str, description: str = "", /, **parameters: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": parameters, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": description,
                                             "parameters": schema}}  # fmt: skip


INT, STR = {"type": "integer"}, {"type": "string"}


# ---------------------------------------------------------------- text


def test_the_same_request_gets_the_same_text_and_another_seed_another() -> None:
    assert said() == said()
    assert content(said(seed=1)) != content(said(seed=2))
    assert content(said("Why?")) != content(said("How?"))


def test_num_predict_cuts_and_says_so() -> None:
    cut = said(num_predict=5)

    assert len(cut.tokens) == 5
    assert cut.done_reason == "length"
    assert content(said()).startswith(content(cut))


def test_an_answer_that_ends_by_itself_has_an_end_of_turn_token() -> None:
    whole = said(token_output=20)

    assert len(whole.tokens) == 21
    assert whole.done_reason == "stop"


def test_the_stop_sequence_and_all_after_it_is_left_out() -> None:
    text = content(said())
    word = text.split()[3]

    stopped = said(stop=(word,))
    assert content(stopped) == text[: text.index(word)]
    assert stopped.done_reason == "stop"


def test_a_stop_sequence_is_found_across_tokens() -> None:
    text = content(said())

    assert content(said(stop=(text[10:40],))) == text[:10]


@given(st.text(min_size=1, max_size=3), st.integers(1, 100))
def test_no_stop_sequence_is_ever_seen(stop: str, seed: int) -> None:
    assert stop not in content(said(stop=(stop,), seed=seed))


@given(st.text())
def test_tokens_join_to_the_text(text: str) -> None:
    assert "".join(tokens_of(text)) == text


def test_a_continued_answer_goes_on_as_the_unbroken_one_would() -> None:
    whole = content(said(token_output=30))
    user = {"role": "user", "content": "Why is the sky blue?"}
    begun = whole[:40]

    rest = said(
        messages=[user, {"role": "assistant", "content": begun}], prefill=begun, token_output=30
    )
    assert begun + content(rest) == whole


def test_a_tool_result_is_answered_in_words_that_have_it() -> None:
    messages = [{"role": "user", "content": "Weather?"}, {"role": "tool", "content": "rain"}]
    given = said(messages=messages, tools=[tool("get_weather", city=STR)])

    assert "rain" in content(given)
    assert not any(token.calls for token in given.tokens)


def test_a_thinking_model_thinks_first() -> None:
    kinds = [token.kind for token in said(model=THINKING, thinks=True).tokens]

    assert kinds[0] == "tag"
    assert kinds.index("thinking") < kinds.index("content")
    assert "thinking" not in [token.kind for token in said(model=THINKING).tokens]


# ---------------------------------------------------------------- tool calls


@pytest.mark.parametrize(
    ("prompt", "tools", "name", "arguments"),
    [
        ("What is 3 times 12? Use multiply.", [tool("add", a=INT, b=INT),
         tool("multiply", a=INT, b=INT)], "multiply", {"a": 3, "b": 12}),
        ("What is the weather in Paris?", [tool("get_weather", city=STR)], "get_weather",
         {"city": "Paris"}),
        ("Find the user called 'Ada Lovelace' and say hi", [tool("find_user", name=STR)],
         "find_user", {"name": "Ada Lovelace"}),
        ("What time is it?", [tool("get_time", "The current time")], "get_time", {}),
        ("Validate the user. Name 'Faiz', id 123", [tool("validate_user", id=INT, name=STR)],
         "validate_user", {"id": 123, "name": "Faiz"}),
        ("Set it to -2.5", [tool("set", level={"type": "number"})], "set", {"level": -2.5}),
        ("Sum 1, 2 and 3", [tool("sum", values={"type": "array", "items": INT})], "sum",
         {"values": [1, 2, 3]}),
        ("In fahrenheit please", [tool("t", unit={"type": "string",
         "enum": ["celsius", "fahrenheit"]})], "t", {"unit": "fahrenheit"}),
    ],
)  # fmt: skip
def test_the_fitting_tool_is_called_with_what_the_prompt_says(
    prompt: str, tools: list[dict[str, Any]], name: str, arguments: dict[str, Any]
) -> None:
    call = choose_call(tools, prompt, rng_of("test"))

    assert call is not None
    assert (call.name, call.arguments) == (name, arguments)
    for key, value in arguments.items():
        assert type(call.arguments[key]) is type(value)


def test_a_call_that_is_cut_is_dropped() -> None:
    cut = said("What is 3 times 12?", tools=[tool("multiply", a=INT, b=INT)], num_predict=4)

    assert cut.done_reason == "length"
    assert all(token.kind == "hidden" for token in cut.tokens)


# ---------------------------------------------------------------- JSON that obeys a schema


def test_format_json_is_an_object() -> None:
    assert isinstance(json.loads(content(said(format="json"))), dict)


PERSON = {
    "type": "object",
    "properties": {
        "name": STR,
        "age": INT,
        "tags": {"type": "array", "items": STR, "minItems": 2, "uniqueItems": True},
        "home": {"$ref": "#/$defs/Place"},
        "kind": {"enum": ["a", "b"]},
        "version": {"const": 2},
        "nick": {"anyOf": [{"type": "null"}, STR]},
        "on": {"type": "string", "format": "date"},
    },
    "required": ["name", "age", "tags", "home", "kind", "version"],
    "$defs": {"Place": {"type": "object", "properties": {"city": STR}, "required": ["city"]}},
}


def test_a_schema_of_the_usual_parts_is_obeyed() -> None:
    value = json.loads(content(said("Ann is 30 years old", format=PERSON)))

    assert value["age"] == 30
    assert isinstance(value["name"], str)
    assert len(set(value["tags"])) == len(value["tags"]) >= 2
    assert isinstance(value["home"]["city"], str)
    assert value["kind"] in {"a", "b"}
    assert value["version"] == 2
    assert value["nick"] is None


def _schemas() -> st.SearchStrategy[dict[str, Any]]:
    number = st.tuples(st.integers(-50, 50), st.integers(0, 50)).map(
        lambda pair: {"minimum": pair[0], "maximum": pair[0] + pair[1]}
    )
    text = st.tuples(st.integers(0, 5), st.integers(0, 9)).map(
        lambda pair: {"type": "string", "minLength": pair[0], "maxLength": pair[0] + pair[1]}
    )
    leaves = st.one_of(
        number.map(lambda bounds: {"type": "integer", **bounds}),
        number.map(lambda bounds: {"type": "number", **bounds}),
        text,
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.lists(st.integers(), min_size=1, max_size=3).map(lambda these: {"enum": these}),
        st.integers().map(lambda this: {"const": this}),
    )

    def deeper(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
        objects = st.dictionaries(st.text("abcxyz", min_size=1, max_size=3), inner, max_size=4)
        return st.one_of(
            objects.map(
                lambda parts: {"type": "object", "properties": parts, "required": list(parts)[:2]}
            ),
            st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
                lambda t: {
                    "type": "array",
                    "items": t[0],
                    "minItems": t[1],
                    "maxItems": t[1] + t[2],
                }
            ),
            st.lists(inner, min_size=1, max_size=3).map(lambda these: {"anyOf": these}),
        )

    return st.recursive(leaves, deeper, max_leaves=8)


def obeys(value: Any, schema: dict[str, Any]) -> bool:
    """A second, plainer reading of the schemas made here."""
    if "const" in schema:
        return bool(value == schema["const"])
    if "enum" in schema:
        return value in schema["enum"]
    if "anyOf" in schema:
        return any(obeys(value, part) for part in schema["anyOf"])
    kind = schema["type"]
    if kind in {"integer", "number"}:
        right = isinstance(value, int if kind == "integer" else (int, float))
        return right and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
    if kind == "array":
        right = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return right and all(obeys(part, schema["items"]) for part in value)
    if kind == "object":
        return all(name in value for name in schema["required"]) and all(
            obeys(part, schema["properties"][name]) for name, part in value.items()
        )
    return value is None if kind == "null" else isinstance(value, bool)


@given(_schemas(), st.text(max_size=30))
def test_what_is_written_obeys_the_schema(schema: dict[str, Any], prompt: str) -> None:
    assert obeys(value_for(schema, Hints(prompt), rng_of("test")), schema)


def test_a_tree_that_holds_itself_comes_to_an_end() -> None:
    tree = {
        "$ref": "#/$defs/Tree",
        "$defs": {
            "Tree": {
                "type": "object",
                "properties": {"left": {"anyOf": [{"$ref": "#/$defs/Tree"}, {"type": "null"}]},
                               "kids": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}},
                "required": ["left", "kids"],
            }
        },
    }  # fmt: skip

    json.dumps(value_for(tree, Hints(""), rng_of("test")))


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "#/nowhere"}])
def test_a_schema_no_grammar_can_be_made_of_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(UnusableSchemaError):
        value_for(schema, Hints(""), rng_of("test"))


# ---------------------------------------------------------------- vectors, bytes


def test_a_vector_has_length_one_and_follows_the_text() -> None:
    vector = embedding("hello", 64, model="m")

    assert len(vector) == 64
    assert sum(value * value for value in vector) == pytest.approx(1.0)
    assert vector == embedding("hello", 64, model="m")
    assert vector != embedding("hallo", 64, model="m")


def test_prose_has_sentences() -> None:
    words = [word for word, _ in zip(prose(rng_of("x")), range(40), strict=False)]
    assert sum(word.endswith(".") for word in words) >= 3


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5m", 300.0), ("1h30m", 5400.0), ("-1s", -1.0), ("1.5s", 1.5), (300, 300.0), (None, None),
     ("0", 0.0), ("250ms", 0.25)],
)  # fmt: skip
def test_durations_are_read_as_go_reads_them(text: object, seconds: float | None) -> None:
    assert duration_s(text) == seconds


def test_a_duration_without_a_unit_is_refused() -> None:
    with pytest.raises(RequestError, match="missing unit"):
        duration_s("300")


def test_json_is_escaped_as_go_does() -> None:
    assert go_json({"a": "<b> & ü"}) == '{"a":"\\u003cb\\u003e \\u0026 ü"}'
