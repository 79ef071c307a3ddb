"""Runs cover what there is to read, and never end beyond the cache; there are few lengths."""

import pytest

from hypervl_jax import lengths


@pytest.mark.parametrize(("n", "room"), [(0, 20), (1, 20), (4, 20), (5, 20), (9, 20), (19, 20), (20, 20), (17, 17)])
def test_chunks_cover_every_position_once(n, room):
    end = 0
    for start, length in lengths.chunks(n, [8, 4], room):
        assert start == end
        assert length in (8, 4, 1)
        end = start + length
        assert end <= room
    assert n <= end < n + 8
    assert list(lengths.chunks(5, [4, 8], 20)) == [(0, 8)]
    assert list(lengths.chunks(10, [4, 8], 20)) == [(0, 8), (8, 4)]
    assert list(lengths.chunks(10, [4, 8], 11)) == [(0, 8), (8, 1), (9, 1)]


def test_a_cache_of_that_length_always_has_room_for_the_last_run():
    """Only runs of a prefill program, never single steps, where as much is left as `ask.lay_out` leaves."""
    for n in (1, 31, 32, 33, 96, 97, 127, 128, 500, 1111):
        for start in (0, n // 2):
            room = lengths.room(n + min(lengths.PREFILL))
            runs = list(lengths.chunks(n - start, lengths.PREFILL, room - start))
            assert all(length in lengths.PREFILL for _, length in runs)


def test_rooms_are_few_and_at_most_twice_as_long_as_needed():
    rooms = {lengths.room(n) for n in range(1, 5000)}
    assert rooms == {128, 256, 512, 1024, 2048, 4096, 8192}
    assert all(n <= lengths.room(n) < 2 * max(n, 128) for n in range(1, 5000))
