"""`umv2-export bench-op`."""

import os
from typing import TYPE_CHECKING

import click

from umv2_export.commands.options import json_option
from umv2_export.commands.parameter_types import MOST_CALLS, MOST_THREADS
from umv2_export.system.exits import print_json
from umv2_export.terminal import echo

if TYPE_CHECKING:
    from collections.abc import Iterable

    from umv2_export.bench.ops import OpResult

__all__ = ["bench_op"]


@click.command()
@click.option(
    "--rounds", type=click.IntRange(5, MOST_CALLS), default=40, show_default=True, help="Counted calls of each op."
)
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), default=2, show_default=True, help="Threads of both libraries."
)
@json_option
def bench_op(rounds: int, threads: int, as_json: bool) -> None:
    """Time the native ops beside their peers.

    Peers are ops of torch and ONNX Runtime, and the plain gather of this machine. Tables take 4 GiB.
    """
    # Two cores, and threads of two libraries: those of torch would spin while ONNX Runtime computes, and slow torch
    # itself down 30-fold (64 rows of 8 tokens: 12 ms instead of 0.3 ms). OpenMP reads this when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    from umv2_export.onnx.minimum import BENCH_ONNXRUNTIME
    from umv2_export.runtimes import require_runtime

    require_runtime("onnxruntime-native", BENCH_ONNXRUNTIME, why="sessions of older releases share no threads")

    from umv2_export.bench.ops import benchmark_ops

    results = benchmark_ops(rounds=rounds, threads=threads)
    if as_json:
        print_json({"results": [result.as_dict() for result in results]})
    else:
        _print_results(results)


def _print_results(results: "Iterable[OpResult]") -> None:
    """One line as soon as it is measured: a run takes minutes."""
    echo(f"{'measure':<58} {'B':>4} {'p50 ms':>8} {'p90':>8} {'peer p50':>9} {'GB/s':>6} {'ratio':>6}  aim")
    for result in results:
        peer = "" if result.peer is None else f"{result.peer.p50:.3f}"
        rate = "" if result.gigabytes_per_second is None else f"{result.gigabytes_per_second:.1f}"
        verdict = "" if result.ratio >= result.target else "  missed"
        echo(
            f"{result.measure:<58} {result.batch:>4} {result.native.p50:>8.3f} {result.native.p90:>8.3f} {peer:>9} "
            f"{rate:>6} {result.ratio:>6.2f}  {result.target}{verdict}"
        )
