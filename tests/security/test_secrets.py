"""Secrets show nowhere, and prompts and answers in no log, event, error or figure."""

from __future__ import annotations

import base64
import json
import logging
import os
import pickle
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # or importing it asks the internet

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

import hydra_llm
from hydra_llm import AsyncClient, AsyncHydraTransport, Client, HydraSettings, HydraTransport, Node
from hydra_llm.cli.app import app
from hydra_llm.config import describe_settings
from hydra_llm.exceptions import ConfigurationError, HydraError
from hydra_llm.integrations.langchain import ChatHydra, HydraEmbeddings
from hydra_llm.integrations.litellm import HydraRoutingStrategy
from hydra_llm.testing import SimulatedCluster
from tests.fuzz.hostile import MODEL, Bytes, answer, begun, hostile
from tests.router.conftest import make_nodes, preloaded

SECRETS = {
    "password": "hunter-one",
    "header": "hunter-two",
    "exporter password": "hunter-three",
    "exporter header": "hunter-four",
    "exporter query": "hunter-five",
    "redis": "hunter-six",
    "api key": "hunter-seven",
}
HIDDEN = (
    *SECRETS.values(),
    *(base64.b64encode(f"me:{one}".encode()).decode() for one in SECRETS.values()),
)

PROMPT, ANSWER = "the-prompt-itself", "the-answer-itself"
MESSAGES = [{"role": "user", "content": f"Say {PROMPT}"}]


def shown_in(text: str, what: tuple[str, ...] = HIDDEN) -> list[str]:
    return [one for one in what if one in text]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SimulatedCluster]:
    with preloaded(make_nodes("good"), MODEL) as cluster:
        yield cluster


def secret_node(url: str, node_id: str) -> Node:
    return Node(
        url.replace("http://", f"http://me:{SECRETS['password']}@"),
        id=node_id,
        headers={"X-Api-Key": SECRETS["header"]},
        exporter=f"http://me:{SECRETS['exporter password']}@127.0.0.1:9/m?t="
        + SECRETS["exporter query"],
        exporter_headers={"Authorization": f"Bearer {SECRETS['exporter header']}"},
    )


def settings_of(*nodes: Node) -> HydraSettings:
    return HydraSettings(
        nodes,
        redis_url=f"redis://me:{SECRETS['redis']}@127.0.0.1:9/0",
        health_check_interval=0.2,
        health_check_timeout=1.0,
        connect_timeout=1.0,
    )


# ---------------------------------------------------------------------------- a walk


def walked(root: object, depth: int = 4) -> Iterator[tuple[str, object]]:
    """Everything that can be reached from an object by public names, and how it is called."""
    seen: dict[int, object] = {}  # kept alive: a number is given again once its object is gone

    def walk(name: str, value: object, left: int) -> Iterator[tuple[str, object]]:
        if id(value) in seen or isinstance(value, type | int | float | bytes):
            return
        seen[id(value)] = value
        yield name, value
        if not left or isinstance(value, str):
            return
        # Headers give their values to whoever asks for one; that is what they are for.
        if isinstance(value, Mapping) and type(value).__name__ != "_Secrets":
            for key, one in value.items():
                yield from walk(f"{name}[{key!r}]", one, left - 1)
        if isinstance(value, list | tuple | set | frozenset):
            for number, one in enumerate(value):
                yield from walk(f"{name}[{number}]", one, left - 1)
            return
        if not type(value).__module__.startswith("hydra_llm") and not isinstance(value, BaseModel):
            return
        for attribute in dir(value):
            # What the caller has given is there as it was given: his own dictionary.
            if attribute.startswith(("_", "model_")) or attribute.endswith("client_kwargs"):
                continue
            try:
                one = getattr(value, attribute)
            except Exception:  # noqa: S112  # some are only there at other times
                continue
            if not callable(one) or is_dataclass(one):
                yield from walk(f"{name}.{attribute}", one, left - 1)

    yield from walk(type(root).__name__, root, depth)


def texts_of(value: object) -> Iterator[str]:
    """What an object shows of itself."""
    yield repr(value)
    if isinstance(value, str):
        return  # an exporter's URL is of use only as it is, and is shown by whoever prints it
    yield str(value)
    yield f"{value}"
    for method in ("_repr_html_", "table"):
        if callable(make := getattr(value, method, None)):
            yield make()
    if callable(make := getattr(value, "to_dict", None)):
        yield json.dumps(make(), default=repr)
    if isinstance(value, BaseException):
        yield "".join(traceback.format_exception(value))
        yield repr(vars(value))
    if isinstance(value, HydraSettings):
        yield value.model_dump_json()
        yield repr(value.model_dump())
        yield repr(describe_settings(value))
    if is_dataclass(value) and not isinstance(value, type):
        yield repr([getattr(value, each.name) for each in fields(value)])


def bad_settings() -> Iterator[BaseException]:
    """Errors about settings that hold secrets."""
    url = f"http://me:{SECRETS['password']}@rig:11434"
    wrong: list[Any] = [
        lambda: Node(url.replace("11434", "no-port")),
        lambda: Node(url, vram_gb=-1),
        lambda: HydraSettings([url, url]),
        lambda: HydraSettings([{"url": url, "vram": 3}]),
        lambda: HydraSettings([url], redis_url=f"http://me:{SECRETS['redis']}@x"),
        lambda: HydraSettings([url], redis_url=f"redis://me:{SECRETS['redis']}/x@y"),
        lambda: HydraSettings([url], max_queue=url),
        lambda: Client([url], headers={"X": SECRETS["header"]}, no_such_word=url),
        lambda: Client([url], node_id=3, min_vram_gb=url),
        lambda: ChatHydra(model=MODEL, nodes=[url], client_kwargs={"proxy": url}),
    ]
    for make in wrong:
        with pytest.raises((ConfigurationError, ValueError)) as caught:
            make()
        yield caught.value


FAILS: dict[str, Bytes] = {
    "500": b'HTTP/1.1 500 No\r\n\r\n{"error":"%s"}' % ANSWER.encode(),
    "400": b'HTTP/1.1 400 No\r\n\r\n{"error":"invalid: %s"}' % PROMPT.encode(),
    "401": b"HTTP/1.1 401 Who\r\nContent-Length: 0\r\n\r\n",
    "a page": answer(f"<p>{ANSWER}</p>".encode(), kind=b"text/html"),
    "another kind": answer(b'{"done":true,"message":{"content":["%s"]}}' % ANSWER.encode()),
    "cut": begun() + b'{"message":{"content":"%s"' % ANSWER.encode(),
    "broken": begun()
    + b'{"message":{"role":"assistant","content":"%s"},"done":false}\n' % ANSWER.encode() * 3000
    + b'{"message":{"content":["%s"]},"done":true}\n' % ANSWER.encode(),
}


class Log(logging.Handler):
    """Keeps the texts of all records, and of their exceptions."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name}: {self.format(record)}")


@pytest.fixture(scope="module")
def log() -> Iterator[list[str]]:
    """Everything that any logger says from now on, libraries' included."""
    root, ours, log = logging.getLogger(), logging.getLogger("hydra_llm"), Log()
    levels = root.level, ours.level
    root.addHandler(log)
    root.setLevel(logging.DEBUG)
    ours.setLevel(logging.DEBUG)
    yield log.lines
    root.removeHandler(log)
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


@pytest.fixture(scope="module")
def everything(cluster: SimulatedCluster, log: list[str]) -> list[Any]:
    """All objects that a secret-bearing configuration makes, and what happens with them."""
    found: list[Any] = [*bad_settings()]
    events: list[Any] = []
    decisions: list[Any] = []
    for said in FAILS.values():
        with hostile({"/api/chat": said}) as server:
            nodes = (secret_node(server.url, "bad"), secret_node(cluster["good"].url, "good"))
            settings = settings_of(*nodes)
            router = hydra_llm.Router(
                settings=settings, on_event=events.append, on_decision=decisions.append
            )
            with router, Client(router=router, headers={"X-Key": SECRETS["api key"]}) as client:
                for words in ({"node_id": "bad"}, {"node_id": "bad", "exclude_nodes": ["good"]}):
                    for stream in (False, True):
                        try:
                            told = client.chat(MODEL, MESSAGES, stream=stream, **words)
                            found.append(list(told)[-1].routing_decision if stream else told)
                        except Exception as error:
                            found.append(error)
                try:
                    client.chat("no-such-model", MESSAGES)
                except HydraError as error:
                    found.append(error)
                found += [settings, *nodes, *router.nodes(), router.get_node_resources(), router]
                found += [client, AsyncClient(router=router), HydraTransport(router=router)]
                found += [AsyncHydraTransport(router=router), router.explain(MODEL)]
                chat = ChatHydra(
                    model=MODEL,
                    nodes=router,
                    client_kwargs={"headers": {"X": SECRETS["api key"]}},
                )
                found += [chat, HydraEmbeddings(model=MODEL, nodes=router)]
                found += [HydraRoutingStrategy(router)]
    assert events
    assert decisions
    return [*found, *events, *decisions]


def test_no_secret_shows_in_anything_that_can_be_reached(
    everything: list[Any], log: list[str]
) -> None:
    kinds: set[str] = set()
    for root in everything:
        for name, value in walked(root):
            kinds.add(type(value).__name__)
            for text in texts_of(value):
                assert not shown_in(text), f"{name}: {text[:300]}"

    assert not shown_in("\n".join(log))
    assert {"Node", "NodeSnapshot", "HydraSettings", "RoutingDecision", "Router"} <= kinds
    assert {"Attempt", "Candidate", "AllNodesFailedError", "NodeHealthChanged"} <= kinds


def test_no_secret_is_in_what_is_told_to_others(everything: list[Any]) -> None:
    """Errors, events and the plain form of decisions may be pickled into files and queues."""
    count = 0
    for one in everything:
        told = one.to_dict() if hasattr(one, "to_dict") else one
        if (
            isinstance(one, HydraError | hydra_llm.RoutingDecision)
            or "events" in type(one).__module__
        ):
            assert not shown_in(pickle.dumps(told).decode("latin-1"))
            count += 1

    assert count > 30


def test_no_prompt_and_no_answer_is_in_a_log_an_event_an_error_or_a_figure(
    everything: list[Any], log: list[str]
) -> None:
    words = (PROMPT, ANSWER)
    count = 0
    for one in everything:
        if isinstance(one, hydra_llm.client.ChatResponse):
            one = one.routing_decision  # noqa: PLW2901
        if type(one).__name__ == "ResponseError":
            continue  # Ollama's own answer to the caller's mistake, which goes to the caller alone
        for name, value in walked(one):
            for text in texts_of(value):
                assert not shown_in(text, words), f"{name}: {text[:300]}"
        count += 1

    assert count > 30
    assert not shown_in("\n".join(log), words)
    assert {"hydra_llm", "httpcore.connection"} <= {line.partition(":")[0] for line in log}


# ------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "command",
    [
        ["nodes"],
        ["nodes", "--json"],
        ["doctor"],
        ["explain", MODEL],
        ["explain", MODEL, "--json"],
        ["fit", MODEL],
        ["chat", MODEL, "Hello"],
        ["chat", MODEL, "Hello", "--node-id", f"http://me:{SECRETS['password']}@elsewhere:1"],
        ["nodes", "--node", f"http://me:{SECRETS['password']}@bad port"],
    ],
    ids=" ".join,
)
def test_no_command_shows_a_secret_of_the_configuration(
    cluster: SimulatedCluster,
    command: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = cluster["good"].url.replace("http://", f"http://me:{SECRETS['password']}@")
    file = tmp_path / "hydra.toml"
    file.write_text(
        f"""
        redis_url = "redis://me:{SECRETS["redis"]}@127.0.0.1:9/0"
        [[nodes]]
        url = "{url}"
        headers = {{ X-Api-Key = "{SECRETS["header"]}" }}
        exporter = "http://me:{SECRETS["exporter password"]}@127.0.0.1:9/m?t=hunter-five"
        exporter_headers = {{ Authorization = "Bearer {SECRETS["exporter header"]}" }}
        [[nodes]]
        url = "http://me:{SECRETS["password"]}@127.0.0.1:9"
        """
    )
    monkeypatch.setenv("HYDRA_LLM_CONFIG", str(file))

    result = CliRunner().invoke(app, command)

    assert result.output.strip()
    assert not shown_in(result.output)
