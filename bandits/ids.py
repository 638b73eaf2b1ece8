"""Decision ids: UUIDv7 (RFC 9562), which sort by the time they were made."""

from __future__ import annotations

import os


def uuid7(now_ns: int) -> str:
    """An id of 48 bits of milliseconds and 74 random bits."""
    number = int.from_bytes(os.urandom(10), "big")
    high, low = number >> 68 & 0xFFF, number & (1 << 62) - 1
    text = f"{now_ns // 1_000_000 << 80 | 7 << 76 | high << 64 | 2 << 62 | low:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
