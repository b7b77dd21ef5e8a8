"""CRC-32, the checksum of the records of a torch.save file."""

try:  # the same sums, twenty times as fast
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["crc32"]
