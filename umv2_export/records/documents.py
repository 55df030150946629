"""JSON files that this tool writes and reads back, as untrusted as any: manifests, and the index of kernels."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umv2_export.errors import InputRejected, shown
from umv2_export.records.forms import Form, Malformed, record
from umv2_export.records.json_files import read_json

__all__ = ["Document"]


@dataclass(frozen=True)
class Document:
    """A file that names its format and version before its fields.

    Attributes:
        file: its name in the folder that it describes.
        title: what it is.
        folder: what that folder is.
        writer: the command that writes it.
        format, version: as in the file.
        renewal: how to get one of this version.
        indent: of its lines.
    """

    file: str
    title: str
    folder: str
    writer: str
    format: str
    version: int
    renewal: str
    indent: int = 2

    def content(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """All of the document."""
        return {"format": self.format, "format_version": self.version, **fields}

    def write(self, folder: Path, fields: Mapping[str, Any]) -> None:
        """Write it: last, as it says that the folder is whole."""
        text = json.dumps(self.content(fields), indent=self.indent) + "\n"
        (folder / self.file).write_text(text, encoding="utf-8")

    def read(self, folder: Path, forms: Mapping[str, Form[Any]], *, optional: Collection[str] = ()) -> dict[str, Any]:
        """Its fields, of which the optional ones may be missing.

        Raises:
            InputRejected: there is no such file, it is of another format or version, or a field is not of its form.
        """
        file = folder / self.file
        if not file.is_file():
            raise InputRejected(
                f"no {self.folder}: {self.file} is missing",
                where=folder,
                fix=f"pass a folder that `{self.writer}` wrote",
            )
        fields = dict(read_json(file))
        if fields.pop("format", None) != self.format:
            raise InputRejected(f"not {self.title}: its format is not {self.format!r}", where=file)
        version = fields.pop("format_version", None)
        if version != self.version:
            raise InputRejected(
                f"format version {shown(version)}, this tool reads {self.version}",
                where=file,
                fix=f"{self.renewal} with this version",
            )
        try:
            return record(forms, required=[name for name in forms if name not in optional]).read(fields)
        except Malformed as error:
            name = error.path.split(".")[0].split("[")[0]
            if name not in forms:
                why = "what it means, this version ignores"
                raise InputRejected(f"field {error.path!r} is unknown", where=file, why=why) from error
            raise InputRejected(f"field {name!r} is missing or malformed", where=file, why=str(error)) from error
