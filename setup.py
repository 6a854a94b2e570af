"""
Say which packages there are; everything else stands in pyproject.toml.

`integrations/` is a folder of its own and ships as `hydra_llm.integrations`. The symlink
`hydra_llm/integrations` is for tools that read the checkout. It takes no part in the build,
because git leaves a plain text file in its place where symlinks are off, as on Windows.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(
            include=["hydra_llm", "hydra_llm.*"],
            exclude=["hydra_llm.integrations", "hydra_llm.integrations.*"],
        ),
        *(f"hydra_llm.{name}" for name in find_packages(include=["integrations", "integrations.*"])),
    ],
    package_dir={"hydra_llm": "hydra_llm", "hydra_llm.integrations": "integrations"},
)
