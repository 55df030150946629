"""The report of a benchmark as one page that needs no network: tables, and plots as pictures inside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from umv2_export.bench.options import BenchOptions
from umv2_export.bench.plots import draw_figures
from umv2_export.bench.results import BenchResult, StepResult
from umv2_export.bench.traffic import Traffic
from umv2_export.bundle import Bundle

__all__ = ["render_page"]

_TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Table:
    """Cells of a table, as text."""

    heading: Sequence[str]
    rows: Sequence[Sequence[str]]


def render_page(
    result: BenchResult, bundle: Bundle, baselines: Sequence[Bundle], options: BenchOptions, facts: Mapping[str, object]
) -> str:
    """The page.

    Args:
        result: of the run.
        bundle: that was measured.
        baselines: beside it.
        options: of the run.
        facts: versions and machine, shown as they are.
    """
    import jinja2  # noqa: PLC0415 - an optional package

    # Names of folders are text of others: all that the template is given is escaped, pictures of our own aside.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        title=f"Memory traffic and latency of {bundle.path.resolve().name}",
        options=options,
        comparisons=[_comparison(model, baseline) for model, baseline in result.decode if baseline is not None],
        warnings=result.warnings,
        figures=draw_figures(result),
        decode=_decode_table(result),
        parts=_parts_table(result),
        prefill=_prefill_table(result),
        models=_models_table([bundle, *baselines]),
        machine=_facts_table(result, options, facts),
    )


def _comparison(model: StepResult, baseline: StepResult) -> str:
    speed = times(baseline.latency.p50 / model.latency.p50, "faster", "slower", equal="as fast")
    size = times(baseline.traffic.core / model.traffic.core, "fewer", "more", equal="as many")
    return f"{speed} at batch {model.batch}, with {size} bytes of FFN and memory"


def times(ratio: float, above: str, below: str, *, equal: str) -> str:
    """A ratio in words, as a number from 1 on: 3.2 is "3.2 times faster", and 0.31 is "3.2 times slower"."""
    factor = max(ratio, 1 / ratio)
    digits = f"{factor:.1f}" if factor >= 2 else f"{factor:.2f}"
    if digits == "1.00":
        return equal
    return f"{digits} times {above if ratio > 1 else below}"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def _ratio(ours: float, theirs: float) -> str:
    return f"{theirs / ours:.2f}"


def _decode_table(result: BenchResult) -> Table:
    heading = [
        "model",
        "batch",
        "ms p50",
        "p90",
        "p99",
        "FFN + memory, or experts, ms",
        "tokens/s",
        "MB",
        "of them FFN + memory, or experts",
        "uniform",
        "GB/s",
    ]
    rows = []
    for pair in result.decode:
        for step in (entry for entry in pair if entry is not None):
            core = "" if step.core_latency is None else f"{step.core_latency.p50:.2f}"
            latency = [f"{value:.2f}" for value in (step.latency.p50, step.latency.p90, step.latency.p99)]
            sizes = [_megabytes(size) for size in (step.traffic.total, step.traffic.core, step.expected.core)]
            rows.append(
                [
                    step.model,
                    str(step.batch),
                    *latency,
                    core,
                    f"{step.tokens_per_second:,.0f}",
                    *sizes,
                    f"{step.gigabytes_per_second:.1f}",
                ]
            )
        if pair[1] is not None:
            rows.append(_ratio_row(pair[0], pair[1]))
    return Table(heading, rows)


def _ratio_row(model: StepResult, baseline: StepResult) -> list[str]:
    cores = (model.core_latency, baseline.core_latency)
    core = "" if cores[0] is None or cores[1] is None else _ratio(cores[0].p50, cores[1].p50)
    latency = [_ratio(getattr(model.latency, name), getattr(baseline.latency, name)) for name in ("p50", "p90", "p99")]
    traffic = [
        _ratio(model.traffic.total, baseline.traffic.total),
        _ratio(model.traffic.core, baseline.traffic.core),
        _ratio(model.expected.core, baseline.expected.core),
    ]
    return ["baseline / model", str(model.batch), *latency, core, "", *traffic, ""]


def _prefill_table(result: BenchResult) -> Table:
    rows = []
    for pair in result.prefill:
        for step in (entry for entry in pair if entry is not None):
            rows.append(
                [
                    step.model,
                    str(step.sequence),
                    f"{step.latency.p50:.1f}",
                    f"{step.tokens_per_second:,.0f}",
                    _megabytes(step.expected.total),
                ]
            )
        if pair[1] is not None:
            rows.append(
                [
                    "baseline / model",
                    "",
                    _ratio(pair[0].latency.p50, pair[1].latency.p50),
                    "",
                    _ratio(pair[0].expected.total, pair[1].expected.total),
                ]
            )
    return Table(["model", "tokens", "ms p50", "tokens/s", "MB under uniform routing"], rows)


def _parts_table(result: BenchResult) -> Table:
    names = [field.name for field in fields(Traffic)]
    steps = [step for pair in result.decode for step in pair if step is not None]
    names = [name for name in names if any(getattr(step.traffic, name) for step in steps)]
    rows = [
        [step.model, str(step.batch), *(_megabytes(getattr(step.traffic, name)) for name in names)] for step in steps
    ]
    return Table(["model", "batch", *(name.replace("_", " ") + ", MB" for name in names)], rows)


def _models_table(bundles: Sequence[Bundle]) -> Table:
    names = ("total", "activated", "dense", "keys", "rows", "experts")
    rows = [
        [
            bundle.path.resolve().name,
            *(f"{bundle.manifest.parameters[name] / 1e6:,.1f}" for name in names),
            bundle.manifest.dtype,
            bundle.manifest.table_dtype if bundle.config.memory.layers else "",
        ]
        for bundle in bundles
    ]
    return Table(["millions of parameters", *names, "dtype", "rows"], rows)


def _facts_table(result: BenchResult, options: BenchOptions, facts: Mapping[str, object]) -> Table:
    rows = [[str(name), str(value)] for name, value in facts.items()]
    if result.ceilings is not None:
        rows.append(["streaming read, GB/s", f"{result.ceilings.streaming / 1e9:.1f}"])
        rows.append([f"random rows of {result.ceilings.row_bytes} bytes, GB/s", f"{result.ceilings.gather / 1e9:.1f}"])
    return Table(["machine", f"{options.threads} threads"], rows)
