"""Reads ``/api/show`` without trusting it: a figure that cannot be counts as not given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["MOST", "Metadata", "whole"]

MOST = 1 << 24
"""No width, count or vocabulary of a model is above this; what is larger is nonsense."""


def whole(value: object, most: int = MOST) -> int | None:
    """A whole number from 0 to ``most``; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not 0 <= value <= most or int(value) != value:  # NaN is in no range
        return None
    return int(value)


class Metadata:
    """
    ``model_info`` of one model, by the names that follow its architecture's.

    Arrays are ``null`` unless ``verbose`` was asked for; a scalar and an array of equal numbers
    then say the same.
    """

    def __init__(self, show: object) -> None:
        self.show: Mapping[str, Any] = show if isinstance(show, dict) else {}
        info = self.show.get("model_info")
        self._info: Mapping[str, Any] = info if isinstance(info, dict) else {}
        architecture = self._info.get("general.architecture")
        self.architecture = architecture if isinstance(architecture, str) else ""

    def __contains__(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self._info

    def get(self, key: str) -> Any:
        """The value of ``<architecture>.<key>``, whatever it is."""
        return self._info.get(f"{self.architecture}.{key}")

    def whole(self, key: str, most: int = MOST) -> int | None:
        """A number that is not 0, the largest of an array; None if there is none."""
        value = self.get(key)
        if isinstance(value, list):
            return max((whole(one, most) or 0 for one in value), default=0) or None
        return whole(value, most) or None

    def general(self, key: str, most: int) -> int | None:
        """A number that is not 0 from ``general.<key>``."""
        return whole(self._info.get(f"general.{key}"), most) or None

    def per_layer(self, key: str, layers: int) -> tuple[int, ...] | None:
        """A number for each layer, from an array or a scalar; None where that is not told."""
        value = self.get(key)
        if isinstance(value, list):
            numbers = [whole(one) for one in value[:layers]]
            told = tuple(one for one in numbers if one is not None)
            return told if len(told) == layers else None
        number = whole(value)
        return None if number is None else (number,) * layers

    def flags(self, key: str, layers: int) -> tuple[bool, ...] | None:
        """A yes or no for each layer; None where that is not told."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) < layers:
            return None
        if not all(isinstance(one, bool) or one in (0, 1) for one in value[:layers]):
            return None
        return tuple(bool(one) for one in value[:layers])

    @property
    def has_tokenizer(self) -> bool:
        """Whether the file carries a vocabulary, which is no tensor."""
        return any(isinstance(key, str) and key.startswith("tokenizer.") for key in self._info)

    @property
    def has_merges(self) -> bool:
        """Whether the vocabulary is a byte pair encoding, which lists its merges too."""
        return self._info.get("tokenizer.ggml.model") == "gpt2"

    @property
    def quantization(self) -> str:
        """The level's name, such as ``Q4_K_M``; empty where it is not told."""
        details = self.show.get("details")
        level = details.get("quantization_level") if isinstance(details, dict) else None
        return level.upper() if isinstance(level, str) else ""

    def parameter(self, name: str) -> int | None:
        """A number that the model's own parameters set (lines of ``name value``)."""
        told = self.show.get("parameters")
        if not isinstance(told, str):
            return None
        found = re.search(rf"^{re.escape(name)}\s+(\d{{1,6}})\s*$", told, re.MULTILINE)
        return int(found[1]) if found else None
