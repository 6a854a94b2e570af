"""What `import hydra_llm` does, which is close to nothing."""

import json
import re
import sys
from importlib import metadata
from pathlib import Path

from tests.packaging.conftest import run

WATCHED_IMPORT = """
import json, sys, time

seen = []
WATCHED = {
    "socket.__new__", "socket.connect", "socket.bind", "socket.getaddrinfo", "subprocess.Popen",
    "_thread.start_new_thread", "_thread.start_joinable_thread", "os.fork", "os.posix_spawn",
}
sys.addaudithook(lambda event, args: seen.append(event) if event in WATCHED else None)
started = time.perf_counter()
import hydra_llm
took = time.perf_counter() - started
print(json.dumps({"seen": seen, "took": took, "modules": sorted(sys.modules)}))
"""

# What needs an extra may ask for it; the rest must do with what `pip install hydra-llm` brings.
# httpx has a command line too, and loads click and rich for it wherever they are installed; below
# it httpcore does so with h2, which LiteLLM brings.
IMPORT_THE_CORE = """
import json, pkgutil, sys

import contextlib

import httpx
with contextlib.suppress(ImportError):
    import h2.connection
before = set(sys.modules)
import hydra_llm

def load(path, prefix):
    # Not pkgutil.walk_packages: it imports every package that it looks into.
    for module in pkgutil.iter_modules(path, prefix):
        if module.name not in ("hydra_llm.cli", "hydra_llm.integrations"):
            loaded = __import__(module.name, fromlist=["x"])
            if module.ispkg:
                load(loaded.__path__, module.name + ".")

load(hydra_llm.__path__, "hydra_llm.")
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""

OPTIONAL = {
    "langchain_core", "langchain_ollama", "litellm", "prometheus_client", "pynvml", "redis", "rich",
    "typer", "yaml",
}  # fmt: skip


def test_importing_opens_nothing_starts_nothing_and_loads_no_framework(
    tmp_path: Path,
) -> None:
    result = json.loads(run(sys.executable, "-c", WATCHED_IMPORT, cwd=tmp_path))
    print(f"import hydra_llm: {result['took'] * 1000:.0f} ms, {len(result['modules'])} modules")

    assert result["seen"] == []
    assert not {name.partition(".")[0] for name in result["modules"]} & {*OPTIONAL, "ollama"}


def test_the_core_imports_only_what_it_declares(tmp_path: Path) -> None:
    loaded = set(json.loads(run(sys.executable, "-c", IMPORT_THE_CORE, cwd=tmp_path)))
    distributions = metadata.packages_distributions()
    came_from = {name: {*distributions.get(name, [])} for name in loaded}

    declared = core_dependencies("hydra-llm")
    undeclared = {name for name, dists in came_from.items() if dists and not dists & declared}
    assert not undeclared


def test_a_missing_extra_is_answered_with_how_to_install_it(tmp_path: Path) -> None:
    without = "import sys; sys.modules['langchain_ollama'] = None\n"
    ask = without + (
        "try:\n    import hydra_llm.integrations.langchain\n"
        "except ModuleNotFoundError as error:\n    print(error.name, error)"
    )
    told = run(sys.executable, "-c", ask, cwd=tmp_path)

    assert told.startswith("langchain_ollama ")
    assert 'pip install "hydra-llm[langchain]"' in told


def core_dependencies(distribution: str) -> set[str]:
    """Return the names of what is installed with a distribution when no extra is asked for."""
    found, ahead = set[str](), [distribution]
    while ahead:
        name = ahead.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:  # wanted on another platform or Python
            continue
        ahead += [canonical(need) for need in needs if "extra ==" not in need]
    return found | {name.replace("-", "_") for name in found}


def canonical(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name.group()).lower()
