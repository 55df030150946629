"""Bundles with one tensor changed, and the hash of its file put right: what an attacker, or a bug, would leave."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from umv2_export.bundle import Bundle

__all__ = ["spoiled"]


def spoiled(bundle: Path, target: Path, tensor: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Bundle:
    """A copy of a bundle in which `change` was applied to one tensor, which is fp32 meanwhile if it is a float."""
    shutil.copytree(bundle, target)
    opened = Bundle(target)
    initializer = next(one for one in opened.graph().graph.initializer if one.name == tensor)
    facts = {entry.key: entry.value for entry in initializer.external_data}
    value = opened.weights()[tensor].clone()
    changed = change(value.float() if value.is_floating_point() else value).to(value.dtype)
    file = target / facts["location"]
    data = bytearray(file.read_bytes())
    start = int(facts.get("offset", 0))
    data[start : start + int(facts["length"])] = changed.contiguous().view(torch.uint8).numpy().tobytes()
    file.write_bytes(data)
    manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][file.name]["sha256"] = hashlib.sha256(data).hexdigest()
    (target / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return Bundle(target)
