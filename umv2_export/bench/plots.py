"""Plots of a benchmark as pictures (SVG) that need no network."""

import io
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from typing import Any

from umv2_export.bench.results import BenchResult, StepResult
from umv2_export.bench.traffic import Traffic
from umv2_export.errors import EnvironmentUnfit

__all__ = ["draw_figures", "require_plots"]

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


def require_plots() -> None:
    """Notice that what draws the report is missing before minutes of measuring.

    Raises:
        EnvironmentUnfit: it is.
    """
    try:
        import jinja2  # noqa: F401, PLC0415 - optional packages
        import matplotlib  # noqa: F401, PLC0415
    except ImportError as error:
        raise EnvironmentUnfit(f"{error.name} is not installed", fix="pip install 'umv2-export[report]'") from error


def draw_figures(result: BenchResult) -> dict[str, str]:
    """Pictures (SVG) by name: bytes, latency, parts and density of the decode steps."""
    plots = {"bytes": _plot_bytes, "latency": _plot_latency, "parts": _plot_parts, "density": _plot_density}
    return {name: _svg(partial(plot, result=result)) for name, plot in plots.items()}


def _svg(draw: Callable[[Any], None]) -> str:
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
    return svg[svg.index("<svg") :]


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
