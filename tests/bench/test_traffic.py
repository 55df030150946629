"""The counter counts: planted traces, the formulas of the specification, and pages that the kernel really touched."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.kernels.kernel_calls import memory_lookup
from umv2_export.bench.traffic import Hits, count_traffic, expected_hits, hits_of
from umv2_export.bundle import Bundle
from umv2_export.checkpoint import open_checkpoint
from umv2_export.config import ModelConfig, count_parameters
from umv2_export.cpu_kernels import cpu_target
from umv2_export.errors import InvalidRequest
from umv2_export.layout import TableLayout
from umv2_export.presets import PRESETS
from umv2_export.system.host_memory import anonymous_memory

Exported = Callable[..., tuple[Path, dict[str, Any]]]

GOLDEN = Path(__file__).parents[1] / "data" / "official"


def planned(config: ModelConfig) -> Bundle:
    """What a bundle of this configuration would say of itself, in fp32, without its 5 GB."""
    counts = count_parameters(config)
    router = config.num_layers * config.experts.count * config.hidden_size if config.experts else 0
    stored = {"dense": counts.dense - router, "keys": counts.keys, "map": 0, "rows": counts.rows, "router": router}
    stored["experts"] = counts.experts
    manifest = SimpleNamespace(
        bytes={kind: 4 * count for kind, count in stored.items()}, dtype="fp32", table_dtype="fp32", cache="growing"
    )
    layout = TableLayout.of(config.memory, torch.float32, 2 * 10**9)
    return cast("Bundle", SimpleNamespace(config=config, manifest=manifest, layout=layout))


def expected_core(preset: str, batch: int) -> int:
    bundle = planned(PRESETS[preset])
    return count_traffic(bundle, expected_hits(bundle, batch), batch=batch, past=64, native=True).core


# Section 10 of the specification, bf16: a ratio, hence the same in fp32. Table entries have two digits.
@pytest.mark.parametrize(("batch", "ratio"), [(1, 1.0), (4, 3.4), (16, 7.0), (64, 7.4), (256, 5.7), (1024, 3.1)])
def test_uniform_routing_moves_the_bytes_of_the_published_ratios(batch: int, ratio: float) -> None:
    found = expected_core("olmoe-227m-1.2b", batch) / expected_core("umv2-227m-1.2b", batch)
    assert found == pytest.approx(ratio, abs=0.05)


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_uniform_routing_moves_the_bytes_of_the_formulas(batch: int) -> None:
    """3 d I + Q d + 2 n Dk r H + d (Dv + Dp) + rows, and router + 3 d I experts, in fp32 for 20 layers."""
    rows = 129600 * (1 - (1 - 32 / 129600) ** batch)
    memory = 3 * 768 * 2496 + 768 * 768 + 2 * 360 * 192 * 2 + 768 * (192 + 192) + rows * (192 + 192)
    assert expected_core("umv2-227m-1.2b", batch) == pytest.approx(4 * 20 * memory, rel=0.02)
    experts = 64 * (1 - (1 - 8 / 64) ** batch)
    assert expected_core("olmoe-227m-1.2b", batch) == pytest.approx(
        4 * 20 * (64 * 768 + 3 * 768 * 384 * experts), rel=0.02
    )


def test_rows_are_told_apart_by_where_they_lie_not_by_their_address(exported: Exported) -> None:
    """In a shared, expanded pool several virtual addresses are one row."""
    bundle = Bundle(exported("v2_expanded_keys")[0])
    memory = bundle.config.memory
    checkpoint = open_checkpoint(GOLDEN / "v2_expanded_keys")
    rng = np.random.default_rng(0)
    probes, wanted = {}, []
    for j in range(memory.layers):
        addresses = rng.integers(0, memory.stored_side**2, (6, memory.hits))
        addresses[3] = addresses[0]
        probes[f"addresses.{j}"] = addresses
        shuffled = checkpoint.read(f"transformer.mem_blocks.{j}.shuffle_index").numpy()[addresses]
        wanted.append(
            len(set(((shuffled % memory.visible_rows + memory.offset(j)) % memory.pool_rows).ravel().tolist()))
        )
    hits = hits_of(bundle, np.arange(6), probes)
    assert hits.rows == wanted
    assert sum(wanted) < memory.layers * 6 * memory.hits


def test_one_row_more_is_one_row_more(exported: Exported) -> None:
    bundle = Bundle(exported("v2_per_rank")[0])
    memory = bundle.config.memory
    same = np.zeros((4, memory.hits), dtype=np.int64)
    probes = {f"addresses.{j}": same.copy() for j in range(memory.layers)}
    before = hits_of(bundle, np.array([1, 1, 2, 3]), probes)
    assert (before.rows, before.distinct_tokens) == ([1.0] * memory.layers, 3.0)
    probes["addresses.1"][2, 1] = 1
    after = hits_of(bundle, np.array([1, 1, 2, 3]), probes)
    assert after.rows == [1.0, 2.0, *[1.0] * (memory.layers - 2)]
    grown = [count_traffic(bundle, hits, batch=4, past=5, native=True).rows for hits in (before, after)]
    assert grown[1] - grown[0] == memory.row_size * 4


def test_probes_of_another_number_of_tokens_are_refused(exported: Exported) -> None:
    bundle = Bundle(exported("v2_per_rank")[0])
    probes = {f"addresses.{j}": np.zeros((3, 2), dtype=np.int64) for j in range(bundle.config.memory.layers)}
    with pytest.raises(InvalidRequest, match="not of 4 tokens"):
        hits_of(bundle, np.arange(4), probes)


def test_distinct_experts_are_the_best_of_each_token() -> None:
    bundle = planned(PRESETS["moe-tiny-top2"])
    logits = np.full((3, 8), -5.0)
    logits[0, [1, 2]] = logits[1, [2, 3]] = logits[2, [1, 3]] = 1.0
    hits = hits_of(bundle, np.array([5, 6, 7]), {f"router_logits.{i}": logits for i in range(3)})
    assert hits.experts == [3.0, 3.0, 3.0]
    counted = count_traffic(bundle, hits, batch=3, past=0, native=False)
    assert counted.experts == 3 * 3 * (3 * 64 * 48) * 4
    assert counted.rows == counted.keys == 0


def test_the_cache_is_read_whole_and_the_stock_graph_writes_gathered_rows() -> None:
    config = PRESETS["umv2-227m-1.2b"]
    bundle = planned(config)
    hits = Hits(8, 8.0, [256.0] * 20)
    native, stock = (count_traffic(bundle, hits, batch=8, past=64, native=value) for value in (True, False))
    assert native.kv_cache == 8 * 65 * 2 * 768 * 20 * 4
    assert native.intermediates == 2 * native.kv_cache
    assert stock.intermediates - native.intermediates == 4 * 8 * 32 * 20 * 384 * 4
    assert native.total == sum(value for name, value in native.as_dict().items() if name not in ("core", "total"))


def test_the_kernel_touches_the_pages_that_are_counted() -> None:
    """Rows of one page each: the system's own marks of the pages that were read since they were cleared."""
    rows = 4096
    memory = anonymous_memory(rows * 4096, huge_pages=False)
    table = np.frombuffer(memory, dtype=np.float32).reshape(rows, 1024)
    # frombuffer of a fresh map: written, so that each row has a page of its own.
    np.asarray(memoryview(memory).cast("B"))[::4096] = 1
    rng = np.random.default_rng(0)
    indices = rng.integers(0, rows, (40, 16))
    scores = np.ones((40, 16, 1), dtype=np.float32)
    others = np.ones(2**22, dtype=np.float32)
    Path("/proc/self/clear_refs").write_text("1", encoding="ascii")
    # A page that the processor still knows from the writing is read without a mark: others take its place.
    others.sum()
    memory_lookup(cpu_target(), indices, scores, [table])
    start = f"{table.ctypes.data:x}-"
    regions = Path("/proc/self/smaps").read_text(encoding="utf-8")
    region = regions[regions.index(f"\n{start}") :]
    referenced = int(region[region.index("Referenced:") :].split()[1]) * 1024
    assert referenced == len(np.unique(indices)) * 4096
