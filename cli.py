"""The command line: parse, call, print, exit code.

Results go to stdout, progress and errors to stderr. Heavy imports happen inside the command that needs them.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click
from click.core import ParameterSource

from umv2_export import __version__
from umv2_export.errors import CheckFailed, InvalidRequest, Unsupported
from umv2_export.names import (
    BUILD_RUNTIMES,
    DTYPES,
    KEY_DTYPES,
    MOE_FORMS,
    QUERY_LAYOUTS,
    RUNTIMES,
    SCHEMES,
    TABLE_DTYPES,
    TARGETS,
)
from umv2_export.presets import PRESETS
from umv2_export.system.exits import note_json, print_json, run
from umv2_export.system.target import check_path
from umv2_export.terminal import echo

if TYPE_CHECKING:
    from umv2_export.bundle import Bundle
    from umv2_export.checkpoint import Checkpoint
    from umv2_export.checkpoint.own_format import TensorStream
    from umv2_export.config import ModelConfig
    from umv2_export.engines.build import BuildResult
    from umv2_export.onnx.export import ExportResult
    from umv2_export.parity import ParityReport

__all__ = ["cli", "main"]

# Anonymous memory of `convert` and `init`: imports, and a few pieces of a table.
NATIVE_MEMORY = 600 * 10**6

# The most that a number on the command line may be: of threads, which are all started at once; of counted calls, whose
# times are kept; of sequences and tokens, for which memory is taken; of a seed, which generators keep in 64 bits.
MOST_THREADS = 256
MOST_CALLS = 100_000
MOST_TOKENS = 2**20
MOST_SEED = 2**63 - 1

# Of the files of one GPU kernel (0.26 MB in the mean).
KERNEL_BYTES = 300 * 10**3

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def share(text: str) -> float:
    """A share above 0 and at most 1, also in percent."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number) / (100 if percent else 1)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise click.BadParameter(f"{text!r} is no share; write 0.1 or 10%")
    return value


def byte_size(text: str) -> int:
    """A size such as 2GB (10^9 bytes), 512MiB or 1000000."""
    number = text.strip().upper().rstrip("KMGIB ")
    unit = text.strip().upper()[len(number) :].strip()
    try:
        size = int(float(number) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise click.BadParameter(f"{text!r} is no size; write 2GB, 512MiB or 1000000") from None
    if size < 1:
        raise click.BadParameter(f"{text!r} is below one byte; the default is 2GB")
    return size


def tolerance(text: str) -> float:
    """A finite number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise click.BadParameter(f"{text!r} is no tolerance; write a number such as 1e-4")
    return value


def token_ids(text: str) -> tuple[int, ...]:
    """Token ids separated by commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of token ids; write 1,2,3") from None


def sizes(text: str) -> tuple[int, ...]:
    """Different sizes separated by commas, in ascending order."""
    numbers = token_ids(text)
    if min(numbers) < 1 or max(numbers) > MOST_TOKENS:
        raise click.BadParameter(f"{text!r} holds a size that is not from 1 to {MOST_TOKENS}; write 1,8,64")
    return tuple(sorted(set(numbers)))


class UsablePath(click.Path):
    """A path that every library can be handed; see `check_path`."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse the path before anything is done with it."""
        check_path(Path(value))
        return super().convert(value, param, ctx)


FOLDER = UsablePath(path_type=Path)
FILE = UsablePath(path_type=Path, dir_okay=False)
TEXT_FILE = UsablePath(path_type=Path, dir_okay=False, exists=True)

LAYOUTS: Mapping[str, Any] = {"auto": None, "released": "released", "per-rank": "per_rank"}

# Parameters that only some memory layers have a use for.
RETRIEVAL_FLAGS: Mapping[str, Sequence[str]] = {
    "queries": ["query_layout", "row_topk"],
    "query layouts": ["query_layout"],
}


def json_option(command: Command) -> Command:
    """--json."""
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        is_eager=True,
        callback=note_json,
        help="Print one JSON object and nothing else.",
    )(command)


def output_options(command: Command) -> Command:
    """-o, --force, --dry-run."""
    for option in (
        click.option("--dry-run", is_flag=True, help="Run all checks, print estimated memory and disk; write nothing."),
        click.option("--force", is_flag=True, help="Replace an output folder that is not empty."),
        click.option("-o", "--output", required=True, type=FOLDER, help="Output folder."),
    ):
        command = option(command)
    return command


def ignore_field_option(command: Command) -> Command:
    """--ignore-field."""
    return click.option(
        "--ignore-field",
        "ignore_fields",
        multiple=True,
        metavar="NAME",
        help="Leave out a field of the configuration that this tool does not know; the result records it. Repeatable.",
    )(command)


def tokenizer_option(command: Command) -> Command:
    """--tokenizer."""
    return click.option(
        "--tokenizer", type=FOLDER, metavar="FILE", help="tokenizer.json of the model; default: that of the folder."
    )(command)


def row_topk_option(command: Command) -> Command:
    """--row-topk."""
    return click.option(
        "--row-topk",
        type=click.IntRange(1, 2**31 - 1),
        help="Row keys, and column keys, that survive stage 1 of a retrieval; default: as the checkpoint says.",
    )(command)


def reading_options(command: Command) -> Command:
    """What a checkpoint does not tell of itself."""
    for option in (
        ignore_field_option,
        click.option(
            "--query-layout",
            type=click.Choice(QUERY_LAYOUTS),
            default="auto",
            show_default=True,
            help="Which query serves which side and Tucker rank; auto: as the checkpoint's format says.",
        ),
        row_topk_option,
    ):
        command = option(command)
    return command


def checkpoint_options(command: Command) -> Command:
    """How a checkpoint is read."""
    non_finite = click.option("--allow-non-finite", is_flag=True, help="Let NaN and infinity in weights through.")
    return reading_options(non_finite(command))


def shape_option(bound: str) -> Callable[[Command], Command]:
    """--min-shapes, --opt-shapes or --max-shapes."""
    return click.option(
        f"--{bound}-shapes",
        multiple=True,
        metavar="NAME:1x16",
        help=f"The {bound} shape of an input; it holds for every input that shares a size. Repeatable.",
    )


def engine_options(command: Command) -> Command:
    """Which engine the runtimes tensorrt and tensorrt-rtx run."""
    for option in (
        click.option("--plugin-library", type=FILE, help="The plugins, where the engine was built with a library."),
        click.option("--trust-engine", is_flag=True, help="Load the engine though it is not what its manifest says."),
        click.option("--engine", type=FOLDER, help="Engine of BUNDLE, for the runtimes tensorrt and tensorrt-rtx."),
    ):
        command = option(command)
    return command


def refuse_flags(flags: Iterable[str], why: str, *, where: Path | None = None) -> None:
    """Refuse parameters that were given and have nothing to act on: a flag is never ignored without a word."""
    context = click.get_current_context()
    for name in flags:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = next(parameter.opts[0] for parameter in context.command.params if parameter.name == name)
            raise InvalidRequest(f"{option} has no effect here", where=where, why=why, fix=f"leave out {option}")


def refuse_flags_of_absent_parts(config: "ModelConfig", parts: Mapping[str, Sequence[str]], *, where: Path) -> None:
    """Refuse flags for memory layers or experts of a checkpoint that has none.

    Args:
        config: of the checkpoint.
        parts: `queries`, `tables` or `experts`, and the parameters that are about them.
        where: the checkpoint.
    """
    absent = {
        "queries": (config.memory.layers == 0, "the model has no memory layers"),
        "query layouts": (not config.memory.query_per_rank, "its layers have one query, whatever the Tucker rank"),
        "tables": (config.memory.layers == 0, "the model has no memory layers, hence no keys and no tables"),
        "experts": (config.experts is None, "the model has no experts"),
    }
    for part, flags in parts.items():
        is_absent, why = absent[part]
        if is_absent:
            refuse_flags(flags, why, where=where)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="umv2-export")
def cli() -> None:
    """Export UltraMemV2 models to ONNX, and prove that the exported model computes the same."""


@cli.command()
@json_option
def env(as_json: bool) -> None:
    """Show versions, CPU features, GPU and usable runtimes."""
    from umv2_export.environment import describe_environment
    from umv2_export.report import print_description

    facts = describe_environment()
    print_json(facts) if as_json else print_description(facts)


@cli.command()
@click.argument("path", type=FOLDER)
@reading_options
@json_option
def inspect(path: Path, query_layout: str, row_topk: int | None, ignore_fields: Sequence[str], as_json: bool) -> None:
    """Describe a checkpoint, a bundle, an engine or an .onnx file: config, sizes, ops, parameter counts."""
    from umv2_export.config import ModelConfig
    from umv2_export.inspection import describe_path
    from umv2_export.report import print_description

    facts = describe_path(path, query_layout=LAYOUTS[query_layout], row_topk=row_topk, ignore_fields=ignore_fields)
    if facts["kind"] == "checkpoint":
        refuse_flags_of_absent_parts(ModelConfig.from_dict(facts["config"]), RETRIEVAL_FLAGS, where=path)
    else:
        flags = ["query_layout", "row_topk", "ignore_fields"]
        refuse_flags(flags, "it says how a checkpoint is read, and this is none", where=path)
    print_notes(facts.get("notes", []))
    print_json(facts) if as_json else print_description(facts)


@cli.command()
@click.argument("official", type=FOLDER)
@output_options
@tokenizer_option
@checkpoint_options
@json_option
def convert(
    official: Path,
    output: Path,
    tokenizer: Path | None,
    query_layout: str,
    row_topk: int | None,
    allow_non_finite: bool,
    ignore_fields: Sequence[str],
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Turn a checkpoint of the authors, or an OLMoE of Hugging Face, into config.json + safetensors."""
    from umv2_export.checkpoint.own_format import checkpoint_facts, checkpoint_streams
    from umv2_export.records.tokenizer_files import chosen_tokenizer
    from umv2_export.system.target import check_target

    files = None if tokenizer is None else chosen_tokenizer(tokenizer)
    check_target(output, force=force, inputs=[official, *(files or [])])
    checkpoint = open_source(official, query_layout, row_topk, files, ignore_fields, allow_non_finite=allow_non_finite)
    refuse_flags_of_absent_parts(checkpoint.config, RETRIEVAL_FLAGS, where=checkpoint.path)
    write_native(
        checkpoint.config,
        checkpoint_streams(checkpoint),
        output,
        checkpoint.tokenizer_files,
        facts=checkpoint_facts(checkpoint),
        force=force,
        dry_run=dry_run,
        as_json=as_json,
    )


@cli.command()
@click.argument("preset", type=click.Choice(sorted(PRESETS)))
@output_options
@click.option(
    "--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True, help="Same seed, same checkpoint."
)
@click.option(
    "--scheme",
    type=click.Choice(SCHEMES),
    default="released",
    show_default=True,
    help="Scale of the tables: 0.02 as released, or the paper's appendix A.",
)
@json_option
def init(preset: str, output: Path, seed: int, scheme: Any, force: bool, dry_run: bool, as_json: bool) -> None:
    """Write a randomly initialised checkpoint of a published or a tiny size."""
    from umv2_export.model.initialization import random_tensors
    from umv2_export.system.target import check_target

    check_target(output, force=force)
    config = PRESETS[preset]
    if config.memory.layers == 0 and scheme == "released":
        refuse_flags(["scheme"], "the preset has no tables")
    streams = random_tensors(config, seed=seed, scheme=scheme)
    write_native(config, streams, output, [], force=force, dry_run=dry_run, as_json=as_json)


@cli.command()
@click.argument("checkpoint", type=FOLDER)
@output_options
@click.option("--dtype", type=click.Choice(DTYPES), default="fp32", show_default=True, help="Dense weights and cache.")
@click.option(
    "--key-dtype",
    type=click.Choice(KEY_DTYPES),
    default="same",
    show_default=True,
    help="Keys of the memory layers; same: as --dtype. 16 bits halve what a token reads of them.",
)
@click.option(
    "--table-dtype",
    type=click.Choice(TABLE_DTYPES),
    default="same",
    show_default=True,
    help="Values and pre-values; same: as the checkpoint.",
)
@click.option(
    "--moe-form",
    type=click.Choice(MOE_FORMS),
    default="standard",
    show_default=True,
    help="Experts in standard ops, or as com.microsoft::MoE, which ONNX Runtime alone runs.",
)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default="any",
    show_default=True,
    help="gpu: allow what stock ONNX Runtime on a CPU cannot run; such a bundle is not validated here.",
)
@click.option("--opset", type=int, default=18, show_default=True, help="Version of the standard ONNX ops, 18 to 24.")
@click.option(
    "--shard-size",
    type=byte_size,
    metavar="SIZE",
    default="2GB",
    show_default=True,
    help="Most bytes of one table file.",
)
@click.option("--inline-functions", is_flag=True, help="Write standard ops only, for runtimes that know no functions.")
@click.option("--no-validate", is_flag=True, help="Skip the parity check after the export.")
@click.option("--atol", type=tolerance, metavar="FLOAT", help="Absolute tolerance of the validation.")
@click.option("--rtol", type=tolerance, metavar="FLOAT", help="Relative tolerance of the validation.")
@tokenizer_option
@checkpoint_options
@json_option
def onnx(
    checkpoint: Path,
    output: Path,
    dtype: str,
    key_dtype: str,
    table_dtype: str,
    moe_form: str,
    target: str,
    opset: int,
    shard_size: int,
    inline_functions: bool,
    no_validate: bool,
    atol: float | None,
    rtol: float | None,
    tokenizer: Path | None,
    query_layout: str,
    row_topk: int | None,
    allow_non_finite: bool,
    ignore_fields: Sequence[str],
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Export a checkpoint to a bundle: model.onnx, weights, tables in shards, manifest."""
    from umv2_export.onnx.export import ExportOptions, export_bundle, plan_export
    from umv2_export.parity import check_bundle
    from umv2_export.progress import progress_bars
    from umv2_export.records.tokenizer_files import chosen_tokenizer
    from umv2_export.report import print_parity
    from umv2_export.runtimes import require_runtime
    from umv2_export.system.output import require_free_space
    from umv2_export.system.target import check_target

    files = None if tokenizer is None else chosen_tokenizer(tokenizer)
    check_target(output, force=force, inputs=[checkpoint, *(files or [])])
    source = open_source(checkpoint, query_layout, row_topk, files, ignore_fields, allow_non_finite=allow_non_finite)
    parts = {**RETRIEVAL_FLAGS, "tables": ["key_dtype", "table_dtype", "shard_size"], "experts": ["moe_form"]}
    refuse_flags_of_absent_parts(source.config, parts, where=source.path)
    validates = not no_validate and dtype != "bf16"
    if not validates:
        why = (
            "--no-validate skips the check" if no_validate else "a bf16 bundle runs on GPUs, and is not validated here"
        )
        refuse_flags(["atol", "rtol"], why)
    options = ExportOptions(dtype, key_dtype, table_dtype, moe_form, opset, shard_size, inline_functions, target)
    plan = plan_export(source, options)
    if dry_run:
        require_free_space(output, plan.disk_bytes)
        validation = plan.validation_memory_bytes if validates else 0
        print_dry_run(output, max(plan.memory_bytes, validation), plan.disk_bytes, validation, as_json=as_json)
        return
    # Of bf16, which no runtime on a CPU computes, only what is stored is checked.
    runtimes = ["onnxruntime"] if validates else []
    for runtime in runtimes:
        require_runtime(runtime, plan.min_onnxruntime)
    reports: list[ParityReport] = []

    with progress_bars() as track:

        def validate(bundle: "Bundle") -> None:
            report = check_bundle(bundle, source, runtimes, atol=atol, rtol=rtol, track=track)
            reports.append(report)
            if report.stored is None or not report.stored.passed or (runtimes and not report.passed):
                print_parity(report, "the checkpoint", stderr=True)
                raise CheckFailed(
                    "the exported model is not that of the checkpoint, or does not compute the same; no bundle was "
                    "written",
                    where=output,
                    fix="--no-validate writes it anyway, for `umv2-export parity --layerwise` to look into",
                )

        result = export_bundle(
            plan, output, validate=None if no_validate else validate, track=track, replace_target=force
        )
    show_export(result, reports[0] if reports else None, as_json=as_json)


@cli.command()
@click.argument("bundle", type=FOLDER)
@click.option(
    "--reference", type=FOLDER, help="Checkpoint to compare with; default: the bundle's own weights in torch."
)
@click.option(
    "--runtime",
    "runtimes",
    type=click.Choice(RUNTIMES),
    multiple=True,
    default=("onnxruntime",),
    show_default=True,
    help="Repeatable.",
)
@click.option("--layerwise", is_flag=True, help="Compare the residual stream layer by layer.")
@click.option(
    "--atol", type=tolerance, metavar="FLOAT", help="Absolute tolerance; default by dtype, see docs/parity.md."
)
@click.option("--rtol", type=tolerance, metavar="FLOAT", help="Relative tolerance.")
@click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, show_default=True, help="Of the test inputs.")
@click.option(
    "--prompt-file",
    type=TEXT_FILE,
    help="Text whose pieces are the test inputs; default: random tokens.",
)
@ignore_field_option
@row_topk_option
@click.option(
    "--sample",
    type=share,
    metavar="SHARE",
    help="Of the rows of each table, compare so many with the reference's, such as 10%; default: all.",
)
@engine_options
@json_option
def parity(
    bundle: Path,
    reference: Path | None,
    runtimes: Sequence[str],
    layerwise: bool,
    atol: float | None,
    rtol: float | None,
    seed: int,
    prompt_file: Path | None,
    ignore_fields: Sequence[str],
    row_topk: int | None,
    sample: float | None,
    engine: Path | None,
    trust_engine: bool,
    plugin_library: Path | None,
    as_json: bool,
) -> None:
    """Compare a bundle, or an engine of it, in a runtime with the PyTorch reference; exit 1 on a difference."""
    from umv2_export.bundle import Bundle
    from umv2_export.checkpoint import open_checkpoint
    from umv2_export.parity import check_bundle
    from umv2_export.progress import progress_bars
    from umv2_export.report import print_parity
    from umv2_export.runtimes import choose_engine
    from umv2_export.tokenizer import text_ids

    if sample is not None and reference is None:
        raise InvalidRequest(
            "--sample without a checkpoint whose rows could be compared",
            fix="pass --reference CHECKPOINT, or leave out --sample",
        )
    if reference is None:
        refuse_flags(["ignore_fields", "row_topk"], "no checkpoint is read without --reference", where=bundle)
    choice = choose_engine(runtimes, engine, trust=trust_engine, plugin_library=plugin_library)
    opened = Bundle(bundle)
    text = None if prompt_file is None else text_ids(opened, prompt_file.read_bytes(), where=prompt_file)
    checkpoint = None
    if reference is not None:
        try:
            checkpoint = open_checkpoint(reference, row_topk=row_topk, ignore_fields=ignore_fields)
        except Unsupported:
            # Where the checkpoint can be read in two ways, the bundle records which was exported. Only there: a cap
            # that the checkpoint tells is compared with the bundle's.
            recorded = opened.config.memory.row_topk or None
            checkpoint = open_checkpoint(reference, row_topk=row_topk or recorded, ignore_fields=ignore_fields)
        print_notes(checkpoint.notes)
    with progress_bars() as track:
        report = check_bundle(
            opened,
            checkpoint,
            runtimes,
            atol=atol,
            rtol=rtol,
            seed=seed,
            text=text,
            layerwise=layerwise,
            engine=choice,
            sample=sample or 1.0,
            track=track,
        )
    if as_json:
        print_json(report.as_dict())
    else:
        print_parity(report, "the bundle's own weights in torch" if reference is None else f"checkpoint {reference}")
    if not report.passed:
        sys.exit(CheckFailed.exit_code)


@cli.command()
@click.argument("bundle", type=FOLDER)
@click.option("--prompt", help="Text; needs a tokenizer.json in the bundle, or --tokenizer.")
@click.option("--prompt-ids", type=token_ids, metavar="IDS", help="Token ids, such as 1,2,3.")
@click.option("--max-new-tokens", type=click.IntRange(1, MOST_TOKENS), default=32, show_default=True, help="To add.")
@click.option("--ignore-eos", is_flag=True, help="Go on after an end-of-sequence token.")
@tokenizer_option
@click.option("--runtime", type=click.Choice(RUNTIMES), default="onnxruntime", show_default=True)
@click.option("--preload", is_flag=True, help="Read all tables into memory (huge pages) first instead of mapping them.")
@engine_options
@json_option
def generate(
    bundle: Path,
    prompt: str | None,
    prompt_ids: tuple[int, ...] | None,
    max_new_tokens: int,
    ignore_eos: bool,
    tokenizer: Path | None,
    runtime: str,
    preload: bool,
    engine: Path | None,
    trust_engine: bool,
    plugin_library: Path | None,
    as_json: bool,
) -> None:
    """Continue a prompt greedily, through the KV cache."""
    from umv2_export.bundle import Bundle
    from umv2_export.generation import generate_greedily
    from umv2_export.records.tokenizer_files import chosen_tokenizer
    from umv2_export.runtimes import choose_engine, open_runtime
    from umv2_export.tokenizer import bundle_tokenizer, utf8

    if (prompt is None) == (prompt_ids is None):
        raise click.UsageError("pass either --prompt or --prompt-ids")
    choice = choose_engine([runtime], engine, trust=trust_engine, plugin_library=plugin_library)
    opened = Bundle(bundle)
    if opened.layout.rows == 0:
        refuse_flags(["preload"], "the model has no tables", where=bundle)
    words = None
    if prompt is not None or tokenizer is not None:
        words = bundle_tokenizer(opened, [] if tokenizer is None else chosen_tokenizer(tokenizer))
    if prompt is not None:
        if words is None:
            raise no_tokenizer(opened)
        print_notes(words.notes)
        prompt_ids = tuple(words.encode(utf8(prompt, where="--prompt")))
    result = generate_greedily(
        open_runtime(runtime, opened, preload=preload, engine=choice),
        opened.config,
        prompt_ids or (),
        max_new_tokens,
        stop_at_eos=not ignore_eos,
    )
    text = None if words is None else words.decode(result.token_ids)
    if as_json:
        print_json(
            {
                "runtime": runtime,
                "prompt_ids": list(prompt_ids or ()),
                "token_ids": result.token_ids,
                "text": text,
                "prefill_ms": result.prefill_ms,
                "decode_ms": result.decode_ms,
            }
        )
        return
    # Tabs, and the joiners of Persian, Hindi and emoji, are text.
    shown_text = text if text is not None else ",".join(str(token) for token in result.token_ids)
    echo(shown_text, keep="\n\t\u200c\u200d")


@cli.command()
@click.argument("path", type=FOLDER)
@json_option
def verify(path: Path, as_json: bool) -> None:
    """Check sizes and hashes of a bundle or an engine against its manifest."""
    from umv2_export.bundle import Bundle
    from umv2_export.engines.manifest import ENGINE_MANIFEST_FILE, verify_engine

    if (path / ENGINE_MANIFEST_FILE).is_file():
        verify_engine(path)
        kind, files, agreement = "engine", 1, "the engine agrees with its manifest"
    else:
        opened = Bundle(path)
        opened.verify()
        kind, files = "bundle", len(opened.manifest.files)
        agreement = f"{files} files agree with the manifest"
    if as_json:
        print_json({kind: str(path), "passed": True, "files": files})
    else:
        echo(f"{path}: {agreement}")


@cli.command()
@click.argument("bundle", type=FOLDER)
@click.option(
    "--baseline",
    "baselines",
    type=FOLDER,
    multiple=True,
    help="Bundle to compare with. Repeatable, for several exports of one model: the fastest counts at each batch.",
)
@click.option(
    "--runtime",
    type=click.Choice([name for name in RUNTIMES if name != "torch"]),
    help="Of the bundle; default: the fastest that it supports, onnxruntime-native or onnxruntime.",
)
@click.option(
    "--baseline-runtime",
    type=click.Choice([name for name in RUNTIMES if name != "torch"]),
    help="Of the baselines; default: that of --runtime where one supports it, else the fastest that it supports.",
)
@click.option("--batch", "batches", type=sizes, metavar="SIZES", default="1,4,8,16,32,64,256", show_default=True)
@click.option(
    "--past", type=click.IntRange(0, MOST_TOKENS), default=64, show_default=True, help="Cached positions of a sequence."
)
@click.option("--prefill", type=click.IntRange(1, MOST_TOKENS), default=256, show_default=True, help="Prompt tokens.")
@click.option("--iterations", type=click.IntRange(3, MOST_CALLS), default=20, show_default=True, help="Counted calls.")
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), default=2, show_default=True)
@click.option(
    "--text",
    type=TEXT_FILE,
    help="Text whose routing is traced; default: the source of Python's standard library.",
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
    """Time decode steps and prefill, and count the bytes that they move, beside models of experts."""
    from umv2_export.onnx.minimum import BENCH_ONNXRUNTIME
    from umv2_export.runtimes import require_runtime

    require_runtime("onnxruntime", BENCH_ONNXRUNTIME, why="sessions of older releases share no threads")

    from umv2_export.bench.contenders import choose_runtimes
    from umv2_export.bench.page import render_page, require_plots
    from umv2_export.bench.resident import peak_resident
    from umv2_export.bench.steps import BenchOptions, benchmark_steps
    from umv2_export.bench.trace import default_text
    from umv2_export.bundle import Bundle
    from umv2_export.environment import describe_machine
    from umv2_export.progress import progress_bars
    from umv2_export.report import print_bench
    from umv2_export.system.output import write_atomically
    from umv2_export.system.target import check_file_target
    from umv2_export.tokenizer import text_ids

    if baseline_runtime is not None and not baselines:
        raise InvalidRequest("--baseline-runtime without a baseline", fix="pass --baseline BUNDLE, or leave it out")
    if report is None:
        refuse_flags(["force"], "there is no --report to replace")
    else:
        require_plots()
        inputs = [bundle, *baselines, *([] if text is None else [text])]
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
        print_bench(result)


@cli.command()
@click.argument("bundle", type=FOLDER)
@output_options
@click.option("--runtime", type=click.Choice(BUILD_RUNTIMES), required=True, help="What the engine is built for.")
@click.option(
    "--compute-capability",
    metavar="LIST",
    help="Architectures that the engine runs on. tensorrt-rtx: some of 8.0, 8.6, 8.9, 12.0, 12.1; without it, "
    "8.6,8.9,12.0. tensorrt: that of the GPU of this machine, which is the default.",
)
@shape_option("min")
@shape_option("opt")
@shape_option("max")
@click.option("--timing-cache", type=FILE, help="tensorrt: keep what was timed in this file, with a record beside it.")
@click.option("--require-timing-cache", is_flag=True, help="tensorrt: fail if anything is not in the timing cache.")
@click.option(
    "--require-aot/--allow-jit",
    default=True,
    help="tensorrt: whether the engine must hold compiled kernels (default), or may need Python and Triton to run.",
)
@click.option("--plugin-library", type=FILE, help="tensorrt: take the plugins of this shared library.")
@click.option("--version-compatible", is_flag=True, help="tensorrt: let later versions load the engine.")
@click.option("--hardware-compatible", is_flag=True, help="tensorrt: let all GPUs from Ampere on run the engine.")
@click.option("--strip-weights", is_flag=True, help="tensorrt: leave out the weights; `refit` puts them in.")
@json_option
def build(
    bundle: Path,
    output: Path,
    runtime: str,
    require_aot: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    min_shapes: Sequence[str],
    opt_shapes: Sequence[str],
    max_shapes: Sequence[str],
    **options: Any,
) -> None:
    """Compile a bundle to an engine, with profiles for prefill and decode; tensorrt-rtx needs no GPU for it."""
    from umv2_export.bundle import Bundle
    from umv2_export.engines.build import build_engine, plan_build
    from umv2_export.engines.plan import BuildOptions, check_target_and_resources
    from umv2_export.progress import progress_bars
    from umv2_export.system.target import check_target, refuse_overlap

    cache, library = options["timing_cache"], options["plugin_library"]
    check_target(output, force=force, inputs=[bundle, *([] if library is None else [library])])
    for file in () if cache is None else (cache, cache.with_name(cache.name + ".json")):
        inputs = [bundle, *([] if library is None else [library])]
        refuse_overlap(file, inputs, what="the timing cache, or its record,")
    shapes = {"min": min_shapes, "opt": opt_shapes, "max": max_shapes}
    plan = plan_build(runtime, Bundle(bundle), BuildOptions(shapes=shapes, allow_jit=not require_aot, **options))
    if dry_run:
        check_target_and_resources(plan, output)
        print_dry_run(output, plan.memory_bytes, plan.disk_bytes, as_json=as_json)
        return
    with progress_bars() as track:
        result = build_engine(plan, output, replace_target=force, track=track)
    show_build(result, as_json=as_json)


@cli.command()
@click.argument("engine", type=FOLDER)
@click.argument("bundle", type=FOLDER)
@output_options
@click.option("--trust-engine", is_flag=True, help="Load the engine though it is not what its manifest says.")
@click.option("--plugin-library", type=FILE, help="The plugins, where the engine was built with a library of them.")
@json_option
def refit(
    engine: Path,
    bundle: Path,
    output: Path,
    trust_engine: bool,
    plugin_library: Path | None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Put the weights of BUNDLE into ENGINE, which was built with --strip-weights; a new engine is written."""
    from umv2_export.bundle import Bundle
    from umv2_export.engines.refit import plan_refit, refit_engine, require_resources
    from umv2_export.progress import progress_bars
    from umv2_export.report import format_bytes
    from umv2_export.system.target import check_target

    check_target(output, force=force, inputs=[engine, bundle, *([] if plugin_library is None else [plugin_library])])
    plan = plan_refit(engine, Bundle(bundle), trust=trust_engine, plugin_library=plugin_library)
    if dry_run:
        require_resources(plan, output)
        print_dry_run(output, plan.memory_bytes, plan.disk_bytes, as_json=as_json)
        return
    with progress_bars() as track:
        result = refit_engine(plan, output, replace_target=force, track=track)
    manifest = result.engine.manifest
    if as_json:
        print_json({"engine": str(output), **manifest.as_dict(), "seconds": result.seconds})
    else:
        echo(f"{output}: {format_bytes(manifest.size)} with the weights of {bundle}; the engine was not run")


@cli.command()
@click.argument("bundle", type=FOLDER, required=False)
@output_options
@click.option(
    "--compute-capability",
    metavar="LIST",
    default="8.0,8.6,8.9,9.0,10.0,12.0",
    show_default=True,
    help="Architectures to compile for.",
)
@json_option
def kernels(
    bundle: Path | None, output: Path, compute_capability: str, force: bool, dry_run: bool, as_json: bool
) -> None:
    """Compile the GPU kernels ahead of time: PTX, cubin, and an index of how to call them.

    They are those that BUNDLE calls, in every dtype; without it, those of the published 227M/1.2B model.
    """
    from umv2_export.bundle import Bundle
    from umv2_export.compute_capability import parse_compute_capabilities
    from umv2_export.gpu.ahead_of_time import (
        ARCHITECTURES,
        COMPILER_MEMORY,
        build_kernels,
        compiler_processes,
        require_triton,
    )
    from umv2_export.gpu.variants import model_variants
    from umv2_export.progress import progress_bars
    from umv2_export.report import print_kernels, warn_of_spills
    from umv2_export.system.output import require_free_space
    from umv2_export.system.target import check_target

    check_target(output, force=force, inputs=[] if bundle is None else [bundle])
    require_triton()
    architectures = parse_compute_capabilities(compute_capability, ARCHITECTURES, "triton")
    opened = None if bundle is None else Bundle(bundle)
    config, shards = (PRESETS["umv2-227m-1.2b"], 1) if opened is None else (opened.config, opened.layout.shards)
    variants = model_variants(config, shards)
    count = len(variants) * len(architectures)
    size = KERNEL_BYTES * count
    require_free_space(output, size)
    if dry_run:
        print_dry_run(output, COMPILER_MEMORY * compiler_processes(count), size, as_json=as_json)
        return
    with progress_bars() as track:
        compiled = build_kernels(output, variants, architectures, track, replace_target=force)
    warn_of_spills(compiled)
    if as_json:
        print_json({"output": str(output), "kernels": [kernel.as_dict() for kernel in compiled]})
    else:
        print_kernels(output, compiled)


@cli.command("bench-op")
@click.option(
    "--rounds", type=click.IntRange(5, MOST_CALLS), default=40, show_default=True, help="Counted calls of each."
)
@click.option("--threads", type=click.IntRange(1, MOST_THREADS), default=2, show_default=True)
@json_option
def bench_op(rounds: int, threads: int, as_json: bool) -> None:
    """Time the native ops against their peers and the machine's plain gather, on tables of 4 GiB."""
    # Two cores, and threads of two libraries: those of torch would spin while ONNX Runtime computes, and slow torch
    # itself down 30-fold (64 rows of 8 tokens: 12 ms instead of 0.3 ms). OpenMP reads this when it is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

    from umv2_export.onnx.minimum import BENCH_ONNXRUNTIME
    from umv2_export.runtimes import require_runtime

    require_runtime("onnxruntime-native", BENCH_ONNXRUNTIME, why="sessions of older releases share no threads")

    from umv2_export.bench.ops import benchmark_ops
    from umv2_export.report import print_op_results

    results = benchmark_ops(rounds=rounds, threads=threads)
    if as_json:
        print_json({"results": [result.as_dict() for result in results]})
    else:
        print_op_results(results)


def open_source(
    path: Path,
    query_layout: str,
    row_topk: int | None,
    tokenizer: Sequence[Path] | None,
    ignore_fields: Sequence[str],
    *,
    allow_non_finite: bool,
) -> "Checkpoint":
    """The checkpoint that a command compiles, with the tokenizer that goes along; its notes are printed."""
    from umv2_export.checkpoint import open_checkpoint
    from umv2_export.records.tokenizer_files import require_tokenizer_files

    checkpoint = open_checkpoint(
        path,
        query_layout=LAYOUTS[query_layout],
        row_topk=row_topk,
        allow_non_finite=allow_non_finite,
        ignore_fields=ignore_fields,
    )
    if tokenizer is not None:
        checkpoint = dataclasses.replace(checkpoint, tokenizer_files=tokenizer)
    require_tokenizer_files(checkpoint.tokenizer_files)
    print_notes(checkpoint.notes)
    return checkpoint


def no_tokenizer(bundle: "Bundle") -> InvalidRequest:
    """What to pass where a text prompt meets a bundle without a tokenizer."""
    name = bundle.manifest.source.get("tokenizer")
    named = isinstance(name, str)
    return InvalidRequest(
        "the bundle has no tokenizer.json",
        where=bundle.path,
        why=f"the checkpoint had none; its configuration names {name!r}" if named else "the checkpoint had none",
        fix=("pass that file with --tokenizer" if named else "pass one with --tokenizer") + ", or pass --prompt-ids",
    )


def print_notes(notes: Iterable[str]) -> None:
    """What a user should know and did not ask for."""
    for note in notes:
        echo(f"note: {note}", err=True)


def write_native(
    config: "ModelConfig",
    streams: "Sequence[TensorStream]",
    output: Path,
    extra_files: Iterable[Path],
    *,
    facts: Mapping[str, object] | None = None,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a native checkpoint and say what was written."""
    from umv2_export.checkpoint.own_format import save_checkpoint
    from umv2_export.config import count_parameters
    from umv2_export.progress import progress_bars
    from umv2_export.system.output import require_free_space

    size = sum(stream.size for stream in streams)
    require_free_space(output, size)
    if dry_run:
        print_dry_run(output, NATIVE_MEMORY, size, as_json=as_json)
        return
    with progress_bars() as track:
        save_checkpoint(output, config, streams, extra_files, track, facts=facts, replace_target=force)
    parameters = count_parameters(config).as_dict()
    if as_json:
        files = {file.name: file.stat().st_size for file in sorted(output.iterdir())}
        print_json({"checkpoint": str(output), "files": files, "parameters": parameters})
        return
    from umv2_export.report import format_bytes, format_count

    echo(f"{output}: {format_count(parameters['total'])} parameters, {format_bytes(size)}")


def show_export(result: "ExportResult", parity: "ParityReport | None", *, as_json: bool) -> None:
    """Say what an export wrote and what its validation found."""
    from umv2_export.report import print_export

    bundle = result.bundle
    if as_json:
        print_json(
            {
                "bundle": str(bundle.path),
                "files": bundle.manifest.files,
                "parameters": bundle.manifest.parameters,
                "bytes": bundle.manifest.bytes,
                "parity": parity.as_dict() if parity is not None and parity.checks else None,
                "stored": parity.stored.as_dict() if parity is not None and parity.stored is not None else None,
                "seconds": result.seconds,
            }
        )
        return
    print_export(bundle, parity)


def show_build(result: "BuildResult", *, as_json: bool) -> None:
    """Say what a build wrote, what was checked, and what the engine needs where it is loaded."""
    from umv2_export.report import format_bytes

    output, manifest = result.engine.path, result.engine.manifest
    if as_json:
        facts = {"checked_values": result.checked_values, "seconds": result.seconds}
        print_json({"engine": str(output), **manifest.as_dict(), **facts})
        return
    newer = " and newer" if manifest.hardware_compatible else ""
    echo(
        f"{output}: {format_bytes(manifest.size)}, {manifest.runtime} {manifest.runtime_version}, "
        f"compute capabilities {', '.join(manifest.compute_capabilities)}{newer}, "
        f"profiles {', '.join(profile['name'] for profile in manifest.profiles)}, built in {result.seconds:.1f} s"
    )
    echo(
        f"the parsed network has the graph's {len(manifest.inputs)} inputs and {len(manifest.outputs)} outputs, and "
        f"{result.checked_values} float values of it have the graph's dtypes; the engine itself was not run"
    )
    needs = {
        "aot": "its kernels were compiled ahead of time and lie in the engine",
        "jit": "its kernels are compiled where it is loaded: that takes Python, Triton and this package",
        "library": "the plugin library must be loaded before it"
        if manifest.needs_plugin_library
        else "it brings its plugin library",
    }
    if manifest.plugins in needs:
        echo(needs[manifest.plugins])
    if manifest.weights == "stripped":
        echo("it has no weights: `umv2-export refit` puts them in")


def print_dry_run(output: Path, memory: int, disk: int, validation: int | None = None, *, as_json: bool) -> None:
    """What a run would need; `validation` is the memory of the check after it, 0 where that is left out."""
    if as_json:
        checked = {} if validation is None else {"validation_memory_bytes": validation}
        facts = {"dry_run": True, "output": str(output), "peak_memory_bytes": memory, "disk_bytes": disk}
        print_json({**facts, **checked})
        return
    from umv2_export.report import format_bytes

    check = {None: "", 0: ", without the check against PyTorch"}.get(
        validation, f"; the check against PyTorch takes {format_bytes(validation or 0)} of it"
    )
    echo(f"{output}: needs {format_bytes(disk)} of disk and about {format_bytes(memory)} of memory{check}")


def main() -> NoReturn:
    """Run the command line; a user's mistake ends with a message and its exit code, never with a traceback."""
    sys.exit(run(cli))


if __name__ == "__main__":
    main()
