"""Machines: built in, from a file, and with one more."""

from __future__ import annotations

from pathlib import Path

import pytest

from hydra_llm import ConfigurationError
from hydra_llm.replay.clusters import add_machine, find_cluster

FILE = """
num_ctx = 8192

[[node]]
id = "rig"
vram_gb = 24
bandwidth_gb_s = 900
slots = 2

[[node]]
id = "attic"
vram_gb = 0
models = ["llama3.2:3b"]

[[model]]
name = "llama3.2:3b"
share = 3

[[model]]
name = "ours:70b"
size_gb = 42
"""


def written(folder: Path, text: str) -> str:
    path = folder / "cluster.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_sizes_of_gpus_are_a_cluster_with_five_models() -> None:
    cluster = find_cluster("24+24+12+8")

    assert [machine.vram_gb for machine in cluster.machines] == [24, 24, 12, 8]
    assert sorted(model.size_gb for model in cluster.models) == [1.4, 2.0, 4.9, 9.0, 20.0]
    assert len({machine.id for machine in cluster.machines}) == 4


def test_demo_is_a_cluster() -> None:
    assert [machine.id for machine in find_cluster("demo").machines] == [
        "workstation",
        "rack",
        "gaming",
    ]


def test_a_file_is_read(tmp_path: Path) -> None:
    cluster = find_cluster(written(tmp_path, FILE))

    rig, attic = cluster.machines
    assert (cluster.name, cluster.num_ctx) == ("cluster", 8192)
    assert (rig.bandwidth_gb_s, rig.slots, attic.vram_gb) == (900.0, 2, 0.0)
    assert cluster.installed(rig) == ("llama3.2:3b", "ours:70b")
    assert cluster.installed(attic) == ("llama3.2:3b",)
    assert cluster.shares == {"llama3.2:3b": 3.0, "ours:70b": 1.0}
    # A model that people know has its size, and one without a GPU computes on its CPU.
    assert cluster.models[0].size_gb == 2.0
    assert cluster.simulated()[1].settings.gpus == ()
    assert cluster.simulated()[0].settings.num_parallel == 2


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('id = "rig"', 'name = "rig"', "every [[node]] needs an id"),
        ("vram_gb = 24", "vram = 24", "unknown 'vram'; did you mean 'vram_gb'?"),
        ("vram_gb = 24", "ram_gb = 24", "node 'rig' needs vram_gb; 0 is a node without a GPU"),
        ("vram_gb = 24", "vram_gb = -1", "vram_gb should be a number 0 or more, not -1"),
        ("vram_gb = 24", "vram_gb = true", "vram_gb should be a number 0 or more, not True"),
        ("= 900", "= 0", "bandwidth_gb_s should be a number above 0, not 0"),
        ("= 900", "= nan", "bandwidth_gb_s should be a number above 0, not nan"),
        ("slots = 2", "slots = 0", "slots should be a whole number from 1 on"),
        ("slots = 2", "vram_told = 1", "vram_told should be true or false"),
        ("slots = 2", "used_vram_gb = 30", "used_vram_gb should be at most its vram_gb"),
        ('["llama3.2:3b"]', '"llama3.2:3b"', "models should be a list of names"),
        ('["llama3.2:3b"]', '["llama"]', "node 'attic' has 'llama', which is no [[model]]"),
        ('id = "attic"', 'id = "rig"', "two of [[node]] are called 'rig'"),
        ("size_gb = 42", "", "model 'ours:70b' needs size_gb"),
        ("size_gb = 42", 'size_gb = "42"', "size_gb should be a number above 0, not '42'"),
        ("ours:70b", "o u r s", "is not a model name"),
        ("share = 3", "shares = 3", "unknown 'shares'; did you mean 'share'?"),
        ("num_ctx = 8192", "num_ctx = 1", "num_ctx should be a whole number from 256 on"),
        ("num_ctx = 8192", "num_ctx =", "cannot be read as TOML"),
        ("[[node]]", "[[nodes]]", "unknown 'nodes'; did you mean 'node'?"),
        ("slots = 2", 'models = ["llama3.2:3b"]', "no node has model 'ours:70b'"),
    ],
)
def test_a_wrong_file_says_what_would_be_right(
    tmp_path: Path, old: str, new: str, says: str
) -> None:
    assert old in FILE

    with pytest.raises(ConfigurationError) as caught:
        find_cluster(written(tmp_path, FILE.replace(old, new)))
    assert says in str(caught.value)


def test_a_file_needs_nodes_and_models(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"needs a \[\[model\]\] for each model"):
        find_cluster(written(tmp_path, '[[node]]\nid = "a"\nvram_gb = 8\n'))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("demoo", "Did you mean 'demo'?"),
        ("24+0", "a GPU has more than 0 GB"),
        ("x+y", "a TOML file"),
    ],
)
def test_a_wrong_name_says_what_there_is(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        find_cluster(text)
    assert says in str(caught.value)


def test_a_machine_is_added() -> None:
    cluster = add_machine(find_cluster("12"), "gpu24=24,bandwidth=900,slots=2,load=3")

    added = cluster.machines[-1]
    assert (added.id, added.vram_gb, added.bandwidth_gb_s) == ("gpu24", 24.0, 900.0)
    assert (added.slots, added.load_gb_s) == (2, 3.0)
    assert len(cluster.machines) == 2
    # What was not said is as of such a card.
    assert add_machine(find_cluster("12"), "gpu=24").machines[-1].bandwidth_gb_s == 700.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("24", "write NAME=GB, as gpu24=24"),
        ("gpu24", "write NAME=GB, as gpu24=24"),
        ("gpu24=big", "'big' is no number"),
        ("gpu24=24,speed=3", "unknown 'speed'"),
        ("n1-12gb=24", "the cluster has a node 'n1-12gb' already"),
    ],
)
def test_a_wrong_addition_says_what_would_be_right(text: str, says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        add_machine(find_cluster("12"), text)
    assert says in str(caught.value)
