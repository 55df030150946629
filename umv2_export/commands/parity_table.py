"""A parity report as a person reads it, on stdout or stderr."""

from functools import partial

from rich.table import Table
from rich.text import Text

from umv2_export.commands.printing import format_bytes
from umv2_export.console import print_table
from umv2_export.interface import LOGITS
from umv2_export.parity import ParityReport
from umv2_export.parity.compare import Check
from umv2_export.parity.coverage import Coverage
from umv2_export.parity.stored import StoredCheck
from umv2_export.terminal import echo

__all__ = ["print_parity", "print_stored"]

# Swapped rows shown for each output, and tensors that differ; --json lists more.
PRINTED_SWAPS = 3
PRINTED_DIFFERENCES = 10

_STYLES = {"pass": "green", "ambiguous": "yellow", "fail": "bold red"}


def print_parity(report: ParityReport, reference: str, *, stderr: bool = False) -> None:
    """The checks as a table, notes below it, and the verdict."""
    say = partial(echo, err=stderr)
    if report.checks:
        print_table(_checks_table(report, reference), stderr=stderr)
    for check in report.checks:
        if check.note:
            say(f"{check.status}: {check.case}, {check.output}: {check.note}")
        for swap in check.swaps[:PRINTED_SWAPS] if check.output == LOGITS else ():
            say(
                f"  memory layer {swap['layer']}, token {swap['token']}: the runtime read {swap['only_runtime']}, the "
                f"reference {swap['only_reference']}; gap {swap['gap']:.2g} at {swap['threshold']:.3g}"
            )
    for line in _part_lines(report):
        say(line)
    _print_layers(report, stderr=stderr)
    if report.stored is not None:
        print_stored(report.stored, stderr=stderr)
    for line in () if report.coverage is None else _coverage_lines(report.coverage):
        say(line)
    ambiguous = [check for check in report.checks if check.status == "ambiguous"]
    more = f", {len(ambiguous)} of them ambiguous (rows swapped at near ties)" if ambiguous else ""
    counts = f"{len(report.checks)} checks{more}; {len(report.parts)} parts"
    if report.stored is not None:
        counts += f"; {report.stored.tensors} stored tensors"
    say(f"parity {'passed' if report.passed else 'FAILED'}: {counts}")
    needed = [_needed(check) for check in report.checks]
    finite = [value for value in needed if value is not None]
    if finite and len(finite) == len(needed):
        others = report.failed_parts or (report.stored is not None and not report.stored.passed)
        outputs = "check of an output (no tolerance passes the other failures)" if others else "check"
        tolerance = f"--atol {_rounded_up(max(finite))} --rtol {report.checks[0].rtol:g}"
        say(f"tolerance that would have passed every {outputs}: {tolerance}")


def print_stored(stored: StoredCheck, *, stderr: bool = False) -> None:
    """What differs from the checkpoint, and which share was compared."""
    for one in stored.differences[:PRINTED_DIFFERENCES]:
        rows = f" ({one.rows} rows differ)" if one.rows > 1 else ""
        echo(f"fail: stored {one.tensor}: {one.note}{rows}", err=stderr)
    if len(stored.differences) > PRINTED_DIFFERENCES:
        echo(f"fail: {len(stored.differences) - PRINTED_DIFFERENCES} more stored tensors differ", err=stderr)
    rounded = f"; {stored.rounded_keys} elements of keys differ in their last bits" if stored.rounded_keys else ""
    echo(
        f"stored tensors: {stored.tensors} compared with those folded from the checkpoint, "
        f"{format_bytes(stored.compared_bytes)} of {format_bytes(stored.bytes)} ({_percent(stored.share)}){rounded}",
        err=stderr,
    )


def _checks_table(report: ParityReport, reference: str) -> Table:
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
    return table


def _part_lines(report: ParityReport) -> list[str]:
    """The parts that are wrong by themselves; else how far the worst came."""
    lines = []
    for runtime, names in report.not_shown.items():
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        what = "these are not compared" if report.parts else "no part is compared by itself"
        lines.append(f"{runtime} does not show {some}: {what}")
    for part in report.failed_parts:
        lines.append(f"fail: {part.part} by itself ({part.case}, {part.runtime}): {part.note}")
    measured = [part for part in report.parts if part.rms is not None]
    if measured and not report.failed_parts:
        worst = max(measured, key=lambda part: part.excess)
        lines.append(
            f"parts, each on the input that it got: the worst is {worst.part} ({worst.case}), off by {worst.rms:.2g} "
            f"of its own size; allowed {worst.allowed:.2g}"
        )
    return lines


def _coverage_lines(coverage: Coverage) -> list[str]:
    """What the inputs reached."""
    pairs = (
        ("rows", coverage.rows),
        ("keys", coverage.keys),
        ("blocks", coverage.blocks),
        ("experts", coverage.experts),
        ("the vocabulary", coverage.tokens),
    )
    shares = ", ".join(f"{_percent(share)} of {name}" for name, share in pairs if share is not None)
    layers = " ".join(_percent(layer.rows) for layer in coverage.layers)
    return [f"reached by the test inputs: {shares}", *([f"  rows by memory layer: {layers}"] if layers else [])]


def _print_layers(report: ParityReport, *, stderr: bool) -> None:
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
    print_table(table, stderr=stderr)
    first = next((layer for layer in report.layers if layer.differs), None)
    if first is None:
        echo("no layer differs", err=stderr)
        return
    where = "the embedding" if first.layer == 0 else f"block {first.layer - 1} or the memory layer added after it"
    if first.layer == count - 1:
        where += ", or the final norm"
    echo(f"first difference: {where} ({first.case})", err=stderr)


def _needed(check: Check) -> float | None:
    return check.required_atol_same_rows if check.status == "ambiguous" else check.required_atol


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2e}"


def _percent(share: float) -> str:
    """What is not all is not called 100 %."""
    text = f"{100 * share:.1f}"
    return "99.9 %" if share < 1 and text == "100.0" else "100 %" if share >= 1 else f"{text} %"


def _rounded_up(value: float) -> str:
    """Two digits, and no less than the value: what is printed must pass when it is typed."""
    text = f"{value:.1e}"
    return text if float(text) >= value else f"{value * 1.05:.1e}"
