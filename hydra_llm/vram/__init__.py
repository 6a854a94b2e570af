"""What a model will need, worked out before it is loaded.

::

    from hydra_llm.vram import estimate

    need = estimate(show, size, 8192)
    print(need)

``show`` is the answer of ``/api/show`` and ``size`` that of ``/api/tags``; both may be missing,
and the interval then is wider. Nothing here asks anybody anything.
"""

from __future__ import annotations

from hydra_llm.vram.estimator import estimate
from hydra_llm.vram.need import MemoryNeed, MemoryPart
from hydra_llm.vram.shape import ModelShape

__all__ = ["MemoryNeed", "MemoryPart", "ModelShape", "estimate"]
