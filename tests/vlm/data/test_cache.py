import os
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.data.cache import ByteCache


def test_what_was_written_is_read_in_any_part(tmp_path: Path) -> None:
    cache = ByteCache(tmp_path, max_bytes=10_000)
    cache.write("a", bytes(range(200)))
    assert cache.read("a", 0, 200) == bytes(range(200))
    assert cache.read("a", 50, 3) == b"234"
    assert cache.read("a", 199, 2) is None
    assert cache.read("b", 0, 1) is None
    assert "a" in cache
    assert "b" not in cache
    cache.close()


def test_what_was_used_longest_ago_makes_room(tmp_path: Path) -> None:
    cache = ByteCache(tmp_path, max_bytes=4 * 116)
    for number, name in enumerate("abcd"):
        cache.write(name, bytes(100))
        os.utime(tmp_path / name, (number, number))
    reader = ByteCache(tmp_path, max_bytes=4 * 116)
    assert reader.read("a", 0, 1) == b"\0"  # used again, by somebody else
    cache.write("e", bytes(100))
    assert "a" in cache
    assert "b" not in cache
    assert "e" in cache
    for each in (cache, reader):
        each.close()


def test_an_entry_over_the_bound_is_not_kept(tmp_path: Path) -> None:
    cache = ByteCache(tmp_path, max_bytes=100)
    cache.write("a", bytes(100))
    assert "a" not in cache
    assert cache.read("a", 0, 1) is None


def test_a_damaged_or_torn_entry_is_removed(tmp_path: Path) -> None:
    ByteCache(tmp_path, max_bytes=10_000).write("a", b"good")
    (tmp_path / "a").write_bytes(b"bad!" + (tmp_path / "a").read_bytes()[4:])
    (tmp_path / "b").write_bytes(b"x")
    (tmp_path / "c").write_bytes(b"")
    cache = ByteCache(tmp_path, max_bytes=10_000)
    assert [cache.read(name, 0, 1) for name in "abc"] == [None, None, None]
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


def test_a_lost_counter_is_counted_anew(tmp_path: Path) -> None:
    cache = ByteCache(tmp_path, max_bytes=500)
    for name in "abc":
        cache.write(name, bytes(100))
    (tmp_path / ".lock").unlink()
    for name in "def":
        cache.write(name, bytes(100))
    assert sum(path.stat().st_size for path in tmp_path.iterdir() if path.name != ".lock") <= 500


@settings(deadline=None, max_examples=30)
@given(
    writes=st.lists(
        st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 300)), min_size=1, max_size=40
    )
)
def test_the_bound_holds_after_any_writes(writes: list[tuple[str, int]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        cache = ByteCache(Path(scratch), max_bytes=700)
        for name, size in writes:
            cache.write(name, name.encode() * size)
            entries = [path for path in Path(scratch).iterdir() if not path.name.startswith(".")]
            assert sum(path.stat().st_size for path in entries) <= 700
            assert cache.read(name, 0, size) == name.encode() * size
        cache.close()
