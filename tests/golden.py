"""Checkpoints in the authors' format with the outputs of the authors' code; `data/official/README.md` lists them."""

from pathlib import Path

__all__ = ["GOLDEN_CASES"]

_COPIES = Path(__file__).parent / "data" / "official"

GOLDEN_CASES: list[Path] = sorted(path for path in _COPIES.iterdir() if path.is_dir())
