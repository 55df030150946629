"""Text to token ids and back, with the checkpoint's own tokenizer.json."""

from pathlib import Path
from typing import Any

from umv2_export.errors import EnvironmentUnfit, InputRejected

__all__ = ["load_tokenizer"]


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
