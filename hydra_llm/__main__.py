"""``python -m hydra_llm`` is the command line."""

import sys

from hydra_llm.cli import main

sys.exit(main())
