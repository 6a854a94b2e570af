"""Nodes, in every form they may be given."""

from dataclasses import fields

import pytest

from hydra_llm.config import HydraSettings, _NodeTable, as_variables
from hydra_llm.exceptions import ConfigurationError
from hydra_llm.types import Node
from tests.config.conftest import WriteToml


def ids_and_urls(settings: HydraSettings) -> list[tuple[str, str]]:
    return [(node.id, node.url) for node in settings.nodes]


def problem(nodes: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        HydraSettings(nodes)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "rig,pc=http://10.0.0.5:11434",
        " rig , pc = http://10.0.0.5:11434 ,, ",
        ",\nrig:11434,\n\tpc=10.0.0.5\n",
    ],
)
def test_the_variable_is_a_list_with_commas(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HYDRA_LLM_NODES", text)

    assert ids_and_urls(HydraSettings()) == [
        ("rig:11434", "http://rig:11434"),
        ("pc", "http://10.0.0.5:11434"),
    ]


def test_the_variable_may_be_json_with_all_that_a_node_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(
        "HYDRA_LLM_NODES",
        """ [{"url": "rig", "vram_gb": 24, "labels": ["x"], "headers": {"X-Key": "k"}}, "b=c"]""",
    )

    first, second = HydraSettings().nodes
    assert first == Node("rig", vram_gb=24.0, labels=("x",), headers={"X-Key": "k"})
    assert second == Node("c", id="b")


def test_an_address_in_brackets_is_no_json() -> None:
    assert HydraSettings("[::1]:1234").nodes == (Node("http://[::1]:1234"),)


def test_json_that_is_none_is_an_error_that_shows_no_password() -> None:
    said = problem('[{"url": "http://me:geheim@rig"')

    assert said == "nodes: it begins like a list in JSON and is none (at line 1, column 32)"
    assert "geheim" not in problem('[{"url": "http://me:geheim@ri g"}]')
    assert problem("[]") == "nodes: it names no node; write it like http://localhost:11434"


def test_settings_as_variables_are_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = HydraSettings(
        [
            Node("http://me:geheim@rig", id="rig", vram_gb=24, labels=("a, b", "c")),
            Node("f", exporter="http://me:geheim@f:9400"),
            "d=e",
        ],
        redis_url="redis://me:geheim@r:6379/0",
        verify=False,
        prefer_local_seconds=0.5,
        random_seed=None,
    )
    for variable, value in as_variables(settings, HydraSettings.model_fields).items():
        monkeypatch.setenv(variable, value)

    assert HydraSettings() == settings
    assert as_variables(settings, ["max_queue"]) == {"HYDRA_LLM_MAX_QUEUE": "1000"}


def test_an_argument_may_be_any_of_what_a_node_is() -> None:
    settings = HydraSettings(
        ["one", "two=http://two:1", {"url": "three", "labels": "fast"}, Node("four", slots=2)]
    )

    assert [node.host for node in settings.nodes] == ["one", "two", "three", "four"]
    assert settings.nodes[1].id == "two"
    assert settings.nodes[2].labels == ("fast",)
    assert settings.nodes[3].slots == 2


def test_one_node_needs_no_list() -> None:
    assert HydraSettings("a,b=c").nodes == HydraSettings(["a", "b=c"]).nodes
    assert HydraSettings(Node("a")).nodes == (Node("a"),)
    assert HydraSettings(node for node in [Node("a")]).nodes == (Node("a"),)


def test_the_file_takes_all_that_a_node_takes(toml: WriteToml) -> None:
    toml("""
        [[nodes]]
        url = "https://rig"
        id = "rig"
        vram_gb = 24
        ram_gb = 64.5
        exporter = "http://rig:9400/metrics"
        labels = ["fast", "quiet"]
        headers = { Authorization = "Bearer token" }
        local = false
        slots = 4
        exporter_headers = { Authorization = "Bearer other" }

        [[nodes]]
        url = "pc"
    """)

    rig, pc = HydraSettings().nodes

    assert rig == Node(
        "https://rig:443",
        id="rig",
        vram_gb=24,
        ram_gb=64.5,
        exporter="http://rig:9400/metrics",
        labels=("fast", "quiet"),
        headers={"Authorization": "Bearer token"},
        local=False,
        slots=4,
        exporter_headers={"Authorization": "Bearer other"},
    )
    assert pc == Node("http://pc:11434")


def test_the_file_may_have_a_plain_list(toml: WriteToml) -> None:
    toml('nodes = ["rig", "pc=10.0.0.5"]')

    assert [node.id for node in HydraSettings().nodes] == ["rig:11434", "pc"]


@pytest.mark.parametrize(
    ("exporter", "why"),
    [
        ("ftp://rig:9400", "the scheme 'ftp' is neither http nor https"),
        ("rig", "it names no port"),
        (":9400", "it names no host"),
        ("http://rig:port", "its host or port cannot be read"),
        (" ", "it is empty"),
    ],
)
def test_an_exporters_url_is_checked_when_it_is_named(exporter: str, why: str) -> None:
    assert problem([{"url": "rig", "exporter": exporter}]) == (
        f"nodes: {exporter!r} is not an exporter URL: {why}; write it like 'http://rig:9400'"
    )


def test_a_table_knows_the_arguments_of_node() -> None:
    assert list(_NodeTable.model_fields) == [each.name for each in fields(Node)]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:8000", "http://127.0.0.1:8000"),
        (":8000", "http://127.0.0.1:8000"),
        ("[::]:11434", "http://[::1]:11434"),
        ("rig", "http://rig:11434"),
        ("rig:1234", "http://rig:1234"),
        ("http://rig", "http://rig:80"),
        ("https://rig", "https://rig:443"),
        ("https://rig/ollama", "https://rig:443/ollama"),
        (' "rig:1234" ', "http://rig:1234"),
        ("'rig'", "http://rig:11434"),
    ],
)
def test_ollama_host_is_read_as_ollama_reads_it(
    monkeypatch: pytest.MonkeyPatch, host: str, url: str
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", host)

    settings = HydraSettings()

    assert [node.url for node in settings.nodes] == [url]
    assert settings.nodes_source == "OLLAMA_HOST"


# ---------------------------------------------------------------- what is wrong


def test_a_wrong_ollama_host_is_blamed_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", "http://me:secret@rig:port")

    with pytest.raises(ConfigurationError) as caught:
        HydraSettings()

    assert str(caught.value) == (
        "OLLAMA_HOST: 'http://***@rig:port' is not a node URL: its host or port cannot be read; "
        "write it like 'http://rig:11434'"
    )


def test_two_nodes_of_one_name_are_an_error_that_names_both() -> None:
    assert problem("rig=http://a,rig=http://b") == (
        "nodes: http://a:80 and http://b:80 are both called 'rig'; give each its own id"
    )
    assert problem("http://rig:1,https://rig:1") == (
        "nodes: http://rig:1 and https://rig:1 are both called 'rig:1'; give each its own id"
    )


def test_one_url_twice_is_an_error() -> None:
    assert problem("a=http://u:p@rig:11434/,b=RIG") == (
        "nodes: http://rig:11434 is there twice (as 'a' and 'b')"
    )
    assert problem([Node("rig"), "rig"]) == (
        "nodes: http://rig:11434 is there twice (as 'rig:11434')"
    )


@pytest.mark.parametrize("nothing", [[], (), "", " , "])
def test_a_list_of_no_nodes_is_an_error(nothing: object) -> None:
    assert problem(nothing) == "nodes: it names no node; write it like http://localhost:11434"


def test_a_variable_of_commas_alone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_LLM_NODES", ",")

    with pytest.raises(ConfigurationError, match=r"^HYDRA_LLM_NODES: it names no node"):
        HydraSettings()


@pytest.mark.parametrize("value", [5, {"url": "rig"}, b"rig", True])
def test_what_is_no_list_is_an_error(value: object) -> None:
    assert problem(value) == "nodes: should be a list of URLs or of tables of Node's arguments"


def test_each_wrong_node_has_its_number(toml: WriteToml) -> None:
    toml("""
        [[nodes]]
        url = "rig"
        [[nodes]]
        url = "ftp://pc"
        [[nodes]]
        vram_gb = 8
        [[nodes]]
        url = "mac"
        vrm_gb = 1
        slots = 0
    """)

    with pytest.raises(ConfigurationError) as caught:
        HydraSettings()

    assert str(caught.value).splitlines()[1:] == [
        "  hydra.toml: nodes, number 2: 'ftp://pc' is not a node URL: the scheme 'ftp' is neither "
        "http nor https; write it like 'http://rig:11434'",
        "  hydra.toml: nodes, number 3: url is missing; write it like "
        "url = 'http://localhost:11434'",
        "  hydra.toml: nodes, number 4: unknown key vrm_gb; did you mean vram_gb?",
        "  hydra.toml: nodes, number 4: slots = 0: should be greater than or equal to 1",
    ]


@pytest.mark.parametrize(
    ("key", "value", "why"),
    [
        ("vram_gb", -1, "vram_gb = -1: should be greater than or equal to 0"),
        ("vram_gb", float("nan"), "vram_gb = nan: should be a finite number"),
        ("ram_gb", float("inf"), "ram_gb = inf: should be a finite number"),
        ("ram_gb", True, "ram_gb = True: should be a number, not true or false"),
        ("slots", 1.5, "slots = 1.5: should be a valid integer, got a number with a fractional"),
        ("slots", False, "slots = False: should be a number, not true or false"),
        ("local", "here", "local = 'here': should be true or false"),
        ("labels", [1], "labels.0 = a list: should be a valid string"),
        ("headers", {"X-Key": 12345}, "headers.X-Key: should be a valid string"),
        ("id", 5, "id = 5: should be a valid string"),
        ("url", 5, "url = 5: should be a valid string"),
        ("url", "", "url = '': string should have at least 1 character"),
    ],
)
def test_a_table_with_a_value_that_cannot_be_is_an_error(key: str, value: object, why: str) -> None:
    assert problem([{"url": "rig", key: value}]).startswith(f"nodes: {why}")


@pytest.mark.parametrize("item", [5, None, ["rig"]])
def test_what_is_no_node_is_an_error(item: object) -> None:
    assert problem([item]) == (
        f"nodes: a node is a URL, a Node or a table of its arguments, not {type(item).__name__}"
    )
