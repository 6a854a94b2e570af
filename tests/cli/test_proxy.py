"""``hydra-llm proxy``, with a stand-in for LiteLLM's command where a process is started."""

import copy
import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
import yaml  # type: ignore[import-untyped,unused-ignore]

from hydra_llm.cli.proxy import running
from hydra_llm.cli.proxy.includes import read_config
from hydra_llm.cli.proxy.running import child_environment, private_copy, signals_heeded
from hydra_llm.cli.proxy.translation import CALLBACK, Translation, translate
from hydra_llm.config import HydraSettings
from hydra_llm.exceptions import ConfigurationError
from tests.cli.conftest import Run
from tests.helpers import PROXY_PYTHON

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes files beside each other; the path of the first."""

    def write(**texts: str) -> Path:
        paths = [tmp_path / f"{name}.yaml" for name in texts]
        for path, text in zip(paths, texts.values(), strict=True):
            path.write_text(textwrap.dedent(text))
        return paths[0]

    return write


def translated(text: str, **environment: str) -> Translation:
    return translate(yaml.safe_load(textwrap.dedent(text)), lookup=environment.get)


def not_set(name: str) -> None:
    """An empty environment."""


# -------------------------------------------------------------------- translation


def test_litellm_reads_a_strategy_it_knows_and_our_callback() -> None:
    done = translated("""
        model_list: [{model_name: a, litellm_params: {model: ollama_chat/a, api_key: os.environ/K}}]
        general_settings: {master_key: os.environ/MASTER}
        router_settings:
          routing_strategy: hydra
          routing_strategy_args: {prefer_local_seconds: 2, max_queue: 7}
          num_retries: 3
    """)

    assert done.config == {
        "model_list": [
            {
                "model_name": "a",
                "litellm_params": {"model": "ollama_chat/a", "api_key": "os.environ/K"},
            }
        ],
        "general_settings": {"master_key": "os.environ/MASTER"},
        "router_settings": {"routing_strategy": "simple-shuffle", "num_retries": 3},
        "litellm_settings": {"callbacks": [CALLBACK]},
    }
    assert done.variables == {
        "HYDRA_LLM_PREFER_LOCAL_SECONDS": "2.0",
        "HYDRA_LLM_MAX_QUEUE": "7",
    }


@pytest.mark.parametrize("strategy", ["least-busy", "simple-shuffle", "Hydra", None])
def test_another_strategy_stays_with_its_arguments(strategy: str | None) -> None:
    settings = {"routing_strategy": strategy, "routing_strategy_args": {"ttl": 10}}
    done = translate({"router_settings": settings}, lookup=not_set)

    assert done.config["router_settings"] == settings
    assert done.config["litellm_settings"] == {"callbacks": [CALLBACK]}
    assert done.variables == {}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, [CALLBACK]),
        ([], [CALLBACK]),
        ("prometheus", ["prometheus", CALLBACK]),
        (["a.b", "c"], ["a.b", "c", CALLBACK]),
        (CALLBACK, [CALLBACK]),
        ([CALLBACK, "c"], [CALLBACK, "c"]),
    ],
)
def test_our_callback_comes_to_those_there_are(before: object, after: list[str]) -> None:
    config = {"litellm_settings": {"callbacks": before, "drop_params": True}}
    done = translate(config, lookup=not_set)

    assert done.config["litellm_settings"] == {"callbacks": after, "drop_params": True}
    assert config == {"litellm_settings": {"callbacks": before, "drop_params": True}}


def test_groups_are_translated_too() -> None:
    text = """
        router_settings:
          routing_strategy: least-busy
          routing_strategy_args: {ttl: 10}
          routing_groups:
            - {group_name: a, models: [x], routing_strategy: hydra,
               routing_strategy_args: {max_queue: 7}}
            - {group_name: b, models: [y], routing_strategy: latency-based-routing,
               routing_strategy_args: {ttl: 20}}
    """
    done = translated(text)

    assert done.config["router_settings"] == {
        "routing_strategy": "least-busy",
        "routing_strategy_args": {"ttl": 10},
        "routing_groups": [
            {"group_name": "a", "models": ["x"], "routing_strategy": "simple-shuffle"},
            {
                "group_name": "b",
                "models": ["y"],
                "routing_strategy": "latency-based-routing",
                "routing_strategy_args": {"ttl": 20},
            },
        ],
    }
    assert done.variables == {"HYDRA_LLM_MAX_QUEUE": "7"}


def test_the_config_it_is_given_stays_as_it_is() -> None:
    group = {"routing_strategy": "hydra", "routing_strategy_args": {"max_queue": 7}}
    config = {"router_settings": {**group, "routing_groups": [group]}, "litellm_settings": {}}
    before = copy.deepcopy(config)
    translate(config, lookup=not_set)

    assert config == before


def test_a_setting_cannot_have_two_values() -> None:
    said = refused("""
        router_settings:
          routing_strategy: hydra
          routing_strategy_args: {max_queue: 7}
          routing_groups: [{routing_strategy: hydra, routing_strategy_args: {max_queue: 8}}]
    """)

    assert said == (
        "router_settings.routing_groups[0].routing_strategy_args.max_queue: "
        "it has another value elsewhere, and holds for the whole proxy"
    )


def refused(text: str, **environment: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        translated(text, **environment)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("{prefer_local_second: 2}", "did you mean prefer_local_seconds?"),
        ("{max_queue: -1}", "max_queue=-1: should be greater than or equal to 0"),
        ("{nodes: [{url: rig, vram: 8}]}", "nodes: unknown key vram; did you mean"),
        ("[max_queue]", "should be settings by name"),
        ("{1: 2}", "should be settings by name"),
        ("{redis_url: os.environ/NO_SUCH}", "redis_url: the variable NO_SUCH is not set"),
        ("{nodes: [{url: os.environ/U}]}", "nodes[0].url: the variable U is not set"),
    ],
)
def test_a_wrong_argument_is_named(arguments: str, said: str) -> None:
    text = f"router_settings: {{routing_strategy: hydra, routing_strategy_args: {arguments}}}"

    assert said in refused(text)
    assert "routing_strategy_args" in refused(text)


@pytest.mark.parametrize("section", ["router_settings", "litellm_settings"])
def test_a_section_has_to_be_one(section: str) -> None:
    assert refused(f"{section}: [a]") == f"{section}: should be keys and values"
    assert CALLBACK in translated(f"{section}:").config["litellm_settings"]["callbacks"]


def test_callbacks_have_to_be_names() -> None:
    assert "litellm_settings.callbacks" in refused("litellm_settings: {callbacks: {a: b}}")


def test_the_variables_say_what_the_arguments_said(monkeypatch: pytest.MonkeyPatch) -> None:
    done = translated(
        """
        router_settings:
          routing_strategy: hydra
          routing_strategy_args:
            redis_url: os.environ/REDIS
            vram_monitoring: no
            random_seed:
            nodes:
              - {url: "http://rig:11434", vram_gb: 24, labels: [fast]}
              - {url: "https://me:geheim@pc", id: pc, headers: {X-Key: os.environ/KEY}}
        """,
        REDIS="redis://me:geheim@r:6379/0",
        KEY="geheim",
    )
    assert "geheim" not in repr(done)
    for name, value in done.variables.items():
        monkeypatch.setenv(name, value)

    assert HydraSettings() == HydraSettings(
        [
            {"url": "http://rig:11434", "vram_gb": 24, "labels": ["fast"]},
            {"url": "https://me:geheim@pc", "id": "pc", "headers": {"X-Key": "geheim"}},
        ],
        redis_url="redis://me:geheim@r:6379/0",
        vram_monitoring=False,
    )


# -------------------------------------------------------------------------- files


@pytest.mark.timeout(180)  # LiteLLM's proxy takes long to import
def test_included_files_are_merged_as_litellm_does_it(write: Write, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "near.yaml").write_text("model_list: [{model_name: near}]")
    (tmp_path / "sub" / "deep.yaml").write_text("include: [near.yaml, far.yaml, ../config.yaml]")
    path = write(
        config="""
            include: [models.yaml, sub/deep.yaml]
            model_list: [{model_name: own}]
            router_settings: {num_retries: 1}
        """,
        models="""
            model_list: [{model_name: first}]
            router_settings: {routing_strategy: hydra}
        """,
        far="model_list: [{model_name: far}]",
    )

    config = read_config(path)
    assert [model["model_name"] for model in config["model_list"]] == [
        "own", "first", "near", "far",
    ]  # fmt: skip
    assert config["router_settings"] == {"routing_strategy": "hydra"}
    assert "include" not in config
    if PROXY_PYTHON.exists():
        assert config == read_by_litellm(path)


READS = """
import asyncio, json, sys
from litellm.proxy.proxy_server import ProxyConfig
print(json.dumps(asyncio.run(ProxyConfig()._get_config_from_file(sys.argv[1]))))
"""


def read_by_litellm(path: Path) -> Any:
    done = subprocess.run(
        [PROXY_PYTHON, "-c", READS, path],
        env={"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        encoding="utf-8",
        timeout=150,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", ", line 1: it is empty; 'hydra-llm litellm-config' writes one"),
        ("# nothing", ", line 1: it is empty"),
        ("- a", ", line 1: it holds a list, not keys and values"),
        ("geheim", ", line 1: it holds no more than one value"),
        ("a: 1\nb: geheim: 2", ", line 2, column 10: mapping values are not allowed here"),
        ("a: [geheim", ", line 1, column 11: "),
        ("a: !!python/name:os.system geheim", ", line 1, column 4: could not determine"),
        ("a: 2026-13-01", ": it is no YAML"),
        ("a: \x00", ": special characters are not allowed"),
        ("include: models.yaml", ": include: should be a list of files"),
        ("include: [no.yaml]", ": include: "),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    write: Write, text: str, said: str
) -> None:
    path = write(config=text)
    with pytest.raises(ConfigurationError) as caught:
        read_config(path)

    assert str(caught.value).startswith(f"{path}{said}")
    assert "geheim" not in str(caught.value)


def test_a_missing_file_is_named_with_the_one_that_includes_it(write: Write) -> None:
    path = write(config="include: [no.yaml]")
    with pytest.raises(ConfigurationError) as caught:
        read_config(path)

    missing = path.with_name("no.yaml")
    assert str(caught.value) == f"{path}: include: {missing}: there is no such file"


@pytest.mark.skipif(os.name != "posix", reason="permissions")
def test_the_copy_is_private_alone_and_gone_afterwards() -> None:
    config = {"model_list": [], "says": "ü", "number_or_text": "1e3", "yes": "on"}
    before = os.umask(0)
    try:
        with private_copy(Path("my.yml"), config) as path:
            assert yaml.safe_load(path.read_text("ascii")) == config
            assert path.name == "my.yaml"
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert list(path.parent.iterdir()) == [path]
    finally:
        os.umask(before)
    assert not path.parent.exists()


def test_the_config_decides_what_its_process_is_told() -> None:
    outside = {
        "PATH": "/bin",
        "HYDRA_LLM_MAX_QUEUE": "1",
        "HYDRA_LLM_VERIFY": "no",
        "CONFIG_FILE_PATH": "another.yaml",
        "LITELLM_CONFIG_BUCKET_NAME": "another",
    }

    assert child_environment(outside, {"HYDRA_LLM_MAX_QUEUE": "7"}) == {
        "PATH": "/bin",
        "HYDRA_LLM_MAX_QUEUE": "7",
        "HYDRA_LLM_VERIFY": "no",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    own = {"LITELLM_LOCAL_MODEL_COST_MAP": "False"}
    assert child_environment(own, {}) == own


# ------------------------------------------------------------------------ command


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if LiteLLM's proxy were there."""
    monkeypatch.setattr(running, "check_installed", lambda: None)


def test_without_the_proxy_it_says_how_to_install_it(
    run: Run, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "NEEDED", ("json", "no_such_package"))
    result = run("proxy", f"--config={write(config='a: 1')}")

    assert result.exit_code == 1
    assert result.stderr.strip() == (
        "error: LiteLLM's proxy needs no_such_package: "
        'pip install "hydra-llm[litellm]" "litellm[proxy]"'
    )


@pytest.mark.usefixtures("installed")
def test_a_wrong_config_starts_nothing(
    run: Run, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(subprocess, "Popen")
    path = write(
        config="router_settings: {routing_strategy: hydra, routing_strategy_args: {max_queue: x}}"
    )
    result = run("proxy", f"--config={path}")

    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {path}: routing_strategy_args: max_queue='x': ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.usefixtures("installed")
def test_what_is_wrong_outside_is_not_blamed_on_the_config(
    run: Run, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_LLM_MAX_QUEUE", "x")
    result = run("proxy", f"--config={write(config='a: 1')}")

    assert result.exit_code == 2
    assert result.stderr.startswith("error: HYDRA_LLM_MAX_QUEUE='x': ")


# ------------------------------------------------------------------------ process

STAND_IN = """
import importlib, json, os, signal, sys
from pathlib import Path

def run_server():
    import yaml
    copy = Path(sys.argv[sys.argv.index("--config") + 1])
    print(json.dumps({
        "arguments": sys.argv,
        "config": yaml.safe_load(copy.read_text()),
        "hydra": {n: v for n, v in os.environ.items() if n.startswith("HYDRA_LLM_")},
        "prices": os.environ.get("LITELLM_LOCAL_MODEL_COST_MAP"),
        "beside": importlib.import_module("beside").where,
        "ours": importlib.import_module("hydra_llm").__file__,
        "json": json.__file__,
    }), flush=True)
    if "--leave" in sys.argv:
        sys.exit(int(sys.argv[sys.argv.index("--leave") + 1]))
    if "--patient" in sys.argv:  # as uvicorn: ends in its own time, then by the signal again
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)
    signal.pause()
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Starts the command with a stand-in for LiteLLM; beside the config lies what may confuse."""
    packages, folder, elsewhere = (tmp_path / name for name in ("packages", "user", "cwd"))
    for module in ("fastapi", "uvicorn", "backoff", "apscheduler", "litellm", "litellm/proxy"):
        (packages / module).mkdir(parents=True)
        (packages / module / "__init__.py").touch()
    (packages / "litellm" / "proxy" / "proxy_cli.py").write_text(STAND_IN)
    (packages / "hydra-llm").write_text("from hydra_llm.cli import main; exit(main())")
    for place in (folder, elsewhere):
        (place / "hydra_llm").mkdir(parents=True)
        (place / "hydra_llm" / "__init__.py").write_text("raise SystemExit('not this one')")
        (place / "json.py").write_text("raise SystemExit('not this one')")
    (folder / "beside.py").write_text("where = 'beside the config'")
    (folder / "config.yaml").write_text(
        "router_settings: {routing_strategy: hydra, routing_strategy_args: {max_queue: 7}}"
    )
    (tmp_path / "tmp").mkdir()
    root = Path(__file__).parents[2]
    started = []

    def start(*options: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-W", "error", str(packages / "hydra-llm"),
             "proxy", "--config", str(folder / "config.yaml"), *options],
            cwd=elsewhere,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(packages), str(root)]),
                "TMPDIR": str(tmp_path / "tmp"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=20)


Start = Callable[..., "subprocess.Popen[str]"]


def told(stream: "IO[str] | None") -> Mapping[str, Any]:
    """What the stand-in has found, once it runs."""
    assert stream is not None
    found: Mapping[str, Any] = json.loads(stream.readline())
    return found


posix = pytest.mark.skipif(os.name != "posix", reason="signals")


@posix
def test_litellm_gets_the_copy_its_options_and_our_settings(start: Start, tmp_path: Path) -> None:
    process = start("--num_workers", "2", "--port=4001", "--leave", "5", "--", "--debug")
    found = told(process.stdout)

    assert process.wait(20) == 5
    program, option, path, *more = found["arguments"]
    assert (program, option, Path(path).name) == ("litellm", "--config", "config.yaml")
    assert more == [
        "--host", "127.0.0.1", "--port", "4001",
        "--num_workers", "2", "--leave", "5", "--debug",
    ]  # fmt: skip
    assert found["config"] == {
        "router_settings": {"routing_strategy": "simple-shuffle"},
        "litellm_settings": {"callbacks": [CALLBACK]},
    }
    assert found["hydra"] == {"HYDRA_LLM_MAX_QUEUE": "7"}
    assert found["prices"] == "True"
    assert not Path(path).exists()
    assert not list((tmp_path / "tmp").iterdir())


@posix
def test_modules_beside_the_config_are_found_and_hide_nothing(start: Start) -> None:
    process = start("--leave", "0")
    found = told(process.stdout)

    assert process.wait(20) == 0
    assert found["beside"] == "beside the config"
    assert Path(found["ours"]) == Path(running.__file__).parents[2] / "__init__.py"


@posix
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 143)]
)
@pytest.mark.parametrize("options", [(), ("--patient",)])
def test_a_signal_to_us_stops_the_child_and_clears_up(
    start: Start, tmp_path: Path, number: signal.Signals, code: int, options: tuple[str, ...]
) -> None:
    # What a shell starts in the background ignores it, and so would all that it starts.
    with inherited(signal.SIGINT, signal.default_int_handler):
        process = start(*options)
    found = told(process.stdout)
    assert Path(found["arguments"][2]).exists()
    process.send_signal(number)

    assert process.wait(20) == code
    assert process.stdout is not None
    assert process.stdout.read() == ""  # closed: the child is gone
    assert not list((tmp_path / "tmp").iterdir())


@contextmanager
def inherited(number: signal.Signals, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@posix
def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with inherited(signal.SIGHUP, signal.SIG_IGN):
        with signals_heeded() as stopping:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is stopping

    assert signal.getsignal(signal.SIGTERM) is before


@posix
def test_nothing_is_started_once_we_were_asked_to_stop() -> None:
    with signals_heeded() as stopping:
        signal.raise_signal(signal.SIGTERM)

        assert stopping.run(["no such program"], {}) == 143
