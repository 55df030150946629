"""Bundles with a static cache, seen through ONNX Runtime that knows nothing of this project."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.command import run_command
from tests.conftest import CHECKPOINTS
from tests.onnx.sessions import Array, onnxruntime_step, prefill_feed
from tests.onnx.static_sessions import BoundSession, greedy_tokens
from umv2_export import native_library
from umv2_export.bundle import Bundle
from umv2_export.checkpoint import open_checkpoint
from umv2_export.errors import Unsupported
from umv2_export.onnx.export import ExportOptions, plan_export

Exported = Callable[..., tuple[Path, dict[str, Any]]]

STATIC = ("--cache", "static")

# Logits of the authors, and of the same graph with a growing cache.
LOGITS_ATOL = 2e-4

RUNTIMES = [
    ("v2_shared_ring", None),
    ("v2_shared_ring", native_library),
    ("v1_skip_layer", None),
    ("v1_skip_layer", native_library),
    ("olmoe", None),
]


def authors(name: str) -> dict[str, Any]:
    with np.load(CHECKPOINTS[name] / "expected.npz") as arrays:
        return dict(arrays)


def opened(
    exported: Exported, batch: int, length: int, name: str = "v2_shared_ring", library: str | None = None
) -> BoundSession:
    return BoundSession(exported(name, *STATIC)[0] / "model.onnx", batch, length, library)


@pytest.mark.parametrize(("name", "library"), RUNTIMES, ids=lambda value: value if isinstance(value, str) else "")
def test_the_authors_logits_and_greedy_tokens_come_out_of_one_buffer(
    name: str, library: Callable[[], str] | None, exported: Exported
) -> None:
    known = authors(name)
    ids, greedy = known["input_ids"], np.atleast_2d(known["greedy"])
    ids = ids[: len(greedy)]
    step = opened(exported, len(ids), 64, name, library() if library else None)
    logits = step(ids, np.ones_like(ids))
    np.testing.assert_allclose(logits, known["logits"][: len(ids)], rtol=0, atol=LOGITS_ATOL)
    # Once more from the beginning: what the first prefill left is overwritten.
    tokens = greedy_tokens(step, ids, np.ones_like(ids), vocab_size=250, count=greedy.shape[1])
    np.testing.assert_array_equal(tokens, greedy)


@pytest.mark.parametrize("chunks", [(9,), (1,) * 9, (4, 5), (2, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_prompt_in_chunks_has_the_logits_of_the_whole(
    chunks: tuple[int, ...], batch: int, exported: Exported
) -> None:
    ids = np.random.default_rng(0).integers(0, 250, (batch, 9))
    whole = opened(exported, batch, 16)(ids, np.ones_like(ids))
    step, start, pieces = opened(exported, batch, 9), 0, []
    for size in chunks:
        pieces.append(step(ids[:, start : start + size], np.ones((batch, start + size), np.int64)))
        start += size
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, rtol=0, atol=LOGITS_ATOL)


def padded(lengths: list[int], side: str) -> tuple[Array, Array]:
    """Prompts of these lengths padded to the longest, and their mask."""
    ids = np.random.default_rng(1).integers(0, 250, (len(lengths), max(lengths)))
    columns, sizes = np.arange(max(lengths))[None], np.array(lengths)[:, None]
    mask = columns < sizes if side == "right" else columns >= max(lengths) - sizes
    return ids, mask.astype(np.int64)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chunk", [6, 4], ids=["prefill", "chunks"])
def test_sequences_of_different_lengths_compute_what_each_does_alone(side: str, chunk: int, exported: Exported) -> None:
    lengths = [6, 1, 4]
    ids, mask = padded(lengths, side)
    step = opened(exported, 3, 20)
    logits = np.concatenate([step(ids[:, a : a + chunk], mask[:, : a + chunk]) for a in range(0, 6, chunk)], 1)
    more = np.random.default_rng(2).integers(0, 250, (3, 2))
    whole_mask = np.concatenate([mask, np.ones((3, 2), np.int64)], 1)
    after = [step(more[:, i : i + 1], whole_mask[:, : 7 + i]) for i in range(2)]
    for row, length in enumerate(lengths):
        own = ids[row, mask[row] > 0]
        alone = opened(exported, 1, length + 2)
        prompt = alone(own[None], np.ones((1, length), np.int64))
        np.testing.assert_allclose(logits[row, mask[row] > 0], prompt[0], rtol=0, atol=LOGITS_ATOL)
        for i in range(2):
            next_logits = alone(more[row : row + 1, i : i + 1], np.ones((1, length + 1 + i), np.int64))
            np.testing.assert_allclose(after[i][row], next_logits[0], rtol=0, atol=LOGITS_ATOL)


@pytest.mark.parametrize("batch", [1, 2])
def test_positions_behind_those_in_use_are_neither_read_nor_written(batch: int, exported: Exported) -> None:
    ids = np.random.default_rng(0).integers(0, 250, (batch, 5))
    step = opened(exported, batch, 11)
    assert np.isfinite(step(ids, np.ones_like(ids))).all()
    assert np.isfinite(step(ids[:, :2], np.ones((batch, 7), np.int64))).all()
    for buffer in step.cache.values():
        assert np.isfinite(buffer[:, :, :7]).all()
        assert np.isnan(buffer[:, :, 7:]).all()


def test_the_cache_is_that_of_the_growing_form(exported: Exported) -> None:
    ids = np.random.default_rng(0).integers(0, 250, (2, 5))
    step = opened(exported, 2, 8)
    step(ids, np.ones_like(ids))
    growing = onnxruntime_step(exported("v2_shared_ring")[0] / "model.onnx")(prefill_feed(ids, 3, 4, 16))
    for name, buffer in step.cache.items():
        expected = growing[name.replace("past_key_values", "present")]
        np.testing.assert_allclose(buffer[:, :, :5], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [(), ("--dtype", "fp16")], ids=str)
def test_grouped_queries_pass_parity(options: tuple[str, ...], exported: Exported) -> None:
    bundle, result = exported("gqa", *options, *STATIC)
    assert result["parity"]["passed"]
    assert Bundle(bundle).config.kv_heads < Bundle(bundle).config.num_heads


def test_the_manifest_names_a_static_cache_and_the_release_that_runs_it(exported: Exported) -> None:
    manifest = json.loads((exported("v2_shared_ring", *STATIC)[0] / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["cache"] == "static"
    assert manifest["min_onnxruntime"] == "1.22.0"
    assert manifest["inputs"][2]["axes"] == ["batch", 4, "max_length", 16] == manifest["outputs"][1]["axes"]


def test_a_growing_cache_is_the_default_and_has_no_field(exported: Exported) -> None:
    bundle, _ = exported("v2_shared_ring")
    assert "cache" not in json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    model = onnx.load(bundle / "model.onnx", load_external_data=False)
    assert {function.name for function in model.functions} == {"KeyScores", "TuckerTopK", "MemoryLookup"}


@pytest.mark.parametrize("cache", ["growing", "rolling", None])
def test_a_manifest_that_says_otherwise_is_refused(cache: str | None, exported: Exported, tmp_path: Path) -> None:
    source, _ = exported("v2_shared_ring", *STATIC)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for file in source.iterdir():
        (bundle / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    manifest.pop("cache")
    changed = manifest if cache is None else {**manifest, "cache": cache}
    (bundle / "manifest.json").write_text(json.dumps(changed), encoding="utf-8")
    result = run_command("generate", bundle, "--prompt-ids", "1")
    assert result.exit_code == 3, result.stderr
    assert "'cache'" in result.stderr


@pytest.mark.parametrize(
    ("options", "exit_code", "why"),
    [
        (("--inline-functions",), 2, "not a standard op"),
        (("--target", "gpu"), 5, "static cache for a GPU"),
        (("--dtype", "bf16", "--target", "gpu"), 5, "static cache for a GPU"),
    ],
    ids=str,
)
def test_an_export_that_no_runtime_would_run_is_refused(
    options: tuple[str, ...], exit_code: int, why: str, tmp_path: Path
) -> None:
    result = run_command("onnx", CHECKPOINTS["v2_shared_ring"], "-o", tmp_path / "bundle", *STATIC, *options)
    assert result.exit_code == exit_code, result.stderr
    assert why in result.stderr
    assert not (tmp_path / "bundle").exists()


def test_a_head_size_that_the_op_refuses_when_it_runs_is_refused_before(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(CHECKPOINTS["v2_shared_ring"])
    narrow = replace(checkpoint, config=replace(checkpoint.config, num_heads=16))
    with pytest.raises(Unsupported, match="a static cache of heads of 4") as caught:
        plan_export(narrow, ExportOptions(cache="static"))
    assert caught.value.fix == "--cache growing"


def test_a_build_of_a_static_bundle_is_refused_before_it_begins(exported: Exported, tmp_path: Path) -> None:
    bundle, _ = exported("v2_shared_ring", *STATIC)
    result = run_command("build", bundle, "--runtime", "tensorrt-rtx", "-o", tmp_path / "engine")
    assert result.exit_code == 5, result.stderr
    assert "com.microsoft::GroupQueryAttention" in result.stderr
    assert "--cache growing" in result.stderr
