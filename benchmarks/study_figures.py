"""Figures and tables of the study, from its result lines."""

from pathlib import Path


def draw(results: Path) -> None:
    """Nothing yet."""
