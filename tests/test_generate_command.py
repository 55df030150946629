"""`generate`: prompts from a file, draws, and text as it comes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.command import run_command
from umv2_export.commands.token_stream import TokenStream

Exported = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture
def bundle(exported: Exported) -> Path:
    return exported("umv2", "--cache", "static")[0]


def facts(*arguments: object) -> dict[str, Any]:
    result = run_command("generate", *arguments, "--max-new-tokens", 8, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_each_line_of_a_file_continues_as_it_does_alone(bundle: Path, tmp_path: Path) -> None:
    lines = ["def main(", "x", "import numpy as np and so on"]
    file = tmp_path / "prompts.txt"
    file.write_bytes("\r\n".join(lines).encode() + b"\n")
    together = facts(bundle, "--prompt-file", file)
    assert together["tokens_per_second"] > 0
    alone = [facts(bundle, "--prompt", line) for line in lines]
    for found, expected in zip(together["sequences"], alone, strict=True):
        assert found == {name: expected[name] for name in ("prompt_ids", "token_ids", "text")}
    printed = run_command("generate", bundle, "--prompt-file", file, "--max-new-tokens", 8).stdout
    assert printed == "".join(f"[{i}] {one['text']}\n" for i, one in enumerate(alone, 1))


@pytest.mark.parametrize(
    ("content", "exit_code", "said"),
    [(b"one\n\ntwo\n", 2, "line 2 is empty"), (b"", 2, "line 1 is empty"), (b"\xff\n", 2, "not UTF-8")],
    ids=str,
)
def test_a_file_of_other_lines_is_refused(
    content: bytes, exit_code: int, said: str, bundle: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    result = run_command("generate", bundle, "--prompt-file", file)
    assert result.exit_code == exit_code, result.stderr
    assert said in result.stderr
    assert str(file) in result.stderr


@pytest.mark.parametrize("given", [(), ("--prompt", "a", "--prompt-ids", "1"), ("--prompt-ids", "1", "--prompt-file")])
def test_exactly_one_kind_of_prompt_is_taken(given: tuple[str, ...], bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a\n", encoding="utf-8")
    arguments = [*given, file] if given[-1:] == ("--prompt-file",) else [*given]
    assert run_command("generate", bundle, *arguments).exit_code == 2


@pytest.mark.parametrize("option", [("--top-k", 3), ("--top-p", 0.5), ("--seed", 1)], ids=str)
def test_an_option_of_draws_without_a_temperature_is_refused(option: tuple[object, ...], bundle: Path) -> None:
    result = run_command("generate", bundle, "--prompt-ids", "1", *option)
    assert result.exit_code == 2
    assert f"{option[0]} has no effect here" in result.stderr


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "warm"])
def test_a_temperature_that_is_no_positive_number_is_refused(value: str, bundle: Path) -> None:
    result = run_command("generate", bundle, "--prompt-ids", "1", f"--temperature={value}")
    assert result.exit_code == 2
    assert "not a positive number" in result.stderr


def test_a_seed_repeats_what_was_drawn_and_one_best_token_is_greedy(bundle: Path) -> None:
    def drawn(*options: object) -> object:
        return facts(bundle, "--prompt", "def ", "--temperature", 1.5, *options)["token_ids"]

    assert drawn("--seed", 1) == drawn("--seed", 1)
    assert drawn("--seed", 1) != drawn("--seed", 2)
    assert drawn("--top-k", 1) == facts(bundle, "--prompt", "def ")["token_ids"]


def test_text_on_the_terminal_is_that_of_the_tokens_and_the_rate_is_on_stderr(bundle: Path) -> None:
    printed = run_command("generate", bundle, "--prompt", "def ", "--max-new-tokens", 8)
    assert printed.stdout == facts(bundle, "--prompt", "def ")["text"] + "\n"
    assert "tokens/s" in printed.stderr


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["plain", "h\u00e9llo \u4e16\u754c \U0001f600!", "cut \u4e16"])
def test_a_character_is_printed_once_it_is_whole(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = text.encode()
    data = data[:-1] if text.startswith("cut") else data
    stream = TokenStream(Bytes())  # type: ignore[arg-type] # all of it that is used
    pieces = []
    for token in data:
        stream.show(0, token)
        pieces.append(capsys.readouterr().out)
    stream.end()
    pieces.append(capsys.readouterr().out)
    assert "".join(pieces) == data.decode("utf-8", "replace") + "\n"
    assert sum(bool(piece) for piece in pieces[:-1]) == len(data.decode("utf-8", "ignore"))
