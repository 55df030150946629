"""What a path holds: a checkpoint, a bundle, an engine or an ONNX file. Nothing is executed."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import onnx

from umv2_export.bundle import MANIFEST_FILE, Bundle
from umv2_export.checkpoint import Checkpoint, open_checkpoint
from umv2_export.config import QueryLayout, count_parameters
from umv2_export.engines.manifest import ENGINE_MANIFEST_FILE, describe_engine
from umv2_export.errors import InputRejected
from umv2_export.interface_checks import describe_value

__all__ = ["describe_path"]


def describe_path(
    path: Path,
    *,
    query_layout: QueryLayout | None = None,
    row_topk: int | None = None,
    ignore_fields: Sequence[str] = (),
) -> dict[str, Any]:
    """Kind, configuration, sizes, ops and parameter counts.

    Args:
        path: what to describe.
        query_layout: of a checkpoint that does not tell it.
        row_topk: likewise.
        ignore_fields: of a checkpoint's configuration.

    Raises:
        InputRejected: nothing that this tool knows.
    """
    if not path.exists():
        raise InputRejected("no such file or folder", where=path)
    if not path.is_dir():
        return _describe_graph_file(path)
    if (path / ENGINE_MANIFEST_FILE).is_file():
        return describe_engine(path)
    if (path / MANIFEST_FILE).is_file():
        return _describe_bundle(Bundle(path))
    checkpoint = open_checkpoint(path, query_layout=query_layout, row_topk=row_topk, ignore_fields=ignore_fields)
    return _describe_checkpoint(checkpoint)


def _describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in checkpoint.tensors.values()})
    return {
        "kind": "checkpoint",
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "config": checkpoint.config.as_dict(),
        "parameters": count_parameters(checkpoint.config).as_dict(),
        "tensors": len(checkpoint.tensors),
        "dtypes": dtypes,
        "notes": list(checkpoint.notes),
        "files": {str(file.relative_to(checkpoint.path)): file.stat().st_size for file in checkpoint.files},
        "size": checkpoint.size,
        "tokenizer": checkpoint.tokenizer,
        "tokenizer_files": [file.name for file in checkpoint.tokenizer_files],
        "ignored_fields": list(checkpoint.ignored_fields),
    }


def _describe_bundle(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    graph = bundle.graph()
    return {
        "kind": "bundle",
        "dtype": manifest.dtype,
        "moe_form": manifest.moe_form,
        "key_dtype": manifest.key_dtype,
        "table_dtype": manifest.table_dtype,
        "query_layout": manifest.query_layout,
        "opset": manifest.opset,
        "min_onnxruntime": manifest.min_onnxruntime,
        "target": manifest.target,
        "functions": manifest.functions,
        "tool_version": manifest.tool_version,
        "source": dict(manifest.source),
        "config": bundle.config.as_dict(),
        "parameters": dict(manifest.parameters),
        "bytes": dict(manifest.bytes),
        "tables": dict(manifest.tables),
        "inputs": manifest.inputs,
        "outputs": manifest.outputs,
        "ops": _count_ops(graph.graph.node),
        "files": {name: facts["size"] for name, facts in manifest.files.items()},
        "size": sum(facts["size"] for facts in manifest.files.values()),
    }


def _describe_graph_file(path: Path) -> dict[str, Any]:
    if path.suffix != ".onnx":
        raise InputRejected(
            "this file is neither a checkpoint, a bundle nor an .onnx file",
            where=path,
            fix="checkpoints and bundles are folders: pass the folder",
        )
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's DecodeError lies in a module that differs between versions
        raise InputRejected("not an ONNX file", where=path, why=str(error)) from error
    if not model.graph.node:
        raise InputRejected("the ONNX file holds no graph", where=path)
    return {
        "kind": "onnx",
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": [describe_value(value) for value in model.graph.input],
        "outputs": [describe_value(value) for value in model.graph.output],
        "ops": _count_ops(model.graph.node),
        "functions": [f"{function.domain}::{function.name}" for function in model.functions],
        "initializers": len(model.graph.initializer),
        "external_files": sorted(
            {entry.value for t in model.graph.initializer for entry in t.external_data if entry.key == "location"}
        ),
        "size": path.stat().st_size,
    }


def _count_ops(nodes: Iterable[onnx.NodeProto]) -> dict[str, int]:
    counts = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in nodes)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
