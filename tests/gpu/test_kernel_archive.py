"""The one file of kernels, as the C++ reads it: which kernel serves a node, and files that are damaged."""

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.choose_kernel import choose
from tests.gpu.stand_in_kernels import entry_name, write_stand_in_kernels
from umv2_export.gpu.archive import ELEMENT_TYPES, HEADER, RECORD
from umv2_export.gpu.lookup_variants import LookupVariant, lookup_variant
from umv2_export.gpu.topk_variants import TopkVariant, topk_variant

FP32 = str(ELEMENT_TYPES["float32"])


def lookup(**changes: Any) -> LookupVariant:
    """A variant for rows of 64 + 64."""
    facts = {"shards": 1, "cores": 2, "grouped": False, "pre_value_dim": 64, "value_dim": 64, "gelu": False}
    rows = changes.pop("rows", torch.float32)
    return lookup_variant(torch.float32, rows, **(facts | changes))


def topk(size: int, cores: int = 2) -> TopkVariant:
    return topk_variant(torch.float32, ranks=2, cores=cores, row_topk=size, topk=size)


def lookup_node(
    *, rows: str = "float32", shards: int = 1, cores: int = 2, grouped: int = 0, gelu: int = 0, p: int = 64, v: int = 64
) -> Sequence[object]:
    """Arguments of choose_kernel."""
    return ("lookup", FP32, ELEMENT_TYPES[rows], shards, cores, grouped, int(p > 0), gelu, p, v)


@pytest.mark.parametrize(
    ("device", "chosen"),
    [
        ("8.0", "8.0"),
        ("8.6", "8.6"),
        ("8.8", "8.6"),
        ("8.9", "8.9"),
        ("9.0", "9.0"),
        ("12.0", "12.0"),
        ("12.1", "12.0"),
    ],
)
def test_code_for_the_device_comes_before_code_for_older_devices_of_its_kind(
    device: str, chosen: str, tmp_path: Path
) -> None:
    archive = write_stand_in_kernels(tmp_path / "kernels", [lookup()], ["8.9", "8.0", "12.0", "8.6", "9.0"])
    assert choose(archive, device, *lookup_node()).stdout.strip() == entry_name(lookup(), chosen)


# Code of sm_80 does not run on 9.0, code of sm_89 not on 8.6; 8.7 is no desktop GPU.
@pytest.mark.parametrize(
    ("compiled", "device"), [("10.3", "10.0"), ("8.0", "9.0"), ("8.9", "8.6"), ("9.0", "8.9"), ("8.6", "8.7")]
)
def test_code_of_another_architecture_is_not_taken(compiled: str, device: str, tmp_path: Path) -> None:
    result = choose(write_stand_in_kernels(tmp_path / "kernels", [lookup()], [compiled]), device, *lookup_node())
    assert result.returncode == 1
    assert f"no kernel for compute capability {device}" in result.stdout
    assert f"umv2-export kernels BUNDLE --compute-capability {device}" in result.stdout


OTHERS: dict[str, Sequence[object]] = {
    "fp32 rows of 64 + 64 in 1 shards, 1 cores": lookup_node(cores=1),
    "fp16 rows": lookup_node(rows="float16"),
    "int8 rows": lookup_node(rows="int8"),
    "groups": lookup_node(grouped=1),
    "gelu": lookup_node(gelu=1),
    "rows of 0 + 64": lookup_node(p=0),
    "rows of 64 + 65": lookup_node(v=65),
    "rows of 64 + 72": lookup_node(v=72),
    "in 2 shards": lookup_node(shards=2),
    "3 ranks": ("topk", FP32, 3, 2, 8, 8),
    "top 9 of a side": ("topk", FP32, 2, 2, 9, 8),
    "9 in all": ("topk", FP32, 2, 2, 8, 9),
}


@pytest.mark.parametrize("facts", sorted(OTHERS))
def test_a_node_that_no_kernel_serves_is_named(facts: str, tmp_path: Path) -> None:
    archive = write_stand_in_kernels(tmp_path / "kernels", [lookup(), topk(8)], ["8.9"])
    assert choose(archive, "8.9", *lookup_node()).returncode == 0
    result = choose(archive, "8.9", *OTHERS[facts])
    assert result.returncode == 1
    assert facts in result.stdout


def with_record(archive: bytes, field: int, value: object) -> bytes:
    """The archive with another value in a field of its first record."""
    record = list(RECORD.unpack_from(archive, HEADER.size))
    record[field] = value
    return archive[: HEADER.size] + RECORD.pack(*record) + archive[HEADER.size + RECORD.size :]


THREADS, SHARED, SHARDS, DIVISOR, BLOCK_K, ENTRY, OFFSET, SIZE = 4, 5, 8, 13, 15, 20, 21, 22

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda archive: b"",
    "half a header": lambda archive: archive[: HEADER.size - 1],
    "another magic": lambda archive: b"UMV2KERM" + archive[8:],
    "more records than bytes": lambda archive: archive[:12] + struct.pack("<I", 2**31) + archive[16:],
    "records cut off": lambda archive: archive[: HEADER.size + RECORD.size - 1],
    "code cut off": lambda archive: archive[:-1],
    "offset beyond the end": lambda archive: with_record(archive, OFFSET, len(archive) + 16),
    "code that is not aligned": lambda archive: with_record(archive, OFFSET, 4),
    "offset that wraps around": lambda archive: with_record(archive, OFFSET, 2**64 - 8),
    "size beyond the end": lambda archive: with_record(archive, SIZE, 2**63),
    "entry without an end": lambda archive: with_record(archive, ENTRY, b"x" * 64),
    "no threads": lambda archive: with_record(archive, THREADS, 0),
    "too many threads": lambda archive: with_record(archive, THREADS, 2048),
    "negative shared memory": lambda archive: with_record(archive, SHARED, -1),
    "no shards": lambda archive: with_record(archive, SHARDS, 0),
    "more shards than an export makes": lambda archive: with_record(archive, SHARDS, 1025),
    "division by zero": lambda archive: with_record(archive, DIVISOR, 0),
    "no hits at once": lambda archive: with_record(archive, BLOCK_K, 0),
}


@pytest.mark.parametrize("damage", sorted(DAMAGES))
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    archive = write_stand_in_kernels(tmp_path / "kernels", [lookup()], ["8.9"])
    assert choose(archive, "8.9", *lookup_node()).returncode == 0
    archive.write_bytes(DAMAGES[damage](archive.read_bytes()))
    result = choose(archive, "8.9", *lookup_node())
    assert result.returncode == 1
    assert "is not a whole file of kernels: write it again with `umv2-export kernels`" in result.stdout


def test_a_file_of_another_version_is_named(tmp_path: Path) -> None:
    archive = write_stand_in_kernels(tmp_path / "kernels", [lookup()], ["8.9"])
    archive.write_bytes(archive.read_bytes().replace(struct.pack("<I", 3), struct.pack("<I", 1), 1))
    result = choose(archive, "8.9", *lookup_node())
    assert result.returncode == 1
    assert "has format version 1, this library reads 3" in result.stdout
