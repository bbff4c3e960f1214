"""One file: tensors by safetensors, and a JSON description in its metadata."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pyroflows.errors import SavedFileError
from pyroflows.flows.description import DAMAGED, Record, field

#: Raised when an older pyroflows could no longer read what a newer one writes.
FORMAT_VERSION = 1
# One entry: safetensors writes several in no particular order, and equal content is equal bytes.
_KEY = "pyroflows"
Path = str | os.PathLike[str]


def read_file(path: Path) -> tuple[Record, dict[str, Tensor]]:
    """Description and tensors; of a foreign file no tensor is read."""
    try:
        with torch.device("cpu"), safe_open(os.fspath(path), framework="pt") as file:
            record = _parse(file.metadata())
            return record, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise SavedFileError(
            f"expected a safetensors file written by pyroflows.save, got one that is truncated or "
            f"of another kind ({error}). Save it again, or restore a copy."
        ) from error


def _parse(metadata: Mapping[str, str] | None) -> Record:
    if _KEY not in (metadata or {}):
        raise SavedFileError(
            "expected a file written by pyroflows.save, got a safetensors file without its "
            "description. Read foreign weights with safetensors.torch.load_file."
        )
    try:
        record = json.loads((metadata or {})[_KEY])
    except ValueError as error:
        raise SavedFileError(f"the description is not JSON ({error}). {DAMAGED}") from error
    version = field(record, "format_version", int)
    if version < 1:
        raise SavedFileError(f"format version {version}: expected 1 or more. {DAMAGED}")
    if version > FORMAT_VERSION:
        raise SavedFileError(
            f"format version {version}, written by pyroflows {record.get('pyroflows_version')}; "
            f"this pyroflows reads versions up to {FORMAT_VERSION}. Update pyroflows."
        )
    return dict(record)


def write_file(path: Path, record: Record, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors and their description; all or nothing."""
    metadata = {_KEY: json.dumps(record, allow_nan=False, separators=(",", ":"))}
    _write(path, safetensors.torch.save(dict(tensors), metadata))


def _write(path: Path, content: bytes) -> None:
    """All or nothing, with the permissions that a new file gets here."""
    target = os.path.realpath(path)  # a link keeps pointing to the file
    temporary = f"{target}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
