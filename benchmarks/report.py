"""Everything that is measured on a GPU, in one run: `make gpu`, or `python -m benchmarks.report`.

Counts bytes with ncu, times lookups and layers beside their peers, and writes docs/gpu-results.md.
Exit code 1 if a count fails; a target that is missed is reported, not failed.
"""

import datetime
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import click
import torch

from benchmarks import dram
from benchmarks.forms import LOOKUPS, compare_lookup_forms, compare_topk_forms
from benchmarks.peers import Comparison, compare_layers, compare_lookups
from umv2_export import __version__
from umv2_export.errors import CheckFailed, EnvironmentUnfit, Umv2Error
from umv2_export.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]

TABLE_BYTES = 8 * 2**30
WIDTH = 1024

# One token reads 0.1 MB, beside which the code of the kernel and the tables of pages would count.
COUNTED_BATCHES = (8, 64, 512)
MOST_DIFFERENCE = 0.05

TABLE_HEAD = "| what | tokens | ours, us | peer, us | ratio | target |\n|---|---|---|---|---|---|"


@click.command(help=__doc__)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), default=ROOT / "docs" / "gpu-results.md"
)
def main(output: Path) -> None:
    """Run all parts and write the page."""
    try:
        require_gpu()
    except EnvironmentUnfit as error:
        click.echo(f"error: {error.message()}", err=True)
        sys.exit(error.exit_code)
    counts, counted = count_bytes()
    parts = [compare_table(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    parts.append(compare_all_layers())
    parts += [compare_forms(name) for name in LOOKUPS]
    output.write_text(page(card(), counts, [text for text, _ in parts]), encoding="utf-8")
    click.echo(f"wrote {output}")
    sys.exit(0 if counted and all(measured for _, measured in parts) else 1)


def require_gpu() -> None:
    """Notice that there is no GPU before anything runs in the interpreter instead.

    Raises:
        EnvironmentUnfit: PyTorch sees none.
    """
    if not torch.cuda.is_available():
        raise EnvironmentUnfit(
            "PyTorch sees no GPU",
            why=f"torch {torch.__version__}" + ("" if torch.version.cuda else " was built without CUDA"),
            fix="run it on a machine with an NVIDIA GPU and a CUDA build of PyTorch",
        )


def count_bytes() -> tuple[str, bool]:
    """A table of counted bytes, and whether all agree."""
    if shutil.which("ncu") is None:
        return "Not counted: `ncu` is not installed.", True
    lines = ["| tokens | ncu, bytes | counted, bytes | ncu / counted |", "|---|---|---|---|"]
    agree = True
    for tokens in COUNTED_BATCHES:
        try:
            found = dram.count(tokens)
        except CheckFailed as error:
            return f"Not counted: {error.message()}", False
        ratio = found.measured / found.expected
        agree &= abs(ratio - 1) <= MOST_DIFFERENCE
        lines.append(f"| {tokens} | {found.measured} | {found.expected} | {ratio:.3f} |")
    return "\n".join(lines), agree


def compare_table(dtype: torch.dtype) -> tuple[str, bool]:
    """Lookups in a table of this dtype."""
    rows = TABLE_BYTES // (WIDTH * dtype.itemsize)
    return measured(
        lambda: compare_lookups(torch.empty(rows, WIDTH, dtype=dtype, device="cuda").normal_()),
        f"lookups of {dtype}",
    )


def compare_all_layers() -> tuple[str, bool]:
    """Memory layers against experts."""
    return measured(lambda: compare_layers(PRESETS["umv2-227m-1.2b"], PRESETS["olmoe-227m-1.2b"], "cuda"), "layers")


def compare_forms(name: str) -> tuple[str, bool]:
    """Our kernels of a published model against the forms that they took the place of."""
    width = sum(LOOKUPS[name][:2])
    rows = TABLE_BYTES // (width * torch.bfloat16.itemsize)

    def compare() -> Iterator[Comparison]:
        yield from compare_lookup_forms(torch.empty(rows, width, dtype=torch.bfloat16, device="cuda").normal_(), name)
        yield from compare_topk_forms("cuda", name)

    return measured(compare, f"forms of {name}")


def measured(compare: Callable[[], Iterable[Comparison]], what: str) -> tuple[str, bool]:
    """The table of comparisons, and whether it is whole: what fails half way keeps what was measured before."""
    found: list[Comparison] = []
    try:
        found.extend(compare())
    except (RuntimeError, ImportError, Umv2Error) as error:
        return f"{table(found)}\n\nNot measured further, {what}: {error}", False
    finally:
        torch.cuda.empty_cache()
    return table(found), True


def card() -> str:
    """What the measurements were made on."""
    properties = torch.cuda.get_device_properties(0)
    return (
        f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, compute capability "
        f"{properties.major}.{properties.minor}; torch {torch.__version__}, CUDA {torch.version.cuda}"
    )


def page(machine: str, counts: str, tables: Sequence[str]) -> str:
    """The whole page."""
    tables_text = "\n\n".join(tables)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return f"""# What was measured on a GPU

`make gpu` wrote this page on {today}. {machine}; umv2-export {__version__}.

## Bytes that a lookup reads

64 rows a token of 2 KB, at random out of 16 GB; counted: distinct rows, indices, scores.

{counts}

## Times

Each contender's calls are one CUDA graph, on inputs of their own; median of rounds in which the contenders take turns.
A ratio is the time of the peer over ours, or our share of the card's rate of random rows.

{tables_text}
"""


def table(comparisons: Iterable[Comparison]) -> str:
    """Comparisons as a table."""
    lines = [
        f"| {one.measure} | {one.batch} | {one.seconds * 1e6:.1f} | "
        f"{'' if one.peer_seconds is None else f'{one.peer_seconds * 1e6:.1f}'} | {one.ratio:.2f} | "
        f"{'' if one.target is None else one.target} |"
        for one in comparisons
    ]
    return "\n".join([TABLE_HEAD, *lines])


if __name__ == "__main__":
    main()
