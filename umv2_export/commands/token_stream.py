"""A continuation on the terminal, as it comes."""

from typing import TYPE_CHECKING

from umv2_export.terminal import echo

if TYPE_CHECKING:
    from umv2_export.tokenizer import TextTokenizer

__all__ = ["TEXT", "TokenStream"]

# Tabs, and the joiners of Persian, Hindi and emoji, are text.
TEXT = "\n\t\u200c\u200d"

# What bytes that are no whole character yet decode to.
_INCOMPLETE = "\ufffd"


class TokenStream:
    """Prints the text of each token once its characters are whole; ids, where there is no tokenizer.

    Tokens that were printed are decoded with those behind them once more: what a token is depends on those before it.
    """

    def __init__(self, words: "TextTokenizer | None") -> None:
        self._words = words
        self._tokens: list[int] = []
        # Tokens from the first on are decoded; the text of those before the second was printed.
        self._first = self._printed = 0

    def show(self, _: int, token: int) -> None:
        """Print what a token adds."""
        self._tokens.append(token)
        if self._words is None:
            echo(f",{token}" if len(self._tokens) > 1 else str(token), end="")
            return
        text = self._rest(self._words)
        if text and not text.endswith(_INCOMPLETE):
            echo(text, keep=TEXT, end="")
            self._first, self._printed = self._printed, len(self._tokens)

    def end(self) -> None:
        """Print what is left, and end the line."""
        echo("" if self._words is None else self._rest(self._words), keep=TEXT)

    def _rest(self, words: "TextTokenizer") -> str:
        known = words.decode(self._tokens[self._first : self._printed])
        return words.decode(self._tokens[self._first :])[len(known) :]
