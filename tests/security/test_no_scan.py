"""Nothing is searched, and nothing listens, that nobody has asked for."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.router.conftest import MODEL, make_nodes, preloaded

PROGRAM = """
import json, sys, time

heard = []
def hear(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg"):
        heard.append((event, repr(arguments[1])))
sys.addaudithook(hear)

port, model = int(sys.argv[1]), sys.argv[2]
url = f"http://127.0.0.1:{port}"
import hydra_llm
from hydra_llm.integrations.langchain import ChatHydra
router = hydra_llm.Router([url])
client = hydra_llm.Client(router=router)
chat = ChatHydra(model=model, nodes=router)
time.sleep(0.3)
made = list(heard)
client.chat(model, [{"role": "user", "content": "Hello"}])
time.sleep(0.5)
print(json.dumps({"made": made, "used": heard}))
router.close()
"""


def test_objects_that_are_made_speak_to_nobody_and_used_ones_to_the_nodes_alone() -> None:
    with preloaded(make_nodes("a"), MODEL) as cluster:
        port = cluster["a"].port
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(port), MODEL],
            capture_output=True,
            text=True,
            check=True,
            timeout=50,
        )
    told = json.loads(ended.stdout.splitlines()[-1])

    # urllib3, which LangChain brings, tries so whether there is IPv6.
    tried = ("socket.bind", "('::1', 0)")
    assert {tuple(one) for one in told["made"]} <= {tried}
    used = {tuple(one) for one in told["used"]} - {tried}
    assert used == {("socket.connect", f"('127.0.0.1', {port})")}
