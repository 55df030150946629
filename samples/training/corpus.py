"""The text of the samples: the source of Python's standard library, cut into training and held-out files."""

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch

# Stands between files, and never occurs in source text: the models' end of text.
END_OF_TEXT = 0

HELD_OUT_SHARE = 16


@dataclass(frozen=True)
class Corpus:
    """Bytes as tokens.

    Attributes:
        training: uint8 [bytes].
        held_out: uint8 [bytes] of other files.
        digest: sha256 of both; another version of Python has another text.
    """

    training: torch.Tensor
    held_out: torch.Tensor
    digest: str


def standard_library() -> Corpus:
    """All modules of the running Python's standard library, without its tests; one file in 16 is held out, by name."""
    root = Path(sysconfig.get_path("stdlib"))
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(name.parts):
            continue
        held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] % HELD_OUT_SHARE == 0
        parts[held_out].append(file.read_bytes() + bytes([END_OF_TEXT]))
    training, held_out_text = (b"".join(part) for part in parts)
    return Corpus(
        torch.frombuffer(bytearray(training), dtype=torch.uint8),
        torch.frombuffer(bytearray(held_out_text), dtype=torch.uint8),
        hashlib.sha256(training + held_out_text).hexdigest(),
    )
