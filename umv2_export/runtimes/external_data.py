"""External data of a bundle whose files are links, in a form that ONNX Runtime opens."""

import os
from pathlib import Path

import onnx

from umv2_export.bundle import Bundle
from umv2_export.system.files import inside

__all__ = ["session_source"]


def session_source(bundle: Bundle, graph: bytes | None = None) -> tuple[str | bytes, str]:
    """What ONNX Runtime opens, and the folder in which it then finds the external data.

    ONNX Runtime (1.32) refuses external data whose real path lies outside that folder, as blobs of a download cache do.
    The graph of such a bundle names their real paths instead, below the folder that they share. Every name was checked
    against the manifest, and every link against the policy, when the bundle was opened.

    Args:
        bundle: whose graph is opened.
        graph: a changed form of it; None: the file.
    """
    root = bundle.path.resolve()
    real = {name: inside(bundle.path, name).resolve() for name in bundle.manifest.files}
    if all(path == root / name for name, path in real.items()):
        return str(bundle.model_file) if graph is None else graph, str(root)
    model = bundle.graph() if graph is None else onnx.load_model_from_string(graph)
    folder = Path(os.path.commonpath([path.parent for path in real.values()]))
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = str(real[entry.value].relative_to(folder))
    return model.SerializeToString(), str(folder)
