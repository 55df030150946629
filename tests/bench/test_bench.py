"""The command `bench`: in a process of its own, for it gives all sessions one pool of threads."""

import dataclasses
import html.parser
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests.command import run_command
from umv2_export import native_library
from umv2_export.bench.runtime_choice import choose_runtimes
from umv2_export.bench.subgraph import core_subgraph
from umv2_export.bench.traffic import Traffic
from umv2_export.bundle import Bundle
from umv2_export.config import count_parameters
from umv2_export.errors import InvalidRequest
from umv2_export.interface import part_names
from umv2_export.presets import PRESETS

Exported = Callable[..., tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of experts, contrib form."""
    folder = tmp_path_factory.mktemp("experts")
    assert run_command("init", "moe-tiny-top8", "-o", folder / "checkpoint").exit_code == 0
    export = ("onnx", folder / "checkpoint", "-o", folder / "moe", "--moe-form", "contrib", "--no-validate")
    assert run_command(*export).exit_code == 0
    return folder / "moe"


def bench(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "umv2_export.cli", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


SMALL = ("--batch", "4,1", "--past", "5", "--prefill", "7", "--iterations", "3")


class Page(html.parser.HTMLParser):
    """Counts the elements of a page, and collects what it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_json_and_page_hold_every_batch_of_both_models(exported: Exported, experts: Path, tmp_path: Path) -> None:
    bundle, report = exported("v2_shared_ring")[0], tmp_path / "deep" / "report.html"
    result = bench(bundle, "--baseline", experts, *SMALL, "--report", report, "--json")
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    assert [step["batch"] for step in facts["batches"]] == [1, 4]
    assert [step["model"] for step in facts["baseline"]["batches"]] == ["moe", "moe"]
    for step in (*facts["batches"], *facts["baseline"]["batches"]):
        assert 0 < step["latency_ms"]["p50"] <= step["latency_ms"]["p90"] <= step["latency_ms"]["p99"]
        assert step["core_latency_ms"]["p50"] > 0
        counted = step["bytes"]
        names = [field.name for field in dataclasses.fields(Traffic)]
        assert counted["total"] == sum(counted[name] for name in names)
        assert 0 < counted["core"] < counted["total"]
    memory = Bundle(bundle).config.memory
    assert memory.layers <= facts["batches"][0]["unique_rows"] <= memory.layers * memory.hits
    row_bytes = memory.row_size * 4
    # Means of several sets of sequences, each rounded.
    assert facts["batches"][0]["bytes"]["rows"] == pytest.approx(
        facts["batches"][0]["unique_rows"] * row_bytes, abs=row_bytes
    )
    assert facts["baseline"]["batches"][0]["unique_experts"] == 3 * 8
    assert [ratio["batch"] for ratio in facts["ratios"]] == [1, 4]
    assert any("total parameters" in warning for warning in facts["warnings"])
    assert facts["resident_bytes"][str(experts)]["peak"] > 10**7
    page = Page()
    text = report.read_text(encoding="utf-8")
    page.feed(text)
    assert page.counts["svg"] == 4
    assert "script" not in page.counts
    assert all(reference.startswith("#") for reference in page.references), "needs a network"
    assert "Not a fair pair" in text
    assert [path.name for path in report.parent.iterdir()] == ["report.html"]


def test_a_model_alone_is_measured_too_in_stock_onnx_runtime(exported: Exported, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"to be or not to be " * 20)
    result = bench(exported("v2_per_rank")[0], "--runtime", "onnxruntime", "--text", text, *SMALL)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("(onnxruntime)") == 3
    assert "baseline / model" not in result.stdout


def test_a_bundle_beside_itself_runs_in_the_same_runtime_and_moves_the_same_bytes(exported: Exported) -> None:
    bundle = exported("v2_shared_ring")[0]
    result = bench(bundle, "--baseline", bundle, "--json", *SMALL)
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    steps = (*facts["batches"], *facts["baseline"]["batches"], *facts["prefill"][0].values())
    assert {step["runtime"] for step in steps} == {"onnxruntime-native"}
    for ratio in facts["ratios"]:
        assert {ratio[name] for name in ("bytes", "core_bytes", "expected_core_bytes")} == {1.0}
        # Native beside stock was 2.8 and 21.6; three calls on a busy machine are no measurement.
        assert 0.2 < ratio["core_latency"] < 5


def test_each_model_runs_in_the_fastest_runtime_that_it_supports_unless_told_otherwise(
    exported: Exported, experts: Path
) -> None:
    ours, theirs = Bundle(exported("v2_shared_ring")[0]), Bundle(experts)
    native, stock = "onnxruntime-native", "onnxruntime"
    assert choose_runtimes(ours, [ours, theirs], None, None) == [native, native, stock]
    assert choose_runtimes(theirs, [ours], None, None) == [stock, native]
    assert choose_runtimes(ours, [ours, theirs], stock, None) == [stock, stock, stock]
    assert choose_runtimes(ours, [ours], native, stock) == [native, stock]
    with pytest.raises(InvalidRequest, match="no ops"):
        choose_runtimes(ours, [theirs], None, native)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--batch", "0"), 2, "a size that is not from 1 to 1048576"),
        (("--batch", "x"), 2, "not a list"),
        (("--text", "short"), 2, "pass a longer --text"),
        (("--baseline", "nowhere"), 3, "manifest.json is missing"),
        (("--baseline-runtime", "onnxruntime"), 2, "without a baseline"),
        (("--report", "there.html"), 2, "the report exists"),
    ],
)
def test_mistakes_end_before_anything_is_measured(
    arguments: tuple[str, str], code: int, message: str, exported: Exported, tmp_path: Path
) -> None:
    (tmp_path / "short").write_text("abc", encoding="utf-8")
    (tmp_path / "there.html").write_text("old", encoding="utf-8")
    paths = {name: str(tmp_path / name) for name in ("short", "nowhere", "there.html")}
    result = bench(exported("v2_per_rank")[0], *(paths.get(argument, argument) for argument in arguments))
    assert result.returncode == code
    assert message in result.stderr
    assert (tmp_path / "there.html").read_text(encoding="utf-8") == "old"


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("name", ["v2_shared_ring", "v1_skip_layer"])
def test_the_core_computes_what_the_whole_graph_computes_there(name: str, native: bool, exported: Exported) -> None:
    bundle = Bundle(exported(name)[0])
    inputs, outputs = part_names(bundle.config)
    whole = bundle.graph()
    for value in (*inputs, *outputs):
        whole.graph.output.add().name = value
    ids = np.array([[1, 2, 3], [4, 5, 6]], dtype=np.int64)
    cache = np.zeros((2, bundle.config.num_heads, 0, bundle.config.head_size), dtype=np.float32)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    feed |= {value.name: cache for value in whole.graph.input if value.name.startswith("past_key_values")}

    def run(graph: bytes, names: list[str], values: dict[str, Any]) -> dict[str, Any]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(bundle.path))
        if native:
            options.register_custom_ops_library(native_library())
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        known = {value.name for value in session.get_inputs()}
        found = session.run(names, {key: value for key, value in values.items() if key in known})
        return dict(zip(names, found, strict=True))

    full = run(whole.SerializeToString(), [*inputs, *outputs], feed)
    core = core_subgraph(bundle)
    assert len(core.graph.node) < len(whole.graph.node)
    part = run(core.SerializeToString(), outputs, feed | {key: full[key] for key in inputs})
    for key in outputs:
        np.testing.assert_allclose(part[key], full[key], rtol=0, atol=1e-5)


def test_the_compared_presets_are_of_one_size() -> None:
    ours, theirs = (count_parameters(PRESETS[name]) for name in ("umv2-227m-1.2b", "olmoe-227m-1.2b"))
    assert ours.total == pytest.approx(theirs.total, rel=0.05)
    assert ours.activated == pytest.approx(theirs.activated, rel=0.05)


def test_a_static_cache_stands_beside_a_growing_one(exported: Exported) -> None:
    static, growing = (exported("v2_shared_ring", *options)[0] for options in (("--cache", "static"), ()))
    result = bench(static, "--baseline", growing, *SMALL, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    for ours, theirs in zip(found["batches"], found["baseline"]["batches"], strict=True):
        # The same rows, and no copy of the cache.
        copied = theirs["bytes"]["intermediates"]
        assert copied == 2 * theirs["bytes"]["kv_cache"]
        without = {"intermediates": 0, "total": theirs["bytes"]["total"] - copied}
        assert ours["bytes"] == theirs["bytes"] | without
    assert found["resident_bytes"][str(static)] is not None
