"""Types of tensor elements, by every name that files have for them. Knowing a type needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """An element type. There is one object of each: they compare by identity.

    `name` is the one of torch (and of config.json), `safetensors` that of its headers; a pickle of torch.save calls it
    `torch.name`, and its storages `torch.storage`.
    """

    name: str
    itemsize: int
    safetensors: str
    storage: str | None

    def __repr__(self) -> str:
        return f"torch.{self.name}"


FLOAT64 = DType("float64", 8, "F64", "DoubleStorage")
FLOAT32 = DType("float32", 4, "F32", "FloatStorage")
FLOAT16 = DType("float16", 2, "F16", "HalfStorage")
BFLOAT16 = DType("bfloat16", 2, "BF16", "BFloat16Storage")
DTYPES = (
    FLOAT64,
    FLOAT32,
    FLOAT16,
    BFLOAT16,
    DType("int64", 8, "I64", "LongStorage"),
    DType("int32", 4, "I32", "IntStorage"),
    DType("int16", 2, "I16", "ShortStorage"),
    DType("int8", 1, "I8", "CharStorage"),
    DType("uint8", 1, "U8", "ByteStorage"),
    DType("bool", 1, "BOOL", "BoolStorage"),
    DType("float8_e4m3fn", 1, "F8_E4M3", None),
    DType("float8_e5m2", 1, "F8_E5M2", None),
)
BY_NAME = {dtype.name: dtype for dtype in DTYPES}
