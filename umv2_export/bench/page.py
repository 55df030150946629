"""The report of a benchmark as one page that needs no network: tables, and plots as pictures inside it."""

import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from umv2_export.bench.steps import BenchOptions, BenchResult, StepResult
from umv2_export.bench.traffic import Traffic
from umv2_export.bundle import Bundle
from umv2_export.errors import EnvironmentUnfit

__all__ = ["render_page", "require_plots"]

# Colour-blind safe, of Okabe and Ito.
MODEL_COLOR, BASELINE_COLOR = "#0072B2", "#D55E00"
PART_COLORS = (
    "#999999",
    "#0072B2",
    "#56B4E9",
    "#CCCCCC",
    "#009E73",
    "#F0E442",
    "#D55E00",
    "#E69F00",
    "#CC79A7",
    "#000000",
)

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } thead th { border-bottom: 2px solid #888; vertical-align: bottom; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; }
figcaption { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; } .warning { background: #fff3cd; padding: .6rem 1rem; border-left: 4px solid #e0a800; }
"""


_BYTES_CAPTION = (
    "Bytes of FFN and memory layers, or of router and experts, in one decode step. Points: counted from the routing of "
    "real text. Dashed: expected under uniform routing."
)
_LATENCY_CAPTION = "Median latency of a decode step, whole, and of FFN and memory layers (or experts) alone."
_PARTS_CAPTION = "One decode step by part; for each batch the model on the left, the baseline on the right."
_DENSITY_CAPTION = "Share of all rows, or of all experts, that one decode step touches."


def require_plots() -> None:
    """Notice that the plotting library is missing before minutes of measuring.

    Raises:
        EnvironmentUnfit: it is.
    """
    try:
        import matplotlib  # noqa: F401, PLC0415 - an optional package
    except ImportError as error:
        raise EnvironmentUnfit("matplotlib is not installed", fix="pip install 'umv2-export[report]'") from error


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
    title = f"Memory traffic and latency of {bundle.path.resolve().name}"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        _intro(result, options),
        *(f'<p class="warning">Not a fair pair: {html.escape(warning)}</p>' for warning in result.warnings),
        "<h2>Decode steps</h2>",
        _decode_table(result),
        _figure(lambda axes: _plot_bytes(axes, result), _BYTES_CAPTION),
        _figure(lambda axes: _plot_latency(axes, result), _LATENCY_CAPTION),
        "<h2>Where the bytes go</h2>",
        _figure(lambda axes: _plot_parts(axes, result), _PARTS_CAPTION),
        _parts_table(result),
        "<h2>Sparse density</h2>",
        _figure(lambda axes: _plot_density(axes, result), _DENSITY_CAPTION),
        "<h2>Prefill</h2>",
        _prefill_table(result),
        "<h2>Models and machine</h2>",
        _models_table([bundle, *baselines]),
        _facts_table(result, options, facts),
    ]
    body = "\n".join(parts)
    head = f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def _intro(result: BenchResult, options: BenchOptions) -> str:
    pairs = [(model, baseline) for model, baseline in result.decode if baseline is not None]
    text = (
        f"Decode steps at past {options.past} and a prefill of {options.prefill} tokens, ONNX Runtime on a CPU, "
        f"{options.threads} threads, {options.rounds} counted calls of each in alternation."
    )
    if pairs:
        ratios = [
            f"{_ratio(model.latency.p50, baseline.latency.p50)} times faster at batch {model.batch}, with "
            f"{_ratio(model.traffic.core, baseline.traffic.core)} times fewer bytes of FFN and memory"
            for model, baseline in pairs
        ]
        text += " Against the baseline: " + "; ".join(ratios) + "."
    return f"<p>{html.escape(text)}</p>"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in heading)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f}"


def _ratio(ours: float, theirs: float) -> str:
    return f"{theirs / ours:.2f}"


def _decode_table(result: BenchResult) -> str:
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
    return _table(heading, rows)


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


def _prefill_table(result: BenchResult) -> str:
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
    return _table(["model", "tokens", "ms p50", "tokens/s", "MB under uniform routing"], rows)


def _parts_table(result: BenchResult) -> str:
    names = [field.name for field in fields(Traffic)]
    steps = [step for pair in result.decode for step in pair if step is not None]
    names = [name for name in names if any(getattr(step.traffic, name) for step in steps)]
    rows = [
        [step.model, str(step.batch), *(_megabytes(getattr(step.traffic, name)) for name in names)] for step in steps
    ]
    return _table(["model", "batch", *(name.replace("_", " ") + ", MB" for name in names)], rows)


def _models_table(bundles: Sequence[Bundle]) -> str:
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
    return _table(["millions of parameters", *names, "dtype", "rows"], rows)


def _facts_table(result: BenchResult, options: BenchOptions, facts: Mapping[str, object]) -> str:
    rows = [[str(name), str(value)] for name, value in facts.items()]
    if result.ceilings is not None:
        rows.append(["streaming read, GB/s", f"{result.ceilings.streaming / 1e9:.1f}"])
        rows.append([f"random rows of {result.ceilings.row_bytes} bytes, GB/s", f"{result.ceilings.gather / 1e9:.1f}"])
    return _table(["machine", f"{options.threads} threads"], rows)


def _figure(draw: Callable[[Any], None], caption: str) -> str:
    import matplotlib  # noqa: PLC0415 - an optional package

    matplotlib.use("svg")
    from matplotlib import pyplot  # noqa: PLC0415

    # Text stays text, and no time or random name makes two pages of one result differ.
    with pyplot.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": "umv2", "font.family": "sans-serif", "font.size": 11}
    ):
        figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
        draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    svg = buffer.getvalue()
    return f"<figure>{svg[svg.index('<svg') :]}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _both(result: BenchResult) -> list[tuple[str, str, list[StepResult]]]:
    """(label, colour, steps) of the model and of the baseline."""
    sides = [("model", MODEL_COLOR, [pair[0] for pair in result.decode])]
    baseline = [pair[1] for pair in result.decode if pair[1] is not None]
    return [*sides, ("baseline", BASELINE_COLOR, baseline)] if baseline else sides


def _batch_axis(axes: Any, result: BenchResult) -> None:
    from matplotlib.ticker import NullLocator  # noqa: PLC0415 - an optional package

    batches = [pair[0].batch for pair in result.decode]
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("batch")
    axes.grid(visible=True, axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.legend(frameon=False)


def _log_scale(axes: Any) -> None:
    """Logarithmic, with plain numbers at 1, 2 and 5 of each decade: a plot may span only one."""
    from matplotlib import ticker  # noqa: PLC0415 - an optional package

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _plot_bytes(axes: Any, result: BenchResult) -> None:
    for label, color, steps in _both(result):
        batches = [step.batch for step in steps]
        axes.plot(batches, [step.traffic.core / 1e6 for step in steps], "o-", color=color, label=label)
        axes.plot(batches, [step.expected.core / 1e6 for step in steps], "--", color=color, alpha=0.6)
    _log_scale(axes)
    axes.set_ylabel("MB of a step")
    _batch_axis(axes, result)


def _plot_latency(axes: Any, result: BenchResult) -> None:
    for label, color, steps in _both(result):
        batches = [step.batch for step in steps]
        axes.plot(batches, [step.latency.p50 for step in steps], "o-", color=color, label=f"{label}, whole step")
        cores = [step.core_latency.p50 for step in steps if step.core_latency is not None]
        axes.plot(batches, cores, "s:", color=color, alpha=0.7, label=f"{label}, FFN + memory or experts")
    _log_scale(axes)
    axes.set_ylabel("ms")
    _batch_axis(axes, result)


def _plot_parts(axes: Any, result: BenchResult) -> None:
    names = [field.name for field in fields(Traffic)]
    places, labels, steps = [], [], []
    for i, pair in enumerate(result.decode):
        for side, step in enumerate(pair):
            if step is not None:
                places.append(i + (side - 0.5) * 0.4 if pair[1] is not None else float(i))
                labels.append(str(step.batch))
                steps.append(step)
    bottom = [0.0] * len(steps)
    for name, color in zip(names, PART_COLORS, strict=True):
        heights = [getattr(step.traffic, name) / 1e6 for step in steps]
        if any(heights):
            axes.bar(places, heights, 0.36, bottom=bottom, color=color, label=name.replace("_", " "))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_xticks(range(len(result.decode)), [str(pair[0].batch) for pair in result.decode])
    axes.set_xlabel("batch")
    axes.set_ylabel("MB of a step")
    axes.legend(frameon=False, loc="upper left", ncols=2)


def _plot_density(axes: Any, result: BenchResult) -> None:
    for label, color, steps in _both(result):
        what = "experts" if steps[0].unique_experts else "rows"
        axes.plot(
            [s.batch for s in steps], [s.density for s in steps], "o-", color=color, label=f"{what} of the {label}"
        )
    axes.set_yscale("log")
    axes.set_ylabel("share touched")
    _batch_axis(axes, result)
