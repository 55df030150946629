"""The artefact on disk: a folder with the graph, its weights, and a manifest that says what they are."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx.external_data_helper import ExternalDataInfo

from umv2_export.config import ModelConfig
from umv2_export.dtypes import torch_dtype
from umv2_export.errors import CheckFailed, InputRejected
from umv2_export.interface_checks import VALUES, check_graph_values, check_manifest_values
from umv2_export.layout import MOST_SHARDS, FoldedForm, TableLayout
from umv2_export.records.documents import Document
from umv2_export.records.forms import (
    anything,
    flag,
    forms_of,
    integer,
    list_of,
    mapping,
    matching,
    one_of,
    record,
    sha256,
    text,
)
from umv2_export.system.files import file_sha256, inside

__all__ = ["MANIFEST_FILE", "MODEL_FILE", "WEIGHTS_FILE", "Bundle", "Manifest", "TableFile", "rows_file"]

MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "weights.data"

# What hubs and their download tools add to a folder; no command reads it.
DOWNLOADED_FILES = (".gitattributes", "README.md")
DOWNLOAD_CACHE = ".cache/huggingface/"
# A thousand blocks, the most that are read, take 100 MB.
MAX_GRAPH_BYTES = 2**29

DOCUMENT = Document(
    file=MANIFEST_FILE,
    title="the manifest of a bundle",
    folder="bundle",
    writer="umv2-export onnx",
    format="umv2-bundle",
    version=3,
    renewal="export the checkpoint again",
)

_ONNX_DTYPES: Mapping[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT32: torch.int32,
}


def rows_file(number: int, count: int) -> str:
    """Name of the `number`-th (from 1) of `count` shard files."""
    return f"rows-{number:05d}-of-{count:05d}.data"


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself; field by field the content of manifest.json.

    Attributes:
        tool_version: of the tool that wrote it.
        source: format, files and sha256 of the checkpoint.
        config: the model, in the form of `ModelConfig.as_dict`.
        query_layout: how the query projection was read.
        dtype: of dense weights and cache.
        key_dtype: of the keys.
        table_dtype: of the rows.
        moe_form: of experts, `standard` or `contrib`; None in a model without.
        opset: version of the standard ops.
        target: `any`, or `gpu` for a graph that stock ONNX Runtime on a CPU cannot run.
        min_onnxruntime: the oldest release of ONNX Runtime that computes the graph.
        functions: `local` (custom ops with their bodies) or `inlined` (standard ops only).
        tables: per_layer, rows, row_size, rows_per_shard, shards (of one table).
        inputs, outputs: name, dtype and axes of each.
        logits_columns: which size the last axis of the logits has, and its value.
        parameters: total, dense, keys, rows, experts, activated.
        bytes: stored bytes by kind: dense, keys, map, rows, router, experts.
        files: name -> size and sha256, of every file but the manifest.
        cache: `growing`, or `static`: of fixed length and written in place. The file does not name a growing one: tools
            that know no other refuse a bundle with this field.
    """

    tool_version: str
    source: Mapping[str, Any]
    config: Mapping[str, Any]
    query_layout: str
    dtype: str
    key_dtype: str
    table_dtype: str
    moe_form: str | None
    opset: int
    min_onnxruntime: str
    target: str
    functions: str
    tables: Mapping[str, Any]
    inputs: list[Mapping[str, Any]]
    outputs: list[Mapping[str, Any]]
    logits_columns: Mapping[str, Any]
    parameters: Mapping[str, int]
    bytes: Mapping[str, int]
    files: Mapping[str, Mapping[str, Any]]
    cache: str = "growing"

    def write(self, folder: Path) -> None:
        """Write manifest.json; the last file of a bundle."""
        fields = dataclasses.asdict(self)
        if self.cache == "growing":
            del fields["cache"]
        DOCUMENT.write(folder, fields)


_SIZE = integer(0)
_DTYPE = one_of("fp32", "fp16", "bf16")

# The config is a `ModelConfig`'s to read, and nothing is computed from the source.
SCHEMA = forms_of(
    Manifest,
    source=record(
        {
            "format": text,
            "files": mapping(sha256),
            "sha256": sha256,
            "tokenizer": text,
            "ignored_fields": list_of(text),
            "never_added": list_of(text),
        },
        required=(),
    ),
    config=mapping(anything),
    query_layout=one_of("released", "per_rank"),
    dtype=_DTYPE,
    key_dtype=_DTYPE,
    table_dtype=_DTYPE,
    moe_form=one_of(None, "standard", "contrib"),
    opset=integer(1, 1000),
    min_onnxruntime=matching(r"[0-9]{1,4}(\.[0-9]{1,4}){2}", "a release such as 1.20.0"),
    target=one_of("any", "gpu"),
    functions=one_of("local", "inlined"),
    tables=record({"per_layer": flag, "rows": _SIZE, "row_size": _SIZE, "rows_per_shard": integer(1), "shards": _SIZE}),
    inputs=VALUES,
    outputs=VALUES,
    logits_columns=record({"size": integer(1), "is": one_of("embedding_size"), "vocab_size": integer(1)}),
    parameters=record(
        {"total": integer(1), "activated": integer(1)} | dict.fromkeys(("dense", "keys", "rows", "experts"), _SIZE)
    ),
    bytes=record(dict.fromkeys(("dense", "keys", "map", "rows", "router", "experts"), _SIZE)),
    files=mapping(record({"size": _SIZE, "sha256": text})),
    cache=one_of("growing", "static"),
)


@dataclass(frozen=True)
class _Place:
    """Bytes of a file."""

    location: str
    offset: int
    length: int


@dataclass(frozen=True)
class TableFile:
    """A shard of rows.

    Attributes:
        name: of the initializer.
        path, offset: where its bytes begin.
        shape: rows, and elements of a row.
        onnx_type: element type, a number of onnx.TensorProto.
    """

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    onnx_type: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * _ONNX_DTYPES[self.onnx_type].itemsize


class Bundle:
    """A bundle that was opened: manifest read, every file there in its size. Contents are hashed by `verify` only."""

    def __init__(self, path: Path) -> None:
        """Open a bundle.

        Raises:
            InputRejected: it is not a bundle, or a file is missing, cut, or leads out of the folder.
        """
        self.path = path
        self.manifest = Manifest(**DOCUMENT.read(path, SCHEMA, optional=["cache"]))
        self.config = ModelConfig.from_dict(self.manifest.config, where=path / MANIFEST_FILE)
        for name, facts in self.manifest.files.items():
            size = inside(path, name).stat().st_size
            if size != facts["size"]:
                raise InputRejected(f"file {name!r} has {size} bytes, the manifest says {facts['size']}", where=path)
        if MODEL_FILE not in self.manifest.files:
            raise InputRejected(f"the manifest names no {MODEL_FILE}", where=path)
        self._compare_with_config(path / MANIFEST_FILE)

    def _compare_with_config(self, where: Path) -> None:
        """Refuse a manifest that says one thing in its configuration and another beside it."""
        manifest, config, layout = self.manifest, self.config, self.layout
        columns = {"size": config.embedding_size, "is": "embedding_size", "vocab_size": config.vocab_size}
        agreements = {
            "tables": layout.shards <= MOST_SHARDS
            and layout.shards == manifest.tables["shards"]
            and layout.row_size == config.memory.row_size
            and (layout.rows > 0) == (config.memory.layers > 0),
            "moe_form": (manifest.moe_form is None) == (config.experts is None),
            "query_layout": manifest.query_layout == config.memory.query_layout,
            "logits_columns": manifest.logits_columns == columns,
        }
        for field, agrees in agreements.items():
            if not agrees:
                raise InputRejected(f"field {field!r} contradicts the configuration", where=where)
        check_manifest_values(manifest.inputs, manifest.outputs, config, manifest.dtype, where=where)
        # Logits are the first output, ids and mask the first inputs.
        of_one_length = manifest.inputs[2]["axes"] == manifest.outputs[1]["axes"]
        if of_one_length != (manifest.cache == "static"):
            raise InputRejected(f"field 'cache' is {manifest.cache!r}, and its axes are not of one", where=where)

    @property
    def model_file(self) -> Path:
        """The graph."""
        return self.path / MODEL_FILE

    @property
    def layout(self) -> TableLayout:
        """How the rows lie in files."""
        tables = self.manifest.tables
        return TableLayout(
            per_layer=tables["per_layer"],
            rows=tables["rows"],
            row_size=tables["row_size"],
            rows_per_shard=tables["rows_per_shard"],
            dtype=torch_dtype(self.manifest.table_dtype),
        )

    @property
    def form(self) -> FoldedForm:
        """Of the folded model whose weights the bundle holds."""
        stored = self.manifest
        dtypes = (torch_dtype(stored.dtype), torch_dtype(stored.key_dtype))
        return FoldedForm(self.config, self.layout, *dtypes, stored.moe_form or "standard")

    def graph(self) -> onnx.ModelProto:
        """The graph without its external data.

        Raises:
            InputRejected: not an ONNX file, other inputs, outputs or ops than the manifest says, or external data
                outside the bundle's files.
        """
        if self.manifest.files[MODEL_FILE]["size"] > MAX_GRAPH_BYTES:
            raise InputRejected(f"the graph has more than {MAX_GRAPH_BYTES} bytes", where=self.model_file)
        try:
            model = onnx.load(self.model_file, load_external_data=False)
        except Exception as error:  # protobuf's DecodeError lies in a module that differs between versions
            raise InputRejected("not an ONNX file", where=self.model_file, why=str(error)) from error
        if not model.graph.node:
            raise InputRejected("the ONNX file holds no graph", where=self.model_file)
        opsets = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
        if opsets != [self.manifest.opset]:
            raise InputRejected(
                f"the graph has opset {opsets}, the manifest says {self.manifest.opset}", where=self.model_file
            )
        check_graph_values(model.graph, self.manifest.inputs, self.manifest.outputs, where=self.model_file)
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                self._external(tensor)
        return model

    def tables(self) -> Iterator[TableFile]:
        """Every initializer that holds rows, with the place of its bytes."""
        shards = {shard.name for shard in self.form.shards()}
        for tensor in self.graph().graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL and tensor.name in shards:
                place = self._external(tensor)
                file = inside(self.path, place.location)
                yield TableFile(tensor.name, file, place.offset, tuple(tensor.dims), tensor.data_type)

    def weights(self) -> dict[str, torch.Tensor]:
        """Every initializer that lies outside the graph file, mapped."""
        mapped: dict[str, np.ndarray[Any, np.dtype[np.uint8]]] = {}
        tensors = {}
        for tensor in self.graph().graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            info = self._external(tensor)
            if info.location not in mapped:
                # Copy-on-write: torch warns of arrays that may not be written.
                mapped[info.location] = np.memmap(inside(self.path, info.location), dtype=np.uint8, mode="c")
            data = torch.from_numpy(mapped[info.location][info.offset : info.offset + info.length])
            tensors[tensor.name] = data.view(_ONNX_DTYPES[tensor.data_type]).reshape(tuple(tensor.dims))
        return tensors

    def _external(self, tensor: onnx.TensorProto) -> "_Place":
        """Where the data of an initializer lies, checked against the files."""
        try:
            external = ExternalDataInfo(tensor)
        except ValueError as error:
            raise InputRejected(
                f"initializer {tensor.name!r} has malformed external data", where=self.model_file, why=str(error)
            ) from error
        info = _Place(external.location, external.offset or 0, external.length or 0)
        facts = self.manifest.files.get(info.location)
        dtype = _ONNX_DTYPES.get(tensor.data_type)
        if facts is None or dtype is None:
            raise InputRejected(
                f"initializer {tensor.name!r} lies in {info.location!r} as type {tensor.data_type}",
                where=self.model_file,
                why="that file is not in the manifest, or bundles hold no such type",
            )
        needed = math.prod(tensor.dims) * dtype.itemsize
        if (
            min(tensor.dims, default=1) < 1
            or info.length != needed
            or info.offset < 0
            or info.offset % dtype.itemsize
            or (info.offset + needed > facts["size"])
        ):
            raise InputRejected(
                f"initializer {tensor.name!r} needs {needed} bytes, and names {info.length} at {info.offset} of "
                f"{info.location!r}, which has {facts['size']}",
                where=self.model_file,
            )
        return info

    def verify(self) -> None:
        """Compare every file with its hash.

        Raises:
            CheckFailed: a file differs, or is not in the manifest.
            InputRejected: the files are those of the manifest, and the graph is not.
        """
        for name, facts in self.manifest.files.items():
            digest = file_sha256(inside(self.path, name))
            if digest != facts["sha256"]:
                raise CheckFailed(
                    f"file {name!r} has sha256 {digest}, the manifest says {facts['sha256']}",
                    where=self.path,
                    fix="copy the bundle again, or export it again",
                )
        known = {MANIFEST_FILE, *DOWNLOADED_FILES, *self.manifest.files}
        strangers = sorted(str(p.relative_to(self.path)) for p in self.path.rglob("*") if p.is_file())
        for name in strangers:
            if name not in known and not name.startswith(DOWNLOAD_CACHE):
                raise CheckFailed(f"file {name!r} is not in the manifest", where=self.path)
        self.graph()
