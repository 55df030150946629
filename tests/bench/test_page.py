"""The page of a benchmark: ratios read the right way round, and names of others stay text."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from umv2_export.bench.options import BenchOptions
from umv2_export.bench.page import render_page, times
from umv2_export.bench.results import BenchResult, StepResult
from umv2_export.bench.timing import Timing
from umv2_export.bench.traffic import Traffic
from umv2_export.bundle import Bundle

Exported = Callable[..., tuple[Path, dict[str, Any]]]

OPTIONS = BenchOptions((1,), 4, 8, 3, 2, ["onnxruntime"] * 2)
BYTES = Traffic(*range(1, 11))
STEP = StepResult("ours", "onnxruntime", 1, 1, 4, Timing(31, 32, 33), Timing(9, 9, 9), BYTES, BYTES, 5, 0, 0.1)


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (3.24, "3.2 times faster"),
        (0.31, "3.2 times slower"),
        (1.25, "1.25 times faster"),
        (0.8, "1.25 times slower"),
        (1.001, "as fast"),
    ],
)
def test_a_ratio_is_said_as_a_number_above_one(ratio: float, words: str) -> None:
    assert times(ratio, "faster", "slower", equal="as fast") == words


def test_a_slower_model_is_called_slower(exported: Exported) -> None:
    bundle = Bundle(exported("v2_shared_ring")[0])
    pair = (STEP, replace(STEP, model="theirs", latency=Timing(10, 10, 10)))
    page = render_page(BenchResult(decode=[pair]), bundle, [bundle], OPTIONS, {})
    assert "3.1 times slower at batch 1, with as many bytes of FFN and memory" in page


def test_names_of_folders_and_facts_are_text_in_the_page(exported: Exported) -> None:
    bundle = Bundle(exported("v2_shared_ring")[0])
    result = BenchResult(decode=[(replace(STEP, model="<b>"), None)], warnings=["<script>"])
    page = render_page(result, bundle, [], OPTIONS, {"processor": "<script> & more"})
    assert "<script>" not in page
    assert "<td>&lt;b&gt;</td>" in page
    assert "<td>&lt;script&gt; &amp; more</td>" in page
    # The pictures are ours, and are not text.
    assert page.count("<svg ") == 4
