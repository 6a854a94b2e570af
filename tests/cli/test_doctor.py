import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hydra_llm.cli.doctor import Finding, checks, examine, report
from hydra_llm.cli.doctor import look as module
from hydra_llm.cli.doctor.finding import Look
from hydra_llm.cli.doctor.look import look_at, settings_problems
from hydra_llm.config import HydraSettings
from hydra_llm.exceptions import ConfigurationError
from hydra_llm.probes.local import LocalDevices
from hydra_llm.testing import HtmlFault, SimulatedCluster, SimulatedNode, StatusFault
from hydra_llm.types import InstalledModel, Node, NodeSnapshot, canonical_model_name
from tests.helpers import BIG, LLAMA, loaded, snapshot

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def look(*nodes: NodeSnapshot, settings: HydraSettings | None = None, **about: Any) -> Look:
    chosen = settings or HydraSettings([node.node for node in nodes] or "http://rig:11434")
    return Look(settings=chosen, nodes=nodes, **about)


def file(name: str, digest: str) -> dict[str, InstalledModel]:
    name = canonical_model_name(name)
    return {name: InstalledModel(name=name, digest=digest)}


def bad(findings: Any) -> list[Finding]:
    return [finding for finding in findings if finding.level != "ok"]


def healthy(node_id: str, **about: Any) -> NodeSnapshot:
    return snapshot(node_id, **{"version": "0.32.15", **about})


# ------------------------------------------------------------------------- whole


def test_healthy_nodes_have_nothing_but_good_findings() -> None:
    findings = checks.check(look(healthy("a", warm=(LLAMA,)), healthy("b")))

    assert not bad(findings)
    assert report.exit_code(findings, strict=True) == 0
    assert {finding.check for finding in findings} <= report.TITLES.keys()


@pytest.mark.parametrize(
    ("levels", "lenient", "strict"),
    [
        ([], 0, 0),
        (["ok"], 0, 0),
        (["ok", "warning"], 0, 1),
        (["warning", "problem"], 2, 2),
    ],
)
def test_the_exit_code_is_that_of_the_worst_finding(
    levels: list[Any], lenient: int, strict: int
) -> None:
    findings = [Finding(level=level, check="models", says="") for level in levels]

    assert report.exit_code(findings, strict=False) == lenient
    assert report.exit_code(findings, strict=True) == strict


def test_whatever_is_wrong_comes_with_what_to_do() -> None:
    findings = checks.check(
        look(
            snapshot("a", version="0.9.0", models=(LLAMA,), free_vram_gb=None, total_vram_gb=None),
            snapshot("b", health="down", health_reason="connection refused"),
            healthy("c", models=(), warm=(BIG,)),
            settings=HydraSettings(),
        )
    )

    assert len(bad(findings)) >= 5
    assert all(finding.do for finding in bad(findings))


def test_what_is_the_same_on_several_nodes_is_said_once() -> None:
    findings = checks.check(look(healthy("a"), healthy("b"), snapshot("c", version="0.31.0")))

    versions = [finding.nodes for finding in findings if finding.check == "version"]
    assert versions == [("a", "b"), ("c",)]


# ---------------------------------------------------------------------- settings


def test_each_problem_in_the_settings_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_LLM_NODE", "http://rig:11434")
    monkeypatch.setenv("HYDRA_LLM_MAX_QUEUE", "many")

    findings = examine()
    assert [finding.level for finding in findings] == ["problem", "problem"]
    assert "did you mean HYDRA_LLM_NODES?" in " ".join(finding.says for finding in findings)
    assert report.exit_code(findings, strict=False) == 2


def test_a_single_problem_in_the_settings_is_told_whole() -> None:
    (finding,) = settings_problems(ConfigurationError("unknown variable HYDRA_LLM_X"))

    assert finding.says == "unknown variable HYDRA_LLM_X"


def test_no_configured_node_is_a_warning() -> None:
    (finding,) = bad(checks.settings_are_told(look(settings=HydraSettings())))

    assert "http://localhost:11434" in finding.says
    assert "HYDRA_LLM_NODES" in finding.do


def test_every_setting_that_was_changed_is_named_with_its_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HYDRA_LLM_MAX_QUEUE", "7")

    findings = list(checks.settings_are_told(look(settings=HydraSettings("http://rig"))))
    assert "the command line" in findings[0].says
    assert findings[1].says == "max_queue = 7 (HYDRA_LLM_MAX_QUEUE)"


def test_where_rates_are_kept_is_told_and_nothing_is_written(
    cluster: SimulatedCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydra_llm.router.RatesFile", None)  # is not made
    folder = tmp_path / "state"
    looked = look_at(HydraSettings(cluster.nodes(), state_dir=folder))
    (finding,) = checks.rates_are_kept(looked)

    assert finding.level == "ok"
    assert str(folder / "rates.json") in finding.says
    assert not folder.exists()


def test_nothing_is_said_of_rates_that_are_not_kept(cluster: SimulatedCluster) -> None:
    looked = look_at(HydraSettings(cluster.nodes(), keep_rates=False))

    assert not [*checks.rates_are_kept(looked)]


def a_file(folder: Path) -> None:
    folder.write_text("", encoding="utf-8")


def a_folder_of_that_name(folder: Path) -> None:
    (folder / "rates.json").mkdir(parents=True)


@pytest.mark.parametrize("obstacle", [a_file, a_folder_of_that_name])
def test_a_folder_that_cannot_be_written_to_is_a_warning(
    tmp_path: Path, obstacle: Callable[[Path], None]
) -> None:
    folder = tmp_path / "state"
    obstacle(folder)

    (finding,) = bad(
        checks.rates_are_kept(look_at(HydraSettings(["http://127.0.0.1:9"], state_dir=folder)))
    )
    assert str(folder) in finding.says
    assert "state_dir" in finding.do


@pytest.mark.parametrize(
    ("nodes", "settings", "word"),
    [
        (["https://rig"], {"verify": False}, "TLS"),
        (["http://rig"], {"lease_ttl": 60}, "lease_ttl"),
        (["http://me:secret@rig:11434"], {}, "unencrypted"),
    ],
)
def test_settings_that_are_hardly_meant_are_warned_of(
    nodes: list[str], settings: dict[str, Any], word: str
) -> None:
    findings = bad(checks.settings_are_safe(look(settings=HydraSettings(nodes, **settings))))

    assert [word in finding.says for finding in findings] == [True]
    assert "secret" not in str(findings)


# --------------------------------------------------------------------- reachable


@pytest.mark.parametrize(
    ("health", "reason", "remedy"),
    [
        ("down", "connection refused", "OLLAMA_HOST=0.0.0.0"),
        ("down", "no route to host", "switched on"),
        ("down", "/api/tags gave no answer in 2 s", "health_check_timeout"),
        ("down", "its host name is unknown", "spelling"),
        ("down", "its TLS certificate is not accepted: expired", "verify"),
        ("down", "/api/tags answers with status 502", "proxy"),
        ("misconfigured", "refuses access (401); check Node(headers=...)", "user:password@"),
        ("misconfigured", "refuses access (403); check Node(headers=...)", "Host"),
        ("misconfigured", "redirects (301); configure the URL it leads to", "https"),
        ("misconfigured", "/api/tags is a web page that no Ollama server sends", "another server"),
        ("misconfigured", "what it sends is not HTTP", "another server"),
        ("unknown", "", "health_check_timeout"),
    ],
)
def test_each_reason_for_not_answering_has_its_remedy(
    health: str, reason: str, remedy: str
) -> None:
    node = snapshot("rack", health=health, health_reason=reason)

    (finding,) = checks.nodes_answer(look(node))
    assert finding.level == "problem"
    assert remedy in finding.do
    assert "http://rack:11434" in finding.says


def test_ollama_on_this_machine_is_to_be_started_on_its_port() -> None:
    node = snapshot("a", local=True, health="down", health_reason="connection refused")

    (finding,) = checks.nodes_answer(look(node))
    assert "OLLAMA_HOST=127.0.0.1:11434 ollama serve" in finding.do


def test_a_node_that_hides_what_is_loaded_is_warned_of() -> None:
    node = healthy("a", health_reason="/api/ps gave no answer in 2 s")

    (finding,) = checks.nodes_answer(look(node))
    assert finding.level == "warning"
    assert "/api/ps" in finding.says


def test_two_names_for_one_address_are_one_server() -> None:
    addresses = {"a": "this machine:11434", "b": "this machine:11434", "c": "10.0.0.7:11434"}

    (finding,) = checks.nodes_are_different(
        look(healthy("a"), healthy("b"), healthy("c"), addresses=addresses)
    )
    assert finding.level == "problem"
    assert "a and b are the same server" in finding.says


def test_models_that_are_unloaded_at_the_same_instant_give_a_server_away() -> None:
    twins = [healthy(name, loaded=loaded(LLAMA, expires_at=1_790_000_000.123456)) for name in "ab"]
    other = healthy("c", loaded=loaded(LLAMA, expires_at=1_790_000_000.5))

    (finding,) = checks.nodes_are_different(look(*twins, other))
    assert "a and b are the same server" in finding.says


# ----------------------------------------------------------------------- version


@pytest.mark.parametrize(
    ("version", "word"),
    [("0.1.30", "/api/ps"), ("0.5.13", "tools"), ("0.9.6", "context_length")],
)
def test_an_old_version_is_warned_of_with_what_it_cannot_tell(version: str, word: str) -> None:
    (finding,) = checks.versions_are_known(look(snapshot("a", version=version)))

    assert finding.level == "warning"
    assert word in finding.says


def test_versions_on_both_sides_of_0_30_are_warned_of() -> None:
    (finding,) = bad(checks.versions_are_known(look(healthy("a"), snapshot("b", version="0.24.0"))))

    assert finding.do == "update b"


@pytest.mark.parametrize("version", [None, "0.0.0", "my-build"])
def test_a_version_that_says_nothing_is_let_be(version: str | None) -> None:
    (finding,) = checks.versions_are_known(look(snapshot("a", version=version)))

    assert finding.level == "ok"


@pytest.mark.parametrize(
    ("text", "version"),
    [("0.32.15", (0, 32, 15)), ("0.33.0-rc2", (0, 33, 0)), ("0.0.0", None), ("x", None)],
)
def test_versions_are_compared_as_numbers(text: str, version: tuple[int, ...] | None) -> None:
    assert checks.version_of(text) == version


# ------------------------------------------------------------------------ models


def test_a_model_on_one_node_only_is_named() -> None:
    (finding,) = bad(checks.models_are_there(look(healthy("a", models=(LLAMA, BIG)), healthy("b"))))

    assert f"{BIG} (a)" in finding.says


def test_a_single_node_is_not_told_to_have_a_second_one() -> None:
    assert not bad(checks.models_are_there(look(healthy("a"))))


def test_a_node_without_models_is_told_to_pull_one() -> None:
    findings = bad(checks.models_are_there(look(healthy("a", models=()))))

    assert ["ollama pull" in finding.do for finding in findings] == [True]


def test_one_name_with_different_files_is_told() -> None:
    findings = list(
        checks.models_are_alike(
            look(
                healthy("a", installed=file(LLAMA, "1111111111111111")),
                healthy("b", installed=file(LLAMA, "2222222222222222")),
            )
        )
    )

    assert len(findings) == 1
    assert "111111111111 on a" in findings[0].says
    assert f"ollama pull {LLAMA}" in findings[0].do


def test_one_file_under_two_names_is_told() -> None:
    (finding,) = checks.models_are_alike(
        look(
            healthy("a", installed=file("llama3.2", "11")),
            healthy("b", installed=file(LLAMA, "11")),
        )
    )

    assert "the same model under two names" in finding.says
    assert "ollama cp" in finding.do


@pytest.mark.parametrize(
    ("one", "other", "is_told"),
    [
        ("qwen3:8b", "qwen3:latest", True),
        ("nomic-embed-text", "nomic-embedd-text", True),
        ("qwen3:8b", "qwen3:14b", False),
        ("llama3.1:8b", "llama3.2:8b", False),
        ("llama3.2:3b", "gemma3:12b", False),
    ],
)
def test_names_close_to_each_other_are_told(one: str, other: str, is_told: bool) -> None:
    findings = list(
        checks.models_are_alike(look(healthy("a", models=(one,)), healthy("b", models=(other,))))
    )

    assert bool(findings) == is_told


def test_names_that_one_node_tells_apart_are_let_be() -> None:
    both = healthy("a", models=("qwen3:8b", "qwen3:latest"))

    assert not list(checks.models_are_alike(look(both, healthy("b", models=("qwen3:8b",)))))


# ------------------------------------------------------------------------ memory


def unmeasured(**about: Any) -> NodeSnapshot:
    return healthy("a", free_vram_gb=None, total_vram_gb=None, **about)


def test_unknown_memory_is_told_with_the_setting_for_it() -> None:
    (finding,) = checks.memory_is_known(look(unmeasured()))

    assert finding.level == "warning"
    assert 'url = "http://a:11434", id = "a", vram_gb' in finding.do
    assert "[gpu]" not in finding.do


def test_on_this_machine_the_gpu_extra_helps() -> None:
    (finding,) = checks.memory_is_known(look(unmeasured(local=True), gpu_extra_installed=False))

    assert "pip install 'hydra-llm[gpu]'" in finding.do


def test_on_this_machine_monitoring_may_just_be_off() -> None:
    off = HydraSettings("http://a:11434", vram_monitoring=False)

    (finding,) = checks.memory_is_known(look(unmeasured(local=True), settings=off))
    assert "vram_monitoring" in finding.do


def test_why_this_machines_gpus_tell_nothing_is_said_of_it_alone() -> None:
    why = "NVML: the driver is not loaded (code 9)"

    here, there = (
        next(checks.memory_is_known(look(unmeasured(local=local), local_reasons=(why,))))
        for local in (True, False)
    )

    assert f"VRAM it has ({why}): whether" in here.says
    assert why not in there.says


@pytest.mark.parametrize(
    ("vram_gb", "monitored", "is_asked"),
    [(None, True, True), (8, True, False), (None, False, False)],
)
def test_this_machines_gpus_are_asked_why_only_where_they_are_missed(
    monkeypatch: pytest.MonkeyPatch, vram_gb: float | None, *, monitored: bool, is_asked: bool
) -> None:
    monkeypatch.setattr(LocalDevices, "read", lambda self, now: ((), ("NVML: no",)))
    with SimulatedNode("a") as node:
        settings = HydraSettings(
            Node(node.url, local=True, vram_gb=vram_gb), vram_monitoring=monitored
        )

        assert look_at(settings).local_reasons == (("NVML: no",) if is_asked else ())


def test_a_driver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(LocalDevices, "read", lambda self, now: release.wait(10.0))
    monkeypatch.setattr(module, "GPU_SECONDS", 0.01)

    assert module._why_no_gpu() == ("the GPU's driver does not answer",)
    release.set()


def test_a_cpu_only_node_is_no_unknown() -> None:
    (finding,) = checks.memory_is_known(look(healthy("a", free_vram_gb=0, total_vram_gb=0)))

    assert finding.level == "ok"


def test_unknown_nodes_are_told_together_with_what_to_write_down(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HYDRA_LLM_NODES", "http://a:11434,http://b:11434")
    nodes = [replace(unmeasured(), node=Node(f"http://{name}:11434")) for name in "ab"]

    (finding,) = checks.memory_is_known(look(*nodes, settings=HydraSettings()))
    assert finding.nodes == ("a:11434", "b:11434")
    assert "unset HYDRA_LLM_NODES" in finding.do
    assert tomllib.loads(finding.do.partition(": ")[2]) == {
        "nodes": [
            {"url": f"http://{name}:11434", "vram_gb": 24, "vram_reserved_gb": 1} for name in "ab"
        ]
    }


def with_exporter(*reasons: str, **about: Any) -> NodeSnapshot:
    about = {
        "node": Node("http://a:11434", id="a", exporter="http://a:9400"),
        "vram_source": "dcgm-exporter",
        **about,
    }
    return replace(healthy("a"), vram_reasons=tuple(reasons), **about)


def test_an_exporter_that_answers_is_named_with_the_age_of_its_figures() -> None:
    (finding,) = checks.exporters_are_read(
        look(with_exporter("NVML: not installed", observed_at=100.0, vram_observed_at=70.0))
    )

    assert finding.level == "ok"
    assert finding.says == "dcgm-exporter answers; its figures were up to 30 s old"


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("prometheus_client is not installed; pip install 'hydra-llm[gpu]'", "hydra-llm[gpu]"),
        ("connection refused", "runs there"),
        ("its host name is unknown", "runs there"),
        ("it gave no answer in 2 s", "health_check_timeout"),
        ("it has not answered yet", "health_check_timeout"),
        ("it refuses access (401); check Node(exporter_headers=...)", "exporter_headers"),
        ("it redirects (302); configure the URL it leads to", "URL"),
        ("it is a web page; metrics are as a rule at /metrics", "port and path"),
        ("it is of no exporter that is known here, or tells nothing of GPUs", "port and path"),
        ("it answers with status 404", "port and path"),
        ("dcgm-exporter: it is of 2 machines; name the node's own exporter", "gathers several"),
        ("its TLS certificate is not accepted: expired", "verify"),
        ("its clock is not ours, so how old its figures are cannot be said", "NTP"),
        ("all-smi: it has not read the GPUs yet", "docs/vram.md"),
    ],
)
def test_each_trouble_with_an_exporter_has_its_remedy(reason: str, remedy: str) -> None:
    (finding,) = checks.exporters_are_read(look(with_exporter(f"exporter: {reason}")))

    assert (finding.level, finding.nodes) == ("warning", ("a",))
    assert finding.says == f"its exporter at http://a:9400/metrics: {reason}"
    assert remedy in finding.do


def test_an_exporter_without_monitoring_is_in_vain() -> None:
    off = HydraSettings("http://a:11434", vram_monitoring=False)

    (finding,) = checks.exporters_are_read(look(with_exporter(), settings=off))
    assert finding.level == "warning"


def test_a_node_without_an_exporter_is_not_asked_for_one() -> None:
    assert not list(checks.exporters_are_read(look(healthy("a"))))


def test_a_token_in_an_exporters_url_is_not_told() -> None:
    asked = Node("http://a:11434", id="a", exporter="http://a:9400/metrics?token=sesame")

    (finding,) = checks.exporters_are_read(look(with_exporter("exporter: x", node=asked)))
    assert "sesame" not in str(finding)


def test_a_token_for_an_exporter_without_tls_is_warned_of() -> None:
    node = Node("https://rig", exporter="http://rig:9936", exporter_headers={"authorization": "x"})

    (finding,) = bad(checks.settings_are_safe(look(settings=HydraSettings([node]))))
    assert "unencrypted" in finding.says


def test_a_model_partly_in_system_memory_is_warned_of() -> None:
    slow = loaded(LLAMA, size_bytes=4_000_000_000, size_vram_bytes=1_000_000_000)

    (finding,) = checks.models_are_on_the_gpu(look(healthy("a", loaded=slow)))
    assert "25% on the GPU" in finding.says


# ---------------------------------------------------------------------- contexts


def test_one_model_with_different_contexts_is_warned_of() -> None:
    (finding,) = checks.contexts_agree(
        look(
            healthy("a", loaded=loaded(LLAMA, context_length=4096)),
            healthy("b", loaded=loaded(LLAMA, context_length=32768)),
        )
    )

    assert "4096 on a, 32768 on b" in finding.says


# ---------------------------------------------------------------- on real sockets


def test_the_doctor_finds_the_login_the_web_page_the_dead_and_the_twin() -> None:
    nodes = [SimulatedNode(name) for name in ("good", "login", "page", "dead")]
    with SimulatedCluster(nodes) as cluster:
        cluster["login"].inject(StatusFault(status=401), paths=("*",))
        cluster["page"].inject(HtmlFault(), paths=("*",))
        cluster["dead"].kill()
        good = cluster["good"]
        named = [
            *cluster.nodes(),
            Node(f"http://localhost:{good.port}", id="twin"),
        ]
        seen = look_at(HydraSettings(named))

    problems = [f for f in checks.check(seen) if f.level == "problem"]
    by_node = {"".join(finding.nodes): finding for finding in problems}
    assert by_node.keys() == {"login", "page", "dead", ""}
    assert "user:password@" in by_node["login"].do
    assert "another server" in by_node["page"].do
    assert "ollama serve" in by_node["dead"].do
    assert "good and twin are the same server" in by_node[""].says


def test_the_doctor_finds_an_exporter_that_nobody_runs() -> None:
    with SimulatedNode("a") as node:
        # Ollama itself listens there, and knows no such path.
        seen = look_at(HydraSettings([node.node(exporter=node.url)]))

    (finding,) = checks.exporters_are_read(seen)
    assert "it answers with status 404" in finding.says
    assert "port and path" in finding.do
