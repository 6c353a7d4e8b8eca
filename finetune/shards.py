"""safetensors shards written one tensor at a time, so that memory holds a tensor and never a shard.

The format is an 8-byte length, a JSON header and the tensors' bytes in the header's order.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from finetune.base import DTYPE_BYTES, Tensor
from finetune.runfolder import disk_fault

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


class ShardWriter:
    """Write the tensors announced in ``layout``, in that order; leaving without all of them is an error."""

    def __init__(self, path: Path, layout: Mapping[str, Tensor]) -> None:
        self.path, self._due = path, list(layout)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, tensor in layout.items():
            length = math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
            entry = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + length]}
            header[name] = entry
            offset += length
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._write(struct.pack("<Q", len(text)) + text)

    def add(self, name: str, value: torch.Tensor) -> None:
        assert self._due[:1] == [name], f"{name} is not the tensor due"
        del self._due[0]
        data = value.detach().cpu().contiguous()
        self._write(memoryview(data.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise disk_fault(error, self.path) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            if kind is None:
                raise disk_fault(error, self.path) from error
        finally:
            self._file.close()
        assert kind is not None or not self._due, f"{self._due} were not written"
