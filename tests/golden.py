"""Checkpoints in the authors' format with the outputs of the authors' code; the README of each folder lists them."""

from pathlib import Path

__all__ = ["GOLDEN_CASES", "TRAINED_CASES"]

_DATA = Path(__file__).parent / "data"

# Small random models, their tables scaled so that memory layers matter.
GOLDEN_CASES: list[Path] = sorted(path for path in (_DATA / "official").iterdir() if path.is_dir())

# As a training run leaves them.
TRAINED_CASES: list[Path] = sorted(path for path in (_DATA / "trained").iterdir() if path.is_dir())
