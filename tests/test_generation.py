"""Greedy generation through the cache."""

from dataclasses import replace

import pytest

from tests.models import GOLDEN, expected
from umv2_export.checkpoint import open_checkpoint
from umv2_export.errors import InvalidRequest
from umv2_export.generation import generate
from umv2_export.model import reference_model
from umv2_export.runtimes import StepInput, StepOutput
from umv2_export.runtimes.torch import TorchRuntime

RUNTIME = TorchRuntime(reference_model(open_checkpoint(GOLDEN["v2_shared_ring"])))
CONFIG = RUNTIME.model.config


@pytest.mark.parametrize("row", [0, 1])
def test_the_continuation_is_that_of_the_authors_code(row: int) -> None:
    authors = expected("v2_shared_ring")
    prompt = authors["input_ids"][row].tolist()
    tokens = generate(RUNTIME, CONFIG, [prompt], 8, stop_at_eos=False).token_ids
    assert tokens == [authors["greedy"][row].tolist()]


def test_generation_ends_with_the_end_of_sequence_token() -> None:
    authors = expected("v2_shared_ring")
    third = int(authors["greedy"][0, 2])
    result = generate(RUNTIME, replace(CONFIG, eos_token_id=third), [authors["input_ids"][0].tolist()], 8)
    assert result.token_ids[0] == authors["greedy"][0, :3].tolist()


def test_the_end_of_sequence_token_can_be_ignored() -> None:
    authors = expected("v2_shared_ring")
    config = replace(CONFIG, eos_token_id=int(authors["greedy"][0, 2]))
    result = generate(RUNTIME, config, [authors["input_ids"][0].tolist()], 8, stop_at_eos=False)
    assert result.token_ids[0] == authors["greedy"][0].tolist()


def test_padding_columns_of_the_head_are_never_chosen() -> None:
    class PaddingFavoured:
        name = "padding favoured"

        def run(self, step: StepInput, *, probe: bool = False) -> StepOutput:
            output = RUNTIME.run(step, probe=probe)
            output.logits[..., CONFIG.vocab_size :] = 1e6
            return output

    authors = expected("v2_shared_ring")
    prompt = authors["input_ids"][0].tolist()
    result = generate(PaddingFavoured(), CONFIG, [prompt], 8, stop_at_eos=False)
    assert result.token_ids[0] == authors["greedy"][0].tolist()


@pytest.mark.parametrize("prompt", [[], [250], [-1]])
def test_a_prompt_that_is_empty_or_outside_the_vocabulary_is_refused(prompt: list[int]) -> None:
    with pytest.raises(InvalidRequest):
        generate(RUNTIME, CONFIG, [prompt], 4)
