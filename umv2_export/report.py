"""What a person reads on stdout: tables and short lines."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from umv2_export.bundle import Bundle
from umv2_export.console import open_console
from umv2_export.parity import ParityReport
from umv2_export.terminal import one_line

if TYPE_CHECKING:
    from umv2_export.bench.ops import OpResult
    from umv2_export.bench.results import BenchResult, StepResult
    from umv2_export.gpu.ahead_of_time import CompiledKernel
    from umv2_export.parity.coverage import Coverage
    from umv2_export.parity.stored import StoredCheck

__all__ = [
    "format_bytes",
    "format_count",
    "print_bench",
    "print_description",
    "print_export",
    "print_kernels",
    "print_op_results",
    "print_parity",
]

# Swapped rows shown for each output, and tensors that differ; --json lists more.
PRINTED_SWAPS = 3
PRINTED_DIFFERENCES = 10

_STYLES = {"pass": "green", "ambiguous": "yellow", "fail": "bold red"}


def format_bytes(size: float) -> str:
    """Decimal units, as disks are sold."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= factor:
            return f"{size / factor:.4g} {unit}"
    return f"{size:.0f} bytes"


def format_count(number: float) -> str:
    """Parameters, in the units of model names."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= factor:
            return f"{number / factor:.4g}{unit}"
    return f"{number:.0f}"


def _console(*, stderr: bool = False) -> Console:
    """Never wraps: a table that is piped into a file keeps its columns."""
    console = open_console(stderr=stderr)
    return console if console.is_terminal else open_console(stderr=stderr, width=200)


def _number(value: float | None, digits: str = ".2e") -> str:
    return "not finite" if value is None else format(value, digits)


def print_export(bundle: Bundle, parity: ParityReport | None) -> None:
    """Files, parameters, and what the validation found."""
    console = _console()
    manifest = bundle.manifest
    counts = manifest.parameters
    size = sum(facts["size"] for facts in manifest.files.values())
    console.print(f"{bundle.path}: {len(manifest.files)} files, {format_bytes(size)}", highlight=False, markup=False)
    console.print(
        f"parameters: {format_count(counts['total'])} in all, {format_count(counts['activated'])} activated a token "
        f"(dense {format_count(counts['dense'])}, keys {format_count(counts['keys'])}, "
        f"rows {format_count(counts['rows'])})",
        highlight=False,
    )
    stored = ", ".join(f"{kind} {format_bytes(size)}" for kind, size in manifest.bytes.items() if size)
    retrieval = [f"keys {manifest.key_dtype}", f"tables {manifest.table_dtype}"] if bundle.config.memory.layers else []
    facts = [f"dense {manifest.dtype}", *retrieval, f"opset {manifest.opset}"]
    facts.append(f"for ONNX Runtime {manifest.min_onnxruntime} or later")
    if bundle.config.memory.query_per_rank and bundle.config.memory.layers:
        facts.append(f"query layout {manifest.query_layout}")
    console.print(f"stored: {stored}; {', '.join(facts)}", highlight=False)
    if parity is None:
        console.print("not validated")
    elif not parity.checks and parity.stored is not None:
        _print_stored(console, parity.stored)
        console.print("not run: no runtime on a CPU computes bf16", highlight=False)
    else:
        print_parity(parity, "the checkpoint")


def print_kernels(folder: Path, kernels: Sequence["CompiledKernel"]) -> None:
    """What each kernel takes of a GPU."""
    table = Table()
    table.add_column("kernel", no_wrap=True)
    for heading in ("for", "registers", "spilled bytes", "shared bytes", "16-byte loads"):
        table.add_column(heading, justify="right")
    for kernel in kernels:
        numbers = (kernel.registers, kernel.spill_bytes, kernel.shared_bytes, kernel.vector_loads)
        table.add_row(kernel.name, kernel.compute_capability, *map(str, numbers))
    console = _console()
    console.print(table)
    console.print(f"{folder}: {len(kernels)} kernels", highlight=False, markup=False)


def warn_of_spills(kernels: Sequence["CompiledKernel"]) -> None:
    """Say on stderr which kernels keep registers in memory: they compute the same, only slower."""
    for kernel in kernels:
        if kernel.spill_bytes:
            _console(stderr=True).print(
                f"warning: {kernel.name} for {kernel.compute_capability} spills {kernel.spill_bytes} bytes of registers"
                " a thread: it may be slow",
                highlight=False,
                markup=False,
            )


def print_parity(report: ParityReport, reference: str, *, stderr: bool = False) -> None:
    """The checks as a table, notes below it, and the verdict."""
    console = _console(stderr=stderr)
    table = Table(title=Text(f"Parity with {reference}"), title_justify="left")
    for heading in ("runtime", "case", "output", "status"):
        table.add_column(heading, no_wrap=True)
    for heading in ("max abs", "median abs", "rms", "same rows", "allowed", "rms allowed", "would pass at", "argmax"):
        table.add_column(heading, justify="right", no_wrap=True)
    for check in report.checks:
        table.add_row(
            check.runtime,
            check.case,
            check.output,
            Text(check.status, style=_STYLES[check.status]),
            _number(check.max_abs),
            _number(check.median_abs),
            _number(check.rms),
            "" if check.max_abs_same_rows is None else _number(check.max_abs_same_rows),
            _number(check.atol),
            _number(check.allowed_rms),
            _number(check.required_atol),
            "" if check.argmax_agreement is None else f"{check.argmax_agreement:.1%}",
        )
    if report.checks:
        console.print(table)
    for check in report.checks:
        if check.note:
            console.print(f"{check.status}: {check.case}, {check.output}: {check.note}", highlight=False, markup=False)
        for swap in check.swaps[:PRINTED_SWAPS] if check.output == "logits" else ():
            console.print(
                f"  memory layer {swap['layer']}, token {swap['token']}: the runtime read {swap['only_runtime']}, the "
                f"reference {swap['only_reference']}; gap {swap['gap']:.2g} at {swap['threshold']:.3g}",
                highlight=False,
                markup=False,
            )
    _print_parts(console, report)
    _print_layers(console, report)
    if report.stored is not None:
        _print_stored(console, report.stored)
    if report.coverage is not None:
        _print_coverage(console, report.coverage)
    ambiguous = [check for check in report.checks if check.status == "ambiguous"]
    more = f", {len(ambiguous)} of them ambiguous (rows swapped at near ties)" if ambiguous else ""
    counts = f"{len(report.checks)} checks{more}; {len(report.parts)} parts"
    if report.stored is not None:
        counts += f"; {report.stored.tensors} stored tensors"
    console.print(f"parity {'passed' if report.passed else 'FAILED'}: {counts}", highlight=False)
    needed = [
        check.required_atol_same_rows if check.status == "ambiguous" else check.required_atol for check in report.checks
    ]
    finite = [value for value in needed if value is not None]
    if finite and len(finite) == len(needed):
        rtol = report.checks[0].rtol
        others = report.failed_parts or (report.stored is not None and not report.stored.passed)
        outputs = "check of an output (no tolerance passes the other failures)" if others else "check"
        console.print(
            f"tolerance that would have passed every {outputs}: --atol {_rounded_up(max(finite))} --rtol {rtol:g}",
            highlight=False,
        )


def _print_parts(console: Console, report: ParityReport) -> None:
    """The parts that are wrong by themselves; else how far the worst came."""
    for runtime, names in report.not_shown.items():
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        what = "these are not compared" if report.parts else "no part is compared by itself"
        console.print(f"{runtime} does not show {some}: {what}", highlight=False, markup=False)
    for part in report.failed_parts:
        line = f"fail: {part.part} by itself ({part.case}, {part.runtime}): {part.note}"
        console.print(line, highlight=False, markup=False)
    measured = [part for part in report.parts if part.rms is not None]
    if measured and not report.failed_parts:
        worst = max(measured, key=lambda part: part.excess)
        console.print(
            f"parts, each on the input that it got: the worst is {worst.part} ({worst.case}), off by {worst.rms:.2g} "
            f"of its own size; allowed {worst.allowed:.2g}",
            highlight=False,
            markup=False,
        )


def _print_stored(console: Console, stored: "StoredCheck") -> None:
    """What differs from the checkpoint, and which share was compared."""
    for one in stored.differences[:PRINTED_DIFFERENCES]:
        rows = f" ({one.rows} rows differ)" if one.rows > 1 else ""
        console.print(f"fail: stored {one.tensor}: {one.note}{rows}", highlight=False, markup=False)
    if len(stored.differences) > PRINTED_DIFFERENCES:
        console.print(f"fail: {len(stored.differences) - PRINTED_DIFFERENCES} more stored tensors differ")
    rounded = f"; {stored.rounded_keys} elements of keys differ in their last bits" if stored.rounded_keys else ""
    console.print(
        f"stored tensors: {stored.tensors} compared with those folded from the checkpoint, "
        f"{format_bytes(stored.compared_bytes)} of {format_bytes(stored.bytes)} ({_share(stored.share)}){rounded}",
        highlight=False,
    )


def _print_coverage(console: Console, coverage: "Coverage") -> None:
    """What the inputs reached."""
    pairs = (
        ("rows", coverage.rows),
        ("keys", coverage.keys),
        ("blocks", coverage.blocks),
        ("experts", coverage.experts),
        ("the vocabulary", coverage.tokens),
    )
    shares = ", ".join(f"{_share(share)} of {name}" for name, share in pairs if share is not None)
    console.print(f"reached by the test inputs: {shares}", highlight=False)
    if coverage.layers:
        rows = " ".join(_share(layer.rows) for layer in coverage.layers)
        console.print(f"  rows by memory layer: {rows}", highlight=False)


def _share(share: float) -> str:
    """Percent; what is not all is not called 100 %."""
    text = f"{100 * share:.1f}"
    return "99.9 %" if share < 1 and text == "100.0" else "100 %" if share >= 1 else f"{text} %"


def _rounded_up(value: float) -> str:
    """Two digits, and no less than the value: what is printed must pass when it is typed."""
    text = f"{value:.1e}"
    return text if float(text) >= value else f"{value * 1.05:.1e}"


def _print_layers(console: Console, report: ParityReport) -> None:
    """For each case, the residual stream layer by layer, up to the first that differs."""
    if not report.layers:
        return
    table = Table(title="Largest difference of the residual stream at the input of each block", title_justify="left")
    table.add_column("case", no_wrap=True)
    count = 1 + max(layer.layer for layer in report.layers)
    for layer in range(count - 1):
        table.add_column(f"block {layer}", justify="right")
    table.add_column("final norm", justify="right")
    for case in dict.fromkeys(layer.case for layer in report.layers):
        row = [layer for layer in report.layers if layer.case == case][:count]
        cells = [Text(_number(layer.max_abs), style="bold red" if layer.differs else "") for layer in row]
        table.add_row(case, *cells)
    console.print(table)
    first = next((layer for layer in report.layers if layer.differs), None)
    if first is None:
        console.print("no layer differs")
        return
    where = "the embedding" if first.layer == 0 else f"block {first.layer - 1} or the memory layer added after it"
    if first.layer == count - 1:
        where += ", or the final norm"
    console.print(f"first difference: {where} ({first.case})", highlight=False)


def print_op_results(results: Iterable["OpResult"]) -> None:
    """One line as soon as it is measured: a run takes minutes."""
    console = _console()
    console.print(f"{'measure':<58} {'B':>4} {'p50 ms':>8} {'p90':>8} {'peer p50':>9} {'GB/s':>6} {'ratio':>6}  aim")
    for result in results:
        peer = "" if result.peer is None else f"{result.peer.p50:.3f}"
        rate = "" if result.gigabytes_per_second is None else f"{result.gigabytes_per_second:.1f}"
        verdict = "" if result.ratio >= result.target else "  missed"
        console.print(
            f"{result.measure:<58} {result.batch:>4} {result.native.p50:>8.3f} {result.native.p90:>8.3f} {peer:>9} "
            f"{rate:>6} {result.ratio:>6.2f}  {result.target}{verdict}",
            highlight=False,
        )


def print_bench(result: "BenchResult") -> None:
    """One line a model and batch, the ratios below each pair, and what the machine gives."""
    console = _console()
    for warning in result.warnings:
        console.print(f"not a fair pair: {warning}", highlight=False, markup=False)
    if result.ceilings is not None:
        console.print(
            f"this machine reads {result.ceilings.streaming / 1e9:.1f} GB/s from end to end, "
            f"{result.ceilings.gather / 1e9:.1f} GB/s in random rows of {result.ceilings.row_bytes} bytes",
            highlight=False,
        )
    headings = " ".join(f"{name:>9}" for name in ("ms p50", "p90", "core ms", "tokens/s", "MB", "core MB", "uniform"))
    console.print(f"{'decode step':<30} {'batch':>5} {headings} {'GB/s':>6}", highlight=False)
    for model, baseline in result.decode:
        for step in (model, baseline):
            if step is not None:
                console.print(_step_line(step), highlight=False, markup=False)
        if baseline is not None:
            console.print(_ratio_line(model, baseline), highlight=False)
    console.print("prefill", highlight=False)
    for model, baseline in result.prefill:
        for step in (model, baseline):
            if step is not None:
                rate = f"{step.latency.p50:.1f} ms, {step.tokens_per_second:,.0f} tokens/s"
                console.print(f"{_label(step):<30} {step.sequence} tokens: {rate}", highlight=False, markup=False)
    console.print("core: FFN and memory layers, or router and experts; uniform: core MB expected under uniform routing")


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


def print_description(description: Mapping[str, Any]) -> None:
    """Nested facts as an indented list; long lists are cut to the first and the last entry."""
    console = _console()

    def show(name: str, value: object, indent: int, parent: str = "") -> None:
        pad = "  " * indent
        if isinstance(value, Mapping):
            console.print(f"{pad}{one_line(name)}", highlight=False, markup=False)
            for key, entry in value.items():
                show(str(key), entry, indent + 1, name)
        elif isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[0], Mapping):
            console.print(f"{pad}{one_line(name)} ({len(value)})", highlight=False, markup=False)
            for entry in value if len(value) <= 4 else (*value[:3], value[-1]):
                facts = "  ".join(str(fact) for fact in entry.values())
                console.print(f"{pad}  {one_line(facts)}", highlight=False, markup=False)
        else:
            text = one_line(f"{name}: {_plain(name, value, parent)}")
            console.print(f"{pad}{text}", highlight=False, markup=False)

    for name, value in description.items():
        show(name, value, 0)


def _plain(name: str, value: object, parent: str) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and (name in ("size", "memory_bytes") or parent in ("files", "bytes")):
        return f"{value:,} ({format_bytes(value)})"
    if isinstance(value, int) and parent == "parameters":
        return f"{value:,} ({format_count(value)})"
    if isinstance(value, list | tuple):
        return ", ".join(str(entry) for entry in value) or "none"
    return str(value)
