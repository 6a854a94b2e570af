"""What metrics exporters on a node tell of its memory.

:func:`read_page` makes devices of a page; :class:`ExporterWatch` fetches it, again and again.
"""

from __future__ import annotations

from hydra_llm.probes.exporters.reading import ExporterReading, read_page
from hydra_llm.probes.exporters.watch import ExporterWatch

__all__ = ["ExporterReading", "ExporterWatch", "read_page"]
