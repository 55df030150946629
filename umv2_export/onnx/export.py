"""A checkpoint becomes a bundle: trace, fold, write, check, and only then take the name of the output."""

import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from umv2_export import __version__
from umv2_export.bundle import MODEL_FILE, WEIGHTS_FILE, Bundle, Manifest, rows_file
from umv2_export.checkpoint import Checkpoint
from umv2_export.config import ModelConfig, Role, checkpoint_tensors, count_parameters
from umv2_export.dtypes import dtype_name, torch_dtype
from umv2_export.errors import InvalidRequest, Unsupported
from umv2_export.interface import graph_inputs, graph_outputs
from umv2_export.layout import FoldedForm, TableLayout
from umv2_export.onnx.fold import KINDS, FoldedTensor, fold_checkpoint
from umv2_export.onnx.minimum import minimum_onnxruntime
from umv2_export.onnx.passes import (
    attach_bodies,
    inline_bodies,
    keep_hidden_alive,
    make_reproducible,
    simplify,
    type_constants,
)
from umv2_export.onnx.signatures import form_signatures
from umv2_export.onnx.trace import trace
from umv2_export.ops.static_attention import HEAD_SIZE_MULTIPLE
from umv2_export.progress import Tracker, silent
from umv2_export.records.tokenizer_files import copy_tokenizer_files
from umv2_export.system.files import file_sha256
from umv2_export.system.output import HashedFile, atomic_directory, require_free_space, tensor_bytes

__all__ = ["MAX_OPSET", "MIN_OPSET", "ExportOptions", "ExportPlan", "ExportResult", "export_bundle", "plan_export"]

# 18: ReduceSum and Split as the bodies write them. 24: the last that the exporter of the pinned torch writes.
MIN_OPSET, MAX_OPSET = 18, 24

DEFAULT_SHARD_BYTES = 2 * 10**9

# Memory pages: what maps the file gets whole pages of one tensor.
ALIGNMENT = 4096

# Anonymous memory of imports and of the traced graph, measured on a 20-layer model; tables are mapped and written in
# pieces, so only the largest dense tensor, copied once, comes on top.
BASE_MEMORY = 800 * 10**6

# Of the check against PyTorch, with what is left of the export. On top of it come dense weights and keys: measured on 8
# blocks of 768, 1.3 times their bytes in fp32, which ONNX Runtime packs once more, and 7.7 times in fp16, of which both
# sides make fp32.
VALIDATION_MEMORY = 800 * 10**6


@dataclass(frozen=True)
class ExportOptions:
    """What the user chooses.

    Attributes:
        dtype: of dense weights and cache: fp32, fp16, or bf16 (GPU only).
        key_dtype: of keys: same (as `dtype`), fp16 or bf16; scores are sums in `dtype`, or in fp32 in the native op.
        table_dtype: of rows: same (as the checkpoint), fp32, fp16 or bf16.
        moe_form: of experts: standard (standard ops, each expert by itself) or contrib (com.microsoft::MoE).
        cache: growing, or static: of fixed length and written in place, by com.microsoft::GroupQueryAttention.
        opset: version of the standard ops.
        shard_bytes: most bytes of one table file.
        inline_functions: write standard ops only.
        target: any, or gpu to allow what stock ONNX Runtime on a CPU cannot run.
    """

    dtype: str = "fp32"
    key_dtype: str = "same"
    table_dtype: str = "same"
    moe_form: str = "standard"
    cache: str = "growing"
    opset: int = MIN_OPSET
    shard_bytes: int = DEFAULT_SHARD_BYTES
    inline_functions: bool = False
    target: str = "any"


@dataclass(frozen=True)
class ExportPlan:
    """An export that passed all checks but those that read the weights.

    Attributes:
        checkpoint, options: as given.
        form: of the folded model.
        tensors: all parameters of the folded model.
    """

    checkpoint: Checkpoint
    options: ExportOptions
    form: FoldedForm
    tensors: list[FoldedTensor]

    @property
    def moe_form(self) -> str | None:
        """Of experts; None in a model without."""
        return self.form.moe_form if self.form.config.experts else None

    @property
    def min_onnxruntime(self) -> str:
        """The oldest release of ONNX Runtime that will compute the graph."""
        return minimum_onnxruntime(self.options.opset, self.options.dtype, self.moe_form, self.options.cache)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the bundle, the graph file (1 KB a node at most) and padding estimated."""
        padding = ALIGNMENT * len(self.tensors)
        graph = 2**20 + 10**5 * self.checkpoint.config.num_layers
        return sum(tensor.size for tensor in self.tensors) + padding + graph

    @property
    def memory_bytes(self) -> int:
        """Estimated peak of anonymous memory of an export without validation."""
        return BASE_MEMORY + 3 * max(self._sizes_in_memory)

    @property
    def validation_memory_bytes(self) -> int:
        """Estimated peak of anonymous memory of the check against PyTorch: tables are mapped on both sides."""
        factor = 2 if self.options.dtype == "fp32" else 8
        return VALIDATION_MEMORY + factor * sum(self._sizes_in_memory)

    @property
    def _sizes_in_memory(self) -> list[int]:
        """Bytes of every tensor but rows, which stay in their files."""
        return [tensor.size for tensor in self.tensors if tensor.spec.role is not Role.ROW]


def plan_export(checkpoint: Checkpoint, options: ExportOptions) -> ExportPlan:
    """Check the options against the checkpoint and lay the bundle out.

    Raises:
        InvalidRequest: opset or shard size out of range.
        Unsupported: a dtype that the target cannot run, or that is not implemented.
    """
    if not MIN_OPSET <= options.opset <= MAX_OPSET:
        raise InvalidRequest(f"opset {options.opset} is out of range: from {MIN_OPSET} to {MAX_OPSET}")
    if options.shard_bytes < 1:
        raise InvalidRequest(f"the shard size must be positive, got {options.shard_bytes}")
    if options.table_dtype == "int8":
        raise Unsupported(
            "table dtype int8 is not exported yet", fix="--table-dtype fp16 or bf16 halve the tables of an fp32 model"
        )
    if options.dtype == "bf16" and options.target != "gpu":
        raise Unsupported(
            "stock ONNX Runtime on a CPU runs no bf16 arithmetic: it would refuse to load the model",
            fix="--dtype fp16, or --dtype fp32 --table-dtype bf16; for GPU runtimes alone: --dtype bf16 --target gpu",
        )
    low = [name for name in ("fp32_norm", "fp32_rope") if not getattr(checkpoint.config, name)]
    if options.dtype != "fp32" and low:
        field = {"fp32_norm": "convert2fp32", "fp32_rope": "rope_full_precision"}[low[0]]
        raise Unsupported(
            f"dtype {options.dtype} of a model with {field}: false",
            why="the authors' code then computes norms or rotary angles in 16 bits, which this export does not follow",
            fix="--dtype fp32, where it makes no difference",
        )
    if checkpoint.config.experts is None and options.moe_form != "standard":
        raise InvalidRequest("the checkpoint has no experts", fix="leave out --moe-form")
    if options.moe_form == "contrib" and options.dtype != "fp32":
        raise Unsupported(
            f"com.microsoft::MoE computes in fp32 only on a CPU, not in {options.dtype}", fix="--moe-form standard"
        )
    if options.moe_form == "contrib" and options.inline_functions:
        raise InvalidRequest("--moe-form contrib is not a standard op", fix="--moe-form standard")
    if options.cache == "static":
        _check_static(checkpoint.config, options)
    dtype = torch_dtype(options.dtype)
    tables = [checkpoint.tensors[s.name].dtype for s in checkpoint_tensors(checkpoint.config) if s.role.is_table]
    stored = functools.reduce(torch.promote_types, tables, tables[0] if tables else dtype)
    table_dtype = stored if options.table_dtype == "same" else torch_dtype(options.table_dtype)
    layout = TableLayout.of(checkpoint.config.memory, table_dtype, options.shard_bytes)
    key_dtype = dtype if options.key_dtype == "same" else torch_dtype(options.key_dtype)
    form = FoldedForm(checkpoint.config, layout, dtype, key_dtype, options.moe_form, options.cache)
    return ExportPlan(checkpoint, options, form, fold_checkpoint(checkpoint, form))


def _check_static(config: ModelConfig, options: ExportOptions) -> None:
    """Refuse what com.microsoft::GroupQueryAttention does not compute.

    Raises:
        InvalidRequest: standard ops alone were asked for.
        Unsupported: a size or dtype that it lacks.
    """
    if options.inline_functions:
        raise InvalidRequest(
            "--cache static is written in com.microsoft::GroupQueryAttention, which is not a standard op",
            fix="leave out --inline-functions, or --cache static",
        )
    growing = "--cache growing"
    if config.head_size % HEAD_SIZE_MULTIPLE:
        raise Unsupported(
            f"a static cache of heads of {config.head_size}",
            why=f"com.microsoft::GroupQueryAttention takes multiples of {HEAD_SIZE_MULTIPLE}",
            fix=growing,
        )
    if options.dtype == "bf16" or options.target == "gpu":
        raise Unsupported(
            "a static cache for a GPU",
            why="the CUDA kernel of com.microsoft::GroupQueryAttention was not tried: masks of padding may be ignored",
            fix=growing,
        )


@dataclass(frozen=True)
class ExportResult:
    """A finished export.

    Attributes:
        bundle: under its final name.
        seconds: wall time by phase: trace; weights (read, folded, hashed, written, on disk);
            graph_and_validation.
    """

    bundle: Bundle
    seconds: Mapping[str, float]


def export_bundle(
    plan: ExportPlan,
    target: Path,
    *,
    validate: Callable[[Bundle], None] | None = None,
    track: Tracker = silent,
    replace_target: bool = False,
) -> ExportResult:
    """Write the bundle of `plan` at `target`, replacing what is there only when all of it is written and checked.

    Args:
        plan: what to write.
        target: the bundle's folder.
        validate: called with the finished bundle under its temporary name; what it raises leaves no bundle.
        track: progress.
        replace_target: replace a folder that is not empty.

    Raises:
        InputRejected: a weight is NaN, infinite or outside the range of its new dtype.
        EnvironmentUnfit: the disk is full.
    """
    require_free_space(target, plan.disk_bytes)
    options = plan.options
    clock = [time.perf_counter()]
    done = track("tracing the graph", None)
    model = trace(plan.form, opset=options.opset)
    simplify(model)
    done(1)
    clock.append(time.perf_counter())
    with atomic_directory(target, replace=replace_target) as folder:
        places = _write_weights(folder, plan.tensors, track)
        clock.append(time.perf_counter())
        hashes = {name: (out.size, out.sha256) for name, out in places.files.items()}
        _refer(model, plan.tensors, places)
        type_constants(model)
        keep_hidden_alive(model)
        signatures = form_signatures(plan.form)
        # com.microsoft::MoE needs no body.
        bodies = signatures if options.moe_form == "standard" else signatures._replace(experts=None)
        attach_bodies(model, bodies, opset=options.opset)
        if options.inline_functions:
            inline_bodies(model)
        make_reproducible(model)
        ir.save(model, folder / MODEL_FILE)
        hashes[MODEL_FILE] = ((folder / MODEL_FILE).stat().st_size, file_sha256(folder / MODEL_FILE))
        for file in copy_tokenizer_files(plan.checkpoint.tokenizer_files, folder):
            hashes[file.name] = (file.stat().st_size, file_sha256(file))
        _manifest(plan, model, hashes, track).write(folder)
        onnx.checker.check_model(folder / MODEL_FILE, full_check=True)
        if validate is not None:
            done = track("checking against PyTorch", None)
            validate(Bundle(folder))
            done(1)
    clock.append(time.perf_counter())
    phases = ("trace", "weights", "graph_and_validation")
    seconds = {name: end - start for name, start, end in zip(phases, clock[:-1], clock[1:], strict=True)}
    return ExportResult(Bundle(target), seconds)


@dataclass(frozen=True)
class _Places:
    """Where tensors were written: file and offset by tensor name, and the closed files by name."""

    tensors: dict[str, tuple[str, int]]
    files: dict[str, HashedFile]


def _write_weights(folder: Path, tensors: list[FoldedTensor], track: Tracker) -> _Places:
    advance = track("writing weights", sum(tensor.size for tensor in tensors))
    places = _Places({}, {})
    dense = [tensor for tensor in tensors if tensor.spec.role is not Role.ROW]
    shards = [tensor for tensor in tensors if tensor.spec.role is Role.ROW]
    groups = [(WEIGHTS_FILE, dense), *((rows_file(i + 1, len(shards)), [shard]) for i, shard in enumerate(shards))]
    for name, members in groups:
        with HashedFile(folder / name) as out:
            for tensor in members:
                places.tensors[tensor.name] = (name, out.align(ALIGNMENT))
                for piece in tensor.pieces():
                    out.write(tensor_bytes(piece))
                    advance(piece.numel() * piece.element_size())
        places.files[name] = out
    return places


def _refer(model: ir.Model, tensors: list[FoldedTensor], places: _Places) -> None:
    """Point every initializer of the traced graph at its bytes."""
    initializers = model.graph.initializers
    names = {tensor.name for tensor in tensors}
    traced = {name for name in initializers if name.startswith("transformer.")}
    if traced != names:
        raise AssertionError(f"graph and fold disagree on {sorted(traced ^ names)}")
    for tensor in tensors:
        value = initializers[tensor.name]
        dtype, shape = value.dtype, value.shape
        if dtype is None or shape is None or shape.numpy() != tensor.shape:
            raise AssertionError(f"{tensor.name}: the graph has shape {shape}, the fold {tensor.shape}")
        location, offset = places.tensors[tensor.name]
        value.const_value = ir.ExternalTensor(location, offset, tensor.size, dtype, shape=shape, name=tensor.name)


def _manifest(plan: ExportPlan, model: ir.Model, hashes: dict[str, tuple[int, str]], track: Tracker) -> Manifest:
    config, options, layout = plan.form.config, plan.options, plan.form.layout
    kinds: dict[str, int] = dict.fromkeys(KINDS, 0)
    for tensor in plan.tensors:
        kinds[tensor.kind] += tensor.size
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    return Manifest(
        tool_version=__version__,
        source=_source(plan.checkpoint, track),
        config=config.as_dict(),
        query_layout=config.memory.query_layout,
        dtype=options.dtype,
        key_dtype=dtype_name(plan.form.key_dtype),
        table_dtype=dtype_name(layout.dtype),
        moe_form=plan.moe_form,
        opset=options.opset,
        min_onnxruntime=plan.min_onnxruntime,
        target=options.target,
        functions="inlined" if options.inline_functions else "local",
        tables={
            "per_layer": layout.per_layer,
            "rows": layout.rows,
            "row_size": layout.row_size,
            "rows_per_shard": layout.rows_per_shard,
            "shards": layout.shards,
        },
        inputs=[_describe(values[value.name]) for value in graph_inputs(config, options.dtype, options.cache)],
        outputs=[_describe(values[value.name]) for value in graph_outputs(config, options.dtype, options.cache)],
        logits_columns={"size": config.embedding_size, "is": "embedding_size", "vocab_size": config.vocab_size},
        parameters=count_parameters(config).as_dict(),
        bytes=kinds,
        files={name: {"size": size, "sha256": digest} for name, (size, digest) in sorted(hashes.items())},
        cache=options.cache,
    )


def _describe(value: ir.Value) -> dict[str, object]:
    if value.shape is None or value.dtype is None:
        raise AssertionError(f"{value.name} has no shape or dtype")
    axes = [axis if isinstance(axis, int) else str(axis) for axis in value.shape.dims]
    return {"name": value.name, "dtype": value.dtype.name.lower(), "axes": axes}


def _source(checkpoint: Checkpoint, track: Tracker) -> dict[str, object]:
    """The checkpoint's format and hashes; no path, so that a bundle is the same wherever it was made."""
    advance = track("hashing the checkpoint", checkpoint.size)
    files = {str(file.relative_to(checkpoint.path)): file_sha256(file, advance) for file in checkpoint.files}
    listing = "".join(f"{digest}  {name}\n" for name, digest in files.items())
    source: dict[str, object] = {
        "format": checkpoint.format,
        "files": files,
        "sha256": hashlib.sha256(listing.encode()).hexdigest(),
    }
    if checkpoint.never_added:
        source["never_added"] = list(checkpoint.never_added)
    if checkpoint.tokenizer is not None:
        source["tokenizer"] = checkpoint.tokenizer
    if checkpoint.ignored_fields:
        source["ignored_fields"] = list(checkpoint.ignored_fields)
    return source
