"""Tensors of torch beside the same ones as the scripts find them in files."""

from __future__ import annotations

import torch

from weight_conversion.files import dtypes
from weight_conversion.files.views import StoredTensor


def torch_type(dtype: dtypes.DType) -> torch.dtype:
    """The same type as torch has it."""
    return getattr(torch, dtype.name)


def our_type(dtype: torch.dtype) -> dtypes.DType:
    return dtypes.BY_NAME[str(dtype).removeprefix("torch.")]


def load(stored: StoredTensor) -> torch.Tensor:
    """The tensor that lies where `stored` says."""
    if not stored.nbytes:
        return torch.empty(stored.shape, dtype=torch_type(stored.dtype))
    data = bytearray(stored.path.read_bytes()[stored.offset :])
    span = 1 + sum((size - 1) * stride for size, stride in zip(stored.shape, stored.strides, strict=True))
    return torch.frombuffer(data, dtype=torch_type(stored.dtype), count=span).as_strided(stored.shape, stored.strides)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether type, shape and bits are the same."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    return found.contiguous().flatten().view(torch.uint8).equal(expected.contiguous().flatten().view(torch.uint8))


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random bits, so that every kind of number occurs, NaN among them."""
    count = torch.Size(shape).numel() * dtype.itemsize
    bits = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (bits % 2).view(torch.bool).reshape(shape) if dtype is torch.bool else bits.view(dtype).reshape(shape)
