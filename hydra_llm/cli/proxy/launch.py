"""
LiteLLM's command in a process of its own: ``python launch.py FOLDER [option ...]``.

A file and not ``python -c``, because with that the current directory would come before all
installed packages, and LiteLLM's search for ``.env`` would start there.
"""

import sys
from importlib import import_module
from pathlib import Path


def main() -> None:
    """
    Run the proxy; FOLDER is where the user's config lies.

    LiteLLM looks for modules that a config names beside it, but is given a copy elsewhere;
    so FOLDER is searched after everything that is installed.
    """
    folder = sys.argv.pop(1)
    own = Path(__file__).parent
    sys.path[:] = [*(each for each in sys.path if each and Path(each) != own), folder]
    sys.argv[0] = "litellm"
    # By name: only integrations/ may import LiteLLM, and this is no import for our process.
    import_module("litellm.proxy.proxy_cli").run_server()


if __name__ == "__main__":
    main()
