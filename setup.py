"""
Say which packages there are; everything else stands in pyproject.toml.

`integrations/` is a folder of its own and ships as `hydra_llm.integrations`. The symlink
`hydra_llm/integrations` is for tools that read the checkout. It takes no part in the build,
because git leaves a plain text file in its place where symlinks are off, as on Windows.
"""

from setuptools import find_packages, setup

core = find_packages(
    include=["hydra_llm", "hydra_llm.*"],
    exclude=["hydra_llm.integrations", "hydra_llm.integrations.*"],
)
integrations = find_packages(include=["integrations", "integrations.*"])

setup(
    packages=core + [f"hydra_llm.{name}" for name in integrations],
    package_dir={"hydra_llm": "hydra_llm", "hydra_llm.integrations": "integrations"},
)
