import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped,unused-ignore]

from hydra_llm import Node
from hydra_llm.cli.litellm_config import config_text
from hydra_llm.testing import SimulatedCluster, SimulatedNode
from hydra_llm.types import InstalledModel, NodeSnapshot
from tests.cli.conftest import Run
from tests.helpers import PROXY_PYTHON


def snapshot(node: Node, *models: InstalledModel) -> NodeSnapshot:
    installed = {model.name: model for model in models}
    return NodeSnapshot(node=node, health="up", installed=installed)


CHAT = InstalledModel(name="qwen3:8b", capabilities=frozenset({"completion", "tools"}))


def entries(*nodes: NodeSnapshot) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = yaml.safe_load(config_text(nodes))["model_list"]
    return models


def test_every_model_of_every_node_has_its_entry(run: Run, cluster: SimulatedCluster) -> None:
    result = run("litellm-config", on=cluster)

    assert result.exit_code == 0, result.stderr
    config = yaml.safe_load(result.stdout)
    assert config["litellm_settings"] == {"callbacks": ["hydra_llm.integrations.litellm.instance"]}
    assert config["router_settings"] == {"num_retries": 2}
    ids = [entry["model_info"]["id"] for entry in config["model_list"]]
    assert ids == [
        "rack/gemma3:12b", "gaming/gemma3:12b",
        "workstation/llama3.2:3b", "rack/llama3.2:3b", "gaming/llama3.2:3b",
        "rack/mistral-small:24b",
        "workstation/nomic-embed-text", "rack/nomic-embed-text",
        "workstation/qwen3:8b", "rack/qwen3:8b", "gaming/qwen3:8b",
    ]  # fmt: skip
    assert config["model_list"][0] == {
        "model_name": "gemma3:12b",
        "litellm_params": {
            "model": "ollama_chat/gemma3:12b",
            "api_base": cluster["rack"].url,
        },
        "model_info": {"id": "rack/gemma3:12b", "hydra": {"node_id": "rack"}},
    }


def test_it_is_the_same_each_time(run: Run, cluster: SimulatedCluster) -> None:
    assert run("litellm-config", on=cluster).stdout == run("litellm-config", on=cluster).stdout


def test_a_model_that_embeds_goes_by_the_provider_that_can() -> None:
    embeds = InstalledModel(name="bge-m3:latest", capabilities=frozenset({"embedding"}))
    [entry] = entries(snapshot(Node("http://rig:11434", id="rig"), embeds))

    assert entry["model_name"] == "bge-m3"
    assert entry["litellm_params"]["model"] == "ollama/bge-m3:latest"
    assert entry["model_info"]["mode"] == "embedding"


@pytest.mark.parametrize("capabilities", [None, frozenset({"completion", "embedding"})])
def test_a_model_that_may_chat_is_for_chats(capabilities: frozenset[str] | None) -> None:
    model = InstalledModel(name="old:1b", capabilities=capabilities)
    [entry] = entries(snapshot(Node("rig"), model))

    assert entry["litellm_params"]["model"] == "ollama_chat/old:1b"
    assert "mode" not in entry["model_info"]


def test_what_was_configured_of_a_node_is_handed_on() -> None:
    node = Node("rig", id="rig", vram_gb=24, ram_gb=64, labels=("fast", "quiet"), slots=2)
    [entry] = entries(snapshot(node, CHAT))

    assert entry["model_info"]["hydra"] == {
        "node_id": "rig",
        "vram_gb": 24,
        "ram_gb": 64,
        "slots": 2,
        "labels": ["fast", "quiet"],
    }


# -------------------------------------------------------------------- credentials


def test_no_credential_is_written() -> None:
    text = config_text(
        [
            snapshot(Node("a", id="a-1", headers={"Authorization": "Bearer geheim"}), CHAT),
            snapshot(Node("https://me:geheim@b", id="a.1"), CHAT),
            snapshot(Node("c", id="a_1", headers={"authorization": "Bearer geheim"}), CHAT),
            snapshot(
                Node("d", id="d", headers={"X-Key": "geheim", "Authorization": "geheim"}), CHAT
            ),
        ]
    )

    assert "geheim" not in text
    first, second, third, fourth = yaml.safe_load(text)["model_list"]
    assert first["litellm_params"]["api_key"] == "os.environ/NODE_A_1_API_KEY"
    assert second["model_info"]["hydra"]["headers"] == {
        "Authorization": "os.environ/NODE_A_1_AUTHORIZATION"
    }
    # Another node's token, though its name is spelt the same in a variable.
    assert third["litellm_params"]["api_key"] == "os.environ/NODE_A_1_API_KEY_2"
    assert fourth["model_info"]["hydra"]["headers"] == {
        "X-Key": "os.environ/NODE_D_X_KEY",
        "Authorization": "os.environ/NODE_D_AUTHORIZATION",
    }
    for variable in re.findall(r"os\.environ/(\w+)", text):
        assert f"#   {variable}: the " in text


def test_two_models_of_a_node_share_its_variable() -> None:
    node = Node("a", id="a", headers={"Authorization": "Bearer geheim"})
    keys = {
        entry["litellm_params"]["api_key"]
        for entry in entries(snapshot(node, CHAT, InstalledModel(name="other:1b")))
    }

    assert keys == {"os.environ/NODE_A_API_KEY"}


# ----------------------------------------------------------------------- comments


def test_comments_say_what_it_is_and_what_is_missing(run: Run, cluster: SimulatedCluster) -> None:
    cluster["gaming"].kill()

    text = run("litellm-config", on=cluster).stdout
    assert text.startswith("# LiteLLM's config for these Ollama nodes")
    assert "#   hydra-llm proxy --config config.yaml " in text
    assert "#   export LITELLM_MASTER_KEY=" in text
    assert f"#   gaming ({cluster['gaming'].url}): connection refused\n" in text
    assert "gaming/" not in text


def test_what_a_node_had_when_it_was_last_seen_is_not_written() -> None:
    gone = NodeSnapshot(node=Node("b", id="b"), health="down", installed={CHAT.name: CHAT})

    [entry] = entries(snapshot(Node("a", id="a"), CHAT), gone)
    assert entry["model_info"]["id"] == "a/qwen3:8b"


def test_what_a_node_says_stays_in_its_comment() -> None:
    evil = NodeSnapshot(
        node=Node("b", id="b"), health="down", health_reason="no\nmodel_list: []\x85x: ünd"
    )
    text = config_text([snapshot(Node("a"), CHAT), evil])

    assert len(yaml.safe_load(text)["model_list"]) == 1
    assert text.isascii()
    assert list(yaml.safe_load(text)) == ["model_list", "litellm_settings", "router_settings"]


def test_without_a_model_there_is_nothing_to_write(run: Run) -> None:
    with SimulatedCluster([SimulatedNode("a", models=()), SimulatedNode("b")]) as cluster:
        cluster["b"].kill()
        result = run("litellm-config", on=cluster)

    assert result.exit_code == 1
    assert not result.stdout
    assert "no node has a model (a: no model, b: connection refused)" in result.stderr


# --------------------------------------------------------------------------- file


def test_it_writes_a_file_and_does_not_overwrite_it(
    run: Run, cluster: SimulatedCluster, tmp_path: Path
) -> None:
    file = tmp_path / "my config.yaml"
    result = run("litellm-config", f"--output={file}", on=cluster)
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"--config '{file}'" in file.read_text()

    file.write_text("mine")
    result = run("litellm-config", f"--output={file}", on=cluster)
    assert result.exit_code == 2
    assert "exists; --force overwrites it" in result.stderr
    assert file.read_text() == "mine"

    assert run("litellm-config", f"--output={file}", "--force", on=cluster).exit_code == 0
    assert "model_list" in yaml.safe_load(file.read_text())


def test_a_file_that_cannot_be_written_is_named(
    run: Run, cluster: SimulatedCluster, tmp_path: Path
) -> None:
    result = run("litellm-config", f"--output={tmp_path / 'no' / 'c.yaml'}", on=cluster)

    assert result.exit_code == 2
    assert "it cannot be written (No such file or directory)" in result.stderr


# ------------------------------------------------------------------------ LiteLLM

TAKES = """
import json, sys, yaml, litellm
config = yaml.safe_load(open(sys.argv[1]))
router = litellm.Router(model_list=config["model_list"], **config["router_settings"])
print(json.dumps([[d["model_name"], d["model_info"]["id"]] for d in router.model_list]))
"""


@pytest.fixture
def file(run: Run, cluster: SimulatedCluster, tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    assert run("litellm-config", f"--output={file}", on=cluster).exit_code == 0
    return file


@pytest.mark.skipif(not PROXY_PYTHON.exists(), reason="LiteLLM's proxy is not in .venv/proxy")
def test_litellm_takes_it(file: Path) -> None:
    done = subprocess.run(
        [PROXY_PYTHON, "-c", TAKES, file],
        env={"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        encoding="utf-8",
        timeout=50,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout.splitlines()[-1])
    config = yaml.safe_load(file.read_text())
    assert taken == [[e["model_name"], e["model_info"]["id"]] for e in config["model_list"]]
