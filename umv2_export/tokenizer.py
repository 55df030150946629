"""Text to token ids and back, with the checkpoint's own tokenizer.json."""

from pathlib import Path
from typing import Any

import numpy as np

from umv2_export.bundle import Bundle
from umv2_export.errors import EnvironmentUnfit, InputRejected
from umv2_export.runtimes.base import Array

__all__ = ["load_tokenizer", "text_ids"]


def load_tokenizer(file: Path) -> Any:
    """The tokenizer of a bundle, with `encode(text).ids` and `decode(ids)`.

    Raises:
        EnvironmentUnfit: the package is not installed.
        InputRejected: the file is no tokenizer.
    """
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415 - an optional package
    except ImportError as error:
        raise EnvironmentUnfit(
            "text prompts need the package tokenizers", fix="pip install 'umv2-export[tokenizer]', or pass --prompt-ids"
        ) from error
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain Exception
        raise InputRejected("not a tokenizer file", where=file, why=str(error)) from error


def text_ids(bundle: Bundle, text: bytes) -> Array:
    """Token ids of a text; of a bundle without a tokenizer, its bytes (modulo the vocabulary, if that is smaller)."""
    if bundle.tokenizer_file is not None:
        encoded = load_tokenizer(bundle.tokenizer_file).encode(text.decode("utf-8", "replace")).ids
        return np.asarray(encoded, dtype=np.int64)
    return np.frombuffer(text, dtype=np.uint8).astype(np.int64) % bundle.config.vocab_size
