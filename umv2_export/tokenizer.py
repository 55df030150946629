"""Text to token ids and back, with the checkpoint's own tokenizer.json."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from umv2_export.bundle import Bundle
from umv2_export.errors import EnvironmentUnfit, InputRejected, InvalidRequest, shown
from umv2_export.records.tokenizer_files import TOKENIZER_FILE, read_tokenizer_file, tokenizer_files, tokenizer_settings
from umv2_export.runtimes.base import Array

__all__ = ["TextTokenizer", "bundle_tokenizer", "no_tokenizer", "outside_vocabulary", "text_ids", "utf8"]

Result = TypeVar("Result")

# Their fast tokenizers build the template anew from `add_bos_token` and `add_eos_token`, false where these are missing;
# seen in transformers 4.46 and 5.24. Other classes take the template of tokenizer.json as it is.
_TEMPLATE_OF_FIELDS = ("GPTNeoXTokenizer", "GPTNeoXTokenizerFast")

_ENDS = {"bos": "start", "eos": "end"}


class TextTokenizer:
    """The tokenizer of a model: every call of the package goes through here.

    Truncation and padding that the file stores are reset, as transformers does when it encodes a prompt. Start and end
    tokens are added where the file's template adds them.

    Args:
        files: tokenizer.json, under any name, and the files beside it.
        vocab_size: of the model.

    Attributes:
        notes: what a user may want to know of the tokenizer's settings.

    Raises:
        EnvironmentUnfit: the package is not installed.
        InputRejected: the file is not a tokenizer, or its vocabulary is empty.
    """

    def __init__(self, files: Sequence[Path], vocab_size: int) -> None:
        self.file = next((file for file in files if file.name == TOKENIZER_FILE), files[0])
        self.vocab_size = vocab_size
        self.notes: list[str] = []
        try:
            from tokenizers import Tokenizer  # noqa: PLC0415 - an optional package
        except ImportError as error:
            raise EnvironmentUnfit(
                "text prompts need the package tokenizers",
                fix="pip install 'umv2-export[tokenizer]', or pass --prompt-ids",
            ) from error
        content = read_tokenizer_file(self.file, TOKENIZER_FILE)[0]
        self._tokenizer = self._call("not a tokenizer file", lambda: Tokenizer.from_buffer(content))
        self._call("not a tokenizer file", self._tokenizer.no_truncation)
        self._call("not a tokenizer file", self._tokenizer.no_padding)
        if not self._call("not a tokenizer file", lambda: self._tokenizer.get_vocab_size(with_added_tokens=True)):
            raise InputRejected("the tokenizer has an empty vocabulary", where=self.file)
        self._before, self._after, self._template = self._ends(tokenizer_settings(files))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text.

        Raises:
            InputRejected: the tokenizer fails on it, gives nothing for it, or an id that the model does not have.
        """
        what = "the tokenizer cannot encode the text"
        found = self._call(what, lambda: self._tokenizer.encode(text, add_special_tokens=self._template).ids)
        ids = [*self._before, *found, *self._after]
        if text and not ids:
            raise InputRejected("the tokenizer gives no token for the text", where=self.file)
        bad = outside_vocabulary(ids, self.vocab_size)
        if bad is not None:
            raise InputRejected(
                f"the tokenizer gives the id {bad}, which is outside the model's vocabulary of {self.vocab_size}",
                where=self.file,
                why="it is the tokenizer of another model, or has tokens that this model was not trained with",
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; those that the tokenizer does not know are left out.

        Raises:
            InputRejected: the tokenizer fails on them.
        """
        text: str = self._call("the tokenizer cannot decode the tokens", lambda: self._tokenizer.decode(list(ids)))
        return text

    def _ends(self, settings: Mapping[str, Any]) -> tuple[list[int], list[int], bool]:
        """Ids before and after a text, and whether the file's own template is used."""
        flags = {end: settings.get(f"add_{end}_token") for end in _ENDS}
        for end, flag in flags.items():
            if flag is not None and not isinstance(flag, bool):
                raise InputRejected(
                    f"field 'add_{end}_token' must be true or false, got {shown(flag)}",
                    where=self.file.parent / "tokenizer_config.json",
                )
        if settings.get("tokenizer_class") in _TEMPLATE_OF_FIELDS:
            before, after = ([self._special(end, settings)] if flag else [] for end, flag in flags.items())
            return before, after, False
        what = "the tokenizer cannot encode the text"
        empty = self._call(what, lambda: self._tokenizer.encode("", add_special_tokens=True).ids)
        for end, flag in flags.items():
            if flag and not empty:
                self.notes.append(
                    f"tokenizer_config.json says 'add_{end}_token', but the template of {self.file.name} adds no "
                    f"{_ENDS[end]} token: none is added, as in transformers"
                )
        if empty and False in flags.values() and True not in flags.values():
            self.notes.append(
                f"tokenizer_config.json says that no token is added, but the template of {self.file.name} adds "
                f"{len(empty)}: added, as in transformers"
            )
        return [], [], True

    def _special(self, end: str, settings: Mapping[str, Any]) -> int:
        token = settings.get(f"{end}_token")
        token = token.get("content") if isinstance(token, dict) else token
        number = None
        if isinstance(token, str):
            number = self._call("not a tokenizer file", lambda: self._tokenizer.token_to_id(token))
        if number is None:
            raise InputRejected(
                f"'add_{end}_token' is true, and the {_ENDS[end]} token {shown(token)} is not in the vocabulary",
                where=self.file,
            )
        return int(number)

    def _call(self, what: str, call: Callable[[], Any]) -> Any:
        """Call the package: it raises plain Exception, and its panics are only a BaseException."""
        try:
            with _without_panic_text():
                return call()
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise InputRejected(what, where=self.file, why=why) from error


@contextlib.contextmanager
def _without_panic_text() -> Iterator[None]:
    """Rust writes where it panicked to descriptor 2, past Python; the error that we raise says it."""
    try:
        kept = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def outside_vocabulary(ids: Sequence[int], vocab_size: int) -> int | None:
    """The first id that a model does not have."""
    return next((number for number in ids if not 0 <= number < vocab_size), None)


def utf8(text: str | bytes, *, where: object) -> str:
    """A text of a user.

    Raises:
        InvalidRequest: it is not UTF-8; on the command line Python keeps such bytes as lone surrogates.
    """
    try:
        return text.decode("utf-8") if isinstance(text, bytes) else text.encode("utf-8").decode("utf-8")
    except UnicodeError as error:
        raise InvalidRequest("the text is not UTF-8", where=where, why=str(error)[:200]) from error


def bundle_tokenizer(bundle: Bundle, files: Sequence[Path] = ()) -> TextTokenizer | None:
    """The tokenizer in `files`, else the bundle's own, where it has one."""
    found = files or tokenizer_files(bundle.path)
    if not files and not any(file.name == TOKENIZER_FILE for file in found):
        return None
    return TextTokenizer(found, bundle.config.vocab_size)


def no_tokenizer(bundle: Bundle) -> InvalidRequest:
    """What to pass where a text prompt meets a bundle without a tokenizer."""
    name = bundle.manifest.source.get("tokenizer")
    named = isinstance(name, str)
    return InvalidRequest(
        "the bundle has no tokenizer.json",
        where=bundle.path,
        why=f"the checkpoint had none; its configuration names {name!r}" if named else "the checkpoint had none",
        fix=("pass that file with --tokenizer" if named else "pass one with --tokenizer") + ", or pass --prompt-ids",
    )


def text_ids(bundle: Bundle, text: bytes, *, where: object = None) -> Array:
    """Token ids of a text; of a bundle without a tokenizer, its bytes (modulo the vocabulary, if that is smaller).

    Raises:
        InputRejected: the tokenizer is broken, or gives an id that the model does not have.
        InvalidRequest: the text is empty, or not UTF-8.
    """
    if not text:
        raise InvalidRequest("the text is empty", where=where)
    tokenizer = bundle_tokenizer(bundle)
    if tokenizer is not None:
        return np.asarray(tokenizer.encode(utf8(text, where=where)), dtype=np.int64)
    return np.frombuffer(text, dtype=np.uint8).astype(np.int64) % bundle.config.vocab_size
