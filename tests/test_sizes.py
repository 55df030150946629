"""Numbers on the command line that nobody's machine serves: refused before threads are started or memory is taken."""

import pytest

from tests.command import run_command

HUGE = str(2**40)


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench", "bundle", "--threads", "4000"),
        ("bench", "bundle", "--batch", f"1,{HUGE}"),
        ("bench", "bundle", "--past", HUGE),
        ("bench", "bundle", "--prefill", HUGE),
        ("bench", "bundle", "--iterations", HUGE),
        ("bench-op", "--threads", "4000"),
        ("bench-op", "--rounds", HUGE),
        ("generate", "bundle", "--prompt-ids", "1", "--max-new-tokens", HUGE),
        ("init", "umv2-227m-1.2b", "-o", "checkpoint", "--seed", str(2**64)),
        ("init", "umv2-227m-1.2b", "-o", "checkpoint", "--seed", "-1"),
        ("parity", "bundle", "--seed", str(2**64)),
    ],
    ids=lambda arguments: " ".join((arguments[0], *arguments[-2:])),
)
def test_a_number_beyond_its_bound_is_a_usage_error_that_names_the_bound(arguments: tuple[str, ...]) -> None:
    result = run_command(*arguments)
    assert result.exit_code == 2, result.stdout
    assert "is not in the range" in result.stderr or "is not from 1 to" in result.stderr
