"""Tokenizer files on their way into a result: each is what its name says, or it is not copied.

A checkpoint is a stranger's, and its files may be links: what is copied out of it must not be a private file of the
reader that a link was pointed at.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from umv2_export.errors import InputRejected
from umv2_export.system.files import inside

__all__ = [
    "TOKENIZER_FILE",
    "chosen_tokenizer",
    "copy_tokenizer_files",
    "read_tokenizer_file",
    "require_tokenizer_files",
    "tokenizer_files",
    "tokenizer_settings",
]

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json")
SETTINGS_FILE = "tokenizer_config.json"

# The largest published ones have 35 MB (262,144 tokens with their merges).
MAX_BYTES = 128 * 2**20

# A file of these names has one of these fields, or none at all. Keys, logins and settings of other programs do not: of
# those around language models some have `model`, `temperature` or `chat_template`.
_SIGNS: Mapping[str, frozenset[str]] = {
    SETTINGS_FILE: frozenset(
        {
            "add_bos_token",
            "add_eos_token",
            "add_prefix_space",
            "added_tokens_decoder",
            "bos_token",
            "clean_up_tokenization_spaces",
            "eos_token",
            "model_max_length",
            "pad_token",
            "tokenizer_class",
            "unk_token",
        }
    ),
    "special_tokens_map.json": frozenset(
        {
            "additional_special_tokens",
            "bos_token",
            "cls_token",
            "eos_token",
            "mask_token",
            "pad_token",
            "sep_token",
            "unk_token",
        }
    ),
}


def tokenizer_files(folder: Path) -> list[Path]:
    """The tokenizer files of a checkpoint or bundle, where it has any.

    Raises:
        InputRejected: one is reached through another user's link.
    """
    return [inside(folder, name) for name in TOKENIZER_FILES if (folder / name).is_file()]


def read_tokenizer_file(file: Path, name: str | None = None) -> tuple[bytes, Mapping[str, Any]]:
    """A tokenizer file, as bytes and parsed; read once, so that both are the same.

    Args:
        file: to be read.
        name: which of `TOKENIZER_FILES` it is; None: as it is called.

    Raises:
        InputRejected: it is too large, not JSON, or not what its name says.
    """
    name = name or file.name
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputRejected("the tokenizer file cannot be read", where=file, why=error.strerror) from error
    if len(content) > MAX_BYTES:
        raise InputRejected(f"the tokenizer file is larger than {MAX_BYTES} bytes", where=file)
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputRejected(f"not a {name}: it is not JSON", where=file, why=str(error)) from error
    if not isinstance(data, dict) or (data and not _is(name, data)):
        raise InputRejected(
            f"not a {name}",
            where=file,
            why="it has none of the fields that such a file has",
            fix="remove the file, or put the right one in its place",
        )
    return content, data


def _is(name: str, data: Mapping[str, Any]) -> bool:
    if name == TOKENIZER_FILE:
        model = data.get("model")
        return isinstance(model, dict) and isinstance(model.get("vocab"), dict | list)
    return bool(data.keys() & _SIGNS[name])


def copy_tokenizer_files(files: Iterable[Path], folder: Path) -> list[Path]:
    """Write them into a new folder, under the names that tokenizer files have; returns what was written.

    Raises:
        InputRejected: a file is not what its name says.
    """
    written = []
    for file in files:
        target = folder / _name(file)
        target.write_bytes(read_tokenizer_file(file, target.name)[0])
        written.append(target)
    return written


def require_tokenizer_files(files: Iterable[Path]) -> None:
    """Refuse, before anything is written, what `copy_tokenizer_files` would refuse.

    Raises:
        InputRejected: a file is not what its name says.
    """
    for file in files:
        read_tokenizer_file(file, _name(file))


def chosen_tokenizer(file: Path) -> list[Path]:
    """The files of the tokenizer that a user named: those beside a `tokenizer.json` belong to it.

    Raises:
        InputRejected: there is no such file, or it is not a tokenizer.
    """
    if file.is_dir():
        file = file / TOKENIZER_FILE
    if not file.is_file():
        raise InputRejected("no such tokenizer file", where=file, fix="pass the tokenizer.json of the model")
    files = tokenizer_files(file.parent) if file.name == TOKENIZER_FILE else [file]
    require_tokenizer_files(files)
    return files


def tokenizer_settings(files: Iterable[Path]) -> Mapping[str, Any]:
    """What `tokenizer_config.json` says, if it is among the files."""
    return next((read_tokenizer_file(file)[1] for file in files if file.name == SETTINGS_FILE), {})


def _name(file: Path) -> str:
    return file.name if file.name in TOKENIZER_FILES else TOKENIZER_FILE
