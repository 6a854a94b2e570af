"""``python -m hydra_llm`` is the command line."""

import sys

from hydra_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())
