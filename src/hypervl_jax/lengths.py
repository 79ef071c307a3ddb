"""Lists of lengths. A compiled program takes one length, so what is read is cut into runs of these lengths and what is
kept has room for one of them; few lengths are few programs. Without JAX: the host of exported files shares it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

PREFILL = (32, 64, 128, 256, 512)  # tokens that one run of a prefill program reads
ROOM = 128  # positions of the smallest cache; larger ones are twice as long, and twice as long again


def chunks(n: int, buckets: Sequence[int], room: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the runs that cover n positions: the smallest bucket that holds the rest, else the largest.

    A run never ends beyond `room`, the cache (a write there would be moved back over earlier positions); where no
    bucket fits any more, positions come one by one.
    """
    start = 0
    while start < n:
        fitting = [b for b in sorted(buckets) if start + b <= room] or [1]
        length = next((b for b in fitting if b >= n - start), fitting[-1])
        yield start, length
        start += length


def room(n: int) -> int:
    """The length of the smallest cache that holds n positions."""
    length = ROOM
    while length < n:
        length *= 2
    return length
