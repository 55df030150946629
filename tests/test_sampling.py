"""Which token follows: temperature, top-k and top-p against their definitions."""

import numpy as np
import pytest

from umv2_export.errors import InputRejected
from umv2_export.sampling import GREEDY, Sampler, Sampling

LOGITS = np.array([0.5, 2.0, -1.0, 1.0, 1.5], dtype=np.float32)
SOFTMAX = np.exp(LOGITS.astype(np.float64)) / np.exp(LOGITS.astype(np.float64)).sum()


def probabilities(sampling: Sampling) -> list[float]:
    return [float(share) for share in Sampler(sampling, 0).probabilities(LOGITS)]


def test_without_a_temperature_the_best_token_is_taken() -> None:
    assert Sampler(GREEDY, 0).choose(LOGITS) == 1


def test_a_temperature_of_1_draws_from_the_softmax() -> None:
    assert probabilities(Sampling(1.0)) == pytest.approx(SOFTMAX, rel=1e-12)


def test_a_temperature_divides_the_logits() -> None:
    powers = SOFTMAX**2
    assert probabilities(Sampling(0.5)) == pytest.approx(powers / powers.sum(), rel=1e-12)


@pytest.mark.parametrize("temperature", [1e-300, 1e300])
def test_no_temperature_makes_infinity_or_nan(temperature: float) -> None:
    expected = [0, 1, 0, 0, 0] if temperature < 1 else [0.2] * 5
    assert probabilities(Sampling(temperature)) == pytest.approx(expected)


def test_top_k_leaves_the_k_best() -> None:
    found = probabilities(Sampling(1.0, top_k=2))
    assert found == pytest.approx(
        [0, SOFTMAX[1] / (SOFTMAX[1] + SOFTMAX[4]), 0, 0, SOFTMAX[4] / (SOFTMAX[1] + SOFTMAX[4])]
    )


@pytest.mark.parametrize(("top_p", "kept"), [(0.01, {1}), (0.45, {1, 4}), (0.75, {1, 3, 4}), (1.0, {0, 1, 2, 3, 4})])
def test_top_p_leaves_the_fewest_that_have_the_probability(top_p: float, kept: set[int]) -> None:
    found = probabilities(Sampling(1.0, top_p=top_p))
    assert {i for i, share in enumerate(found) if share} == kept
    assert sum(found) == pytest.approx(1)
    assert SOFTMAX[list(kept)].sum() >= min(top_p, 1 - 1e-12)


def test_top_k_is_applied_before_top_p() -> None:
    # Of the two that are left the first has 0.62.
    assert {i for i, share in enumerate(probabilities(Sampling(1.0, top_k=2, top_p=0.6))) if share} == {1}


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    sampler = Sampler(Sampling(1.0, seed=3), 0)
    counts = np.bincount([sampler.choose(LOGITS) for _ in range(4000)], minlength=5) / 4000
    assert counts == pytest.approx(SOFTMAX, abs=0.03)


def test_a_seed_repeats_its_draws_and_rows_draw_apart() -> None:
    def drawn(seed: int, row: int) -> list[int]:
        sampler = Sampler(Sampling(1.0, seed=seed), row)
        return [sampler.choose(LOGITS) for _ in range(40)]

    assert drawn(7, 0) == drawn(7, 0)
    assert drawn(7, 0) != drawn(8, 0)
    assert drawn(7, 0) != drawn(7, 1)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.0)], ids=str)
@pytest.mark.parametrize(("logit", "word"), [(np.nan, "NaN"), (np.inf, "infinite")])
def test_nan_and_infinity_are_refused(sampling: Sampling, logit: float, word: str) -> None:
    with pytest.raises(InputRejected, match=word):
        Sampler(sampling, 0).choose(np.array([0.0, logit], dtype=np.float32))
