"""config.yaml as its writer reads it: OmegaConf's rules for scalars and keys, which are not PyYAML's.

`1e-5` is a number, `2024-01-01` a string, and a key that stands twice is an error; all else is YAML 1.1.
Source: omegaconf 2.4; `tests/data/yaml/` holds what it made of every form of scalar.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from umv2_export.errors import InputRejected, shown
from umv2_export.system.links import require_own_links

__all__ = ["CONFIG_FILE", "read_model_fields", "read_yaml"]

CONFIG_FILE = "config.yaml"

# A real config.yaml has 5 KB and 300 nodes; more is an attack or another file.
MAX_CONFIG_BYTES = 2**20
MAX_NODES = 20_000

# A number of base 60 takes time quadratic in its digits.
MAX_NUMBER_LENGTH = 400

_MERGE = "tag:yaml.org,2002:merge"
_TIMESTAMP = "tag:yaml.org,2002:timestamp"
_FLOAT = "tag:yaml.org,2002:float"
_TEXT = "tag:yaml.org,2002:str"

# A value that OmegaConf calls missing, and the start of one that it computes from others.
_MISSING = "???"
_INTERPOLATION = "${"


def read_model_fields(config_file: Path) -> Mapping[str, Any]:
    """The `model:` section; a field that is marked as missing (`???`) is left out.

    Raises:
        InputRejected: the file is missing, too large, not YAML, has no such section, or values that refer to others.
    """
    data = read_yaml(config_file)
    fields = data.get("model") if isinstance(data, dict) else None
    if not isinstance(fields, dict) or not all(isinstance(name, str) for name in fields):
        raise InputRejected("section 'model' is missing or not a mapping", where=config_file)
    for name, value in fields.items():
        if isinstance(value, str) and _INTERPOLATION in value:
            raise InputRejected(
                f"field {shown(name)} is {shown(value)}, which refers to another value",
                where=config_file,
                fix="write the value itself, or take the config.yaml that training wrote beside the weights",
            )
    return {name: value for name, value in fields.items() if value != _MISSING}


def read_yaml(file: Path) -> Any:
    """The document of a YAML file.

    Raises:
        InputRejected: the file is missing, too large, behind another user's link, or not YAML.
    """
    require_own_links(file.parent, file.name)
    if not file.is_file():
        raise InputRejected("the configuration is not a file", where=file)
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise InputRejected(f"the file is larger than {MAX_CONFIG_BYTES} bytes", where=file)
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except Exception as error:  # the constructors of dates and numbers raise whatever they like
        raise InputRejected("not a YAML file", where=file, why=" ".join(str(error).split())[:500]) from error


class _Loader(yaml.SafeLoader):
    """SafeLoader with OmegaConf's floats, dates and duplicate keys, and bounds on what a small file can ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._count(1)
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge keys: a key of the mapping itself wins, then the first of a list, then the later of two merges.

        Each copies what it merges, so a few lines of aliases could ask for billions of items.
        """
        own = set()
        pairs, merged = [], []
        for key, value in node.value:
            if key.tag == _MERGE:
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for source in reversed(sources):
                    if not isinstance(source, yaml.MappingNode):
                        raise yaml.constructor.ConstructorError(
                            None, None, "a merge of what is not a mapping", key.start_mark
                        )
                    self.flatten_mapping(source)
                    self._count(len(source.value))
                    merged += source.value
                continue
            if key.tag == _TEXT:
                if key.value in own:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"found duplicate key {key.value}", key.start_mark
                    )
                own.add(key.value)
            pairs.append((key, value))
        node.value = merged + pairs

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        self._check_length(node)
        return int(super().construct_yaml_int(node))

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        self._check_length(node)
        return float(super().construct_yaml_float(node))

    def _count(self, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise yaml.constructor.ConstructorError(None, None, f"more than {MAX_NODES} nodes", None)

    def _check_length(self, node: yaml.ScalarNode) -> None:
        if len(node.value) > MAX_NUMBER_LENGTH:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of {len(node.value)} characters", node.start_mark
            )


# YAML 1.1 asks for a point in the mantissa and a sign in the exponent; here neither is needed.
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(rf"^[-+]?{_DIGITS}(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor(_FLOAT, _Loader.construct_yaml_float)
