"""The report on a GPU, as far as a CPU can run it: what is compared computes the same, and counts are read rightly."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks import dram, forms, peers, report
from benchmarks.ceiling import WAYS, read_rows
from benchmarks.former_lookup import former_lookup
from benchmarks.former_topk import former_topk
from benchmarks.peers import Comparison
from umv2_export.errors import CheckFailed
from umv2_export.gpu.launch import launch_lookup, launch_topk
from umv2_export.ops import experts
from umv2_export.presets import PRESETS

# As ncu prints it after what the program printed.
NCU_LINES = """==PROF== Connected to process 41
expected 2000
==PROF== Disconnected from process 41
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","41","memory_lookup_kernel","Command line profiler metrics","dram__bytes_read.sum","byte","2,050"
""".splitlines()

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def test_grouped_experts_are_the_experts_of_the_model() -> None:
    torch.manual_seed(0)
    hidden, logits = torch.randn(9, 32, dtype=torch.bfloat16), torch.randn(9, 6)
    ff_proj, ff_out = torch.randn(6, 32, 32, dtype=torch.bfloat16), torch.randn(6, 16, 32, dtype=torch.bfloat16)
    grouped = peers.grouped_experts(hidden, logits, ff_proj, ff_out, 2)
    one_by_one = experts(hidden, logits, [w.T for w in ff_proj], [w.T for w in ff_out], 2, False)
    torch.testing.assert_close(grouped, one_by_one, rtol=2e-2, atol=0.5)


def test_every_lookup_computes_the_same() -> None:
    torch.manual_seed(0)
    table = torch.randn(50, 32)
    scores, indices = peers.random_lookup(table, 3)
    ours = peers.our_lookup(table, scores, indices)()
    for peer in (peers.stock_lookup, peers.torch_embedding_bag):
        torch.testing.assert_close(peer(table, scores, indices)(), ours)


def test_former_kernels_compute_what_the_present_ones_do() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table, query = torch.randn(50, 40, device=device), torch.randn(2, 8, device=device)
    indices, scores = torch.randint(50, (2, 9), device=device), torch.rand(2, 9, 2, device=device)
    ours = launch_lookup(indices, scores, None, query, None, [table], 8, "none", 50, 1)
    torch.testing.assert_close(former_lookup(indices, scores, query, table, 8), ours, rtol=1e-4, atol=1e-4)
    shapes = ((1, 1, 9, 2), (1, 1, 9, 2), (1, 2), (1, 2), (2, 1, 2, 2))
    inputs: tuple[Any, ...] = (*(torch.randn(shape, device=device) for shape in shapes), 3, 4)
    assert sorted(former_topk(*inputs)[0][0].tolist()) == sorted(launch_topk(*inputs)[0][0].tolist())


@without_gpu
def test_forms_are_compared_at_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(forms.LOOKUPS, "small", (8, 16, 5, 2))
    monkeypatch.setitem(forms.TOPKS, "small", (9, 2))
    monkeypatch.setattr(forms, "replay_in_turns", lambda contenders: [float(i + 1) for i in range(len(contenders))])
    lines = list(forms.compare_lookup_forms(torch.randn(20, 24), "small", batches=(1, 2), cold_bytes=0))
    assert [(one.batch, one.ratio) for one in lines] == [(1, 2.0), (1, 3.0), (2, 2.0), (2, 3.0)]
    assert [one.ratio for one in forms.compare_topk_forms("cpu", "small", batches=(1, 2))] == [2.0, 3.0] * 2


@without_gpu
def test_lookups_and_layers_are_compared_at_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "random_row_rate", lambda table, indices: 1e9)
    lines = list(peers.compare_lookups(torch.randn(50, 32), batches=(1, 64), cold_bytes=0))
    names = ("1 GB/s of random rows", "torch embedding_bag", "stock ops in a CUDA graph")
    assert [(one.measure.split(" / ")[1], one.batch) for one in lines] == [(name, b) for b in (1, 64) for name in names]
    assert [one.target for one in lines] == [None, None, None, 0.8, 1.5, None]
    assert all(one.ratio == pytest.approx(one.peer_seconds / one.seconds) for one in lines if one.peer_seconds)
    layers = peers.compare_layers(PRESETS["umv2-tiny"], PRESETS["moe-tiny-top8"], "cpu", batches=(4, 64), layers=2)
    assert [(one.batch, one.target) for one in layers] == [(4, None), (64, 4.0)]


@pytest.mark.parametrize("way", [WAYS[0], WAYS[-1]])
def test_the_ceiling_reads_every_row_once(way: tuple[int, int]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table = torch.randn(40, 24, device=device)
    indices = torch.randint(40, (21,), device=device)
    sums = read_rows(table, *way, indices)
    assert len(sums) == -(-21 // way[0])
    torch.testing.assert_close(sums.sum(), table[indices].sum(), rtol=1e-4, atol=1e-4)


def test_bytes_are_counted_once_a_distinct_row_and_read_from_ncu() -> None:
    indices, scores = torch.tensor([[3, 3, 5]]), torch.zeros(1, 3, 1)
    assert dram.expected_bytes(indices, scores, 1000) == 2 * 1000 + 3 * 8 + 3 * 4
    assert dram.bytes_read(NCU_LINES) == 2050
    # A lookup in splits is two kernels.
    assert dram.bytes_read([*NCU_LINES, NCU_LINES[-1]]) == 4100
    with pytest.raises(CheckFailed, match="0 times"):
        dram.bytes_read(NCU_LINES[:-1])


def test_a_count_that_is_off_fails_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: name)
    for measured, agrees in ((1040, True), (1060, False)):
        monkeypatch.setattr(dram, "count", partial(dram.Count, measured=measured, expected=1000))
        assert report.count_bytes()[1] is agrees


def test_the_page_names_card_and_figures() -> None:
    lines = [
        Comparison("lookup / peer", 64, 2e-6, 6e-6, 3.0, 1.5),
        Comparison("lookup / rate", 64, 2e-6, None, 0.9, 0.8),
    ]
    text = report.page("Some card", "no ncu", [report.table(lines)])
    assert "Some card" in text
    assert "| lookup / peer | 64 | 2.0 | 6.0 | 3.00 | 1.5 |" in text
    assert "| lookup / rate | 64 | 2.0 |  | 0.90 | 0.8 |" in text


def test_what_fails_half_way_keeps_what_was_measured_before() -> None:
    def compare() -> Iterator[Comparison]:
        yield Comparison("lookup / peer", 64, 2e-6, 6e-6, 3.0, 1.5)
        raise RuntimeError("out of memory")

    text, whole = report.measured(compare, "lookups")
    assert not whole
    assert "| lookup / peer | 64 |" in text
    assert "Not measured further, lookups: out of memory" in text


@without_gpu
def test_without_a_gpu_nothing_runs() -> None:
    result = CliRunner().invoke(report.main, [])
    assert result.exit_code == 4
    assert "PyTorch sees no GPU" in result.output
