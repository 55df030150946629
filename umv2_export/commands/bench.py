"""`umv2-export bench`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from umv2_export.commands.options import json_option
from umv2_export.commands.parameter_types import FILE, FOLDER, MOST_CALLS, MOST_THREADS, MOST_TOKENS, TEXT_FILE, sizes
from umv2_export.commands.refusals import refuse_flags
from umv2_export.errors import InvalidRequest
from umv2_export.names import RUNTIMES
from umv2_export.system.exits import print_json
from umv2_export.system.target import check_file_target
from umv2_export.terminal import echo

if TYPE_CHECKING:
    from umv2_export.bench.results import BenchResult, StepResult

__all__ = ["bench"]

_RUNTIME = click.Choice([name for name in RUNTIMES if name != "torch"])


@click.command()
@click.argument("bundle", type=FOLDER)
@click.option(
    "--baseline",
    "baselines",
    type=FOLDER,
    multiple=True,
    help="Bundle to compare with. Repeatable, for several exports of one model; the fastest counts at each batch.",
)
@click.option(
    "--runtime",
    type=_RUNTIME,
    help="Runtime of the bundle. Default: the fastest that it supports, onnxruntime-native or onnxruntime.",
)
@click.option(
    "--baseline-runtime",
    type=_RUNTIME,
    help="Runtime of the baselines. Default: that of --runtime where one supports it, else the fastest that it "
    "supports.",
)
@click.option(
    "--batch",
    "batches",
    type=sizes,
    metavar="SIZES",
    default="1,4,8,16,32,64,256",
    show_default=True,
    help="Batch sizes.",
)
@click.option(
    "--past", type=click.IntRange(0, MOST_TOKENS), default=64, show_default=True, help="Cached positions of a sequence."
)
@click.option(
    "--prefill", type=click.IntRange(1, MOST_TOKENS), default=256, show_default=True, help="Tokens of the prompt."
)
@click.option("--iterations", type=click.IntRange(3, MOST_CALLS), default=20, show_default=True, help="Counted calls.")
@click.option(
    "--threads", type=click.IntRange(1, MOST_THREADS), default=2, show_default=True, help="Threads of all sessions."
)
@click.option(
    "--text",
    type=TEXT_FILE,
    help="Text whose routing is recorded. Default: the source of Python's standard library.",
)
@click.option("--report", type=FILE, help="Write a page (HTML) with plots.")
@click.option("--force", is_flag=True, help="Replace a report that exists.")
@json_option
def bench(
    bundle: Path,
    baselines: Sequence[Path],
    runtime: str | None,
    baseline_runtime: str | None,
    batches: tuple[int, ...],
    past: int,
    prefill: int,
    iterations: int,
    threads: int,
    text: Path | None,
    report: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Time decode steps and prefill, and count their bytes.

    Baselines, such as models of experts, take turns with the bundle.
    """
    from umv2_export.onnx.minimum import BENCH_ONNXRUNTIME
    from umv2_export.runtimes import require_runtime

    require_runtime("onnxruntime", BENCH_ONNXRUNTIME, why="sessions of older releases share no threads")

    from umv2_export.bench.options import BenchOptions
    from umv2_export.bench.page import render_page
    from umv2_export.bench.plots import require_plots
    from umv2_export.bench.recording import default_text
    from umv2_export.bench.resident import peak_resident
    from umv2_export.bench.runtime_choice import choose_runtimes
    from umv2_export.bench.steps import benchmark_steps
    from umv2_export.bundle import Bundle
    from umv2_export.environment import describe_machine
    from umv2_export.progress import progress_bars
    from umv2_export.system.output import write_atomically
    from umv2_export.tokenizer import text_ids

    if baseline_runtime is not None and not baselines:
        raise InvalidRequest("--baseline-runtime without a baseline", fix="pass --baseline BUNDLE, or leave it out")
    if report is None:
        refuse_flags(["force"], "there is no --report to replace")
    else:
        require_plots()
        inputs = [bundle, *baselines, *filter(None, [text])]
        check_file_target(report, force=force, inputs=inputs, what="the report")
    opened, others = Bundle(bundle), [Bundle(path) for path in baselines]
    chosen = choose_runtimes(opened, others, runtime, baseline_runtime)
    options = BenchOptions(batches, past, prefill, iterations, threads, chosen)
    content = default_text() if text is None else text.read_bytes()
    with progress_bars() as track:
        result = benchmark_steps(opened, others, lambda model: text_ids(model, content, where=text), options, track)
    machine = describe_machine()
    if report is not None:
        write_atomically(report, render_page(result, opened, others, options, machine).encode())
    if as_json:
        resident = {
            str(model.path): peak_resident(model.path, name, max(batches), past)
            for model, name in zip([opened, *others], chosen, strict=True)
        }
        print_json({"machine": machine, **result.as_dict(), "resident_bytes": resident})
    else:
        _print_result(result)


def _print_result(result: "BenchResult") -> None:
    """One line a model and batch, the ratios below each pair, and what the machine gives."""
    for warning in result.warnings:
        echo(f"not a fair pair: {warning}")
    if result.ceilings is not None:
        echo(
            f"this machine reads {result.ceilings.streaming / 1e9:.1f} GB/s from end to end, "
            f"{result.ceilings.gather / 1e9:.1f} GB/s in random rows of {result.ceilings.row_bytes} bytes"
        )
    headings = " ".join(f"{name:>9}" for name in ("ms p50", "p90", "core ms", "tokens/s", "MB", "core MB", "uniform"))
    echo(f"{'decode step':<30} {'batch':>5} {headings} {'GB/s':>6}")
    for model, baseline in result.decode:
        for step in filter(None, (model, baseline)):
            echo(_step_line(step))
        if baseline is not None:
            echo(_ratio_line(model, baseline))
    echo("prefill")
    for pair in result.prefill:
        for step in filter(None, pair):
            rate = f"{step.latency.p50:.1f} ms, {step.tokens_per_second:,.0f} tokens/s"
            echo(f"{_label(step):<30} {step.sequence} tokens: {rate}")
    echo("core: FFN and memory layers, or router and experts; uniform: core MB expected under uniform routing")


def _label(step: "StepResult") -> str:
    return f"{step.model} ({step.runtime.removeprefix('onnxruntime-')})"[:30]


def _step_line(step: "StepResult") -> str:
    core = "" if step.core_latency is None else f"{step.core_latency.p50:.2f}"
    sizes = " ".join(f"{size / 1e6:>9.1f}" for size in (step.traffic.total, step.traffic.core, step.expected.core))
    return (
        f"{_label(step):<30} {step.batch:>5} {step.latency.p50:>9.2f} {step.latency.p90:>9.2f} {core:>9} "
        f"{step.tokens_per_second:>9.0f} {sizes} {step.gigabytes_per_second:>6.1f}"
    )


def _ratio_line(model: "StepResult", baseline: "StepResult") -> str:
    """Baseline over model."""
    core = ""
    if model.core_latency is not None and baseline.core_latency is not None:
        core = f"{baseline.core_latency.p50 / model.core_latency.p50:.2f}"
    p50, p90 = baseline.latency.p50 / model.latency.p50, baseline.latency.p90 / model.latency.p90
    sizes = [
        baseline.traffic.total / model.traffic.total,
        baseline.traffic.core / model.traffic.core,
        baseline.expected.core / model.expected.core,
    ]
    return f"{'  baseline / model':<30} {model.batch:>5} {p50:>9.2f} {p90:>9.2f} {core:>9} {'':>9} " + " ".join(
        f"{ratio:>9.2f}" for ratio in sizes
    )
