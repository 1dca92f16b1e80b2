"""The contract of a place, as tests that every kind of place inherits."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensortape.stores.places import Place

MANY = 3 * 2**20 + 17  # bytes that no place fetches at once
CONTENT = np.random.default_rng(7).bytes(MANY)


class Unreadable:
    """A buffer that fails when it is about to be written."""

    def __len__(self) -> int:
        return 1

    @property
    def data(self) -> memoryview:
        raise OSError("no more space")


class PlaceContract:
    """Objects appear whole or not at all, and are never changed in place. Beside a subclass stands a fixture `place`, empty."""

    def test_what_is_created_can_be_read(self, place: Place) -> None:
        place.create("a/b/c", [b"one", np.array([2, 3], "<u2"), b"", b"four"])
        place.settle()
        assert place.read("a/b/c") == b"one\x02\x00\x03\x00four"
        assert place.size("a/b/c") == 11
        for stays in (True, False):
            assert place.view("a/b/c", expected=11, stays=stays).content.tobytes() == place.read("a/b/c")

    def test_create_never_replaces(self, place: Place) -> None:
        place.create("a", [b"first"])
        with pytest.raises(FileExistsError, match="a"):
            place.create("a", [b"second"])
        assert (place.read("a"), place.names("")) == (b"first", ["a"])

    def test_create_does_not_care_who_wrote_what_is_there(self, place: Place) -> None:
        place.replace("a", [b"first"])
        with pytest.raises(FileExistsError):
            place.create("a", [b"second"])

    def test_of_several_who_create_an_object_at_once_one_succeeds(self, place: Place) -> None:
        together = threading.Barrier(6)

        def create(number: int) -> bool:
            together.wait()
            try:
                place.create("commits/1.json", [b"%d" % number])
            except FileExistsError:
                return False
            return True

        with ThreadPoolExecutor(6) as pool:
            succeeded = [number for number, created in enumerate(pool.map(create, range(6))) if created]
        assert [place.read("commits/1.json")] == [b"%d" % number for number in succeeded]

    def test_replace_writes_new_objects_and_puts_others_in_place_of_old_ones(self, place: Place) -> None:
        place.replace("a", [b"first, and longer"])
        place.replace("a", [b"second"])
        assert (place.read("a"), place.names("")) == (b"second", ["a"])

    def test_an_object_may_be_empty(self, place: Place) -> None:
        place.create("a", [])
        place.replace("b", [b"", np.empty((0, 3))])
        for name in ("a", "b"):
            assert (place.read(name), place.size(name)) == (b"", 0)
            assert len(place.view(name, expected=0, stays=True).content) == 0

    @pytest.mark.parametrize("method", ["create", "replace"])
    def test_a_failure_while_writing_leaves_nothing_behind(self, place: Place, method: str) -> None:
        """Neither the object nor its unfinished file; an object that was there stays as it was."""
        place.create("there", [b"old"])
        for name in ("new", "there"):
            with pytest.raises(OSError, match="no more space"):
                getattr(place, method)(name, [b"x", Unreadable()])
        assert (place.names(""), place.read("there")) == (["there"], b"old")

    def test_a_large_object_of_many_buffers_is_written_whole(self, place: Place) -> None:
        """More bytes than a place sends at once, in more buffers than a system call takes, of any size."""
        rng = np.random.default_rng(3)
        buffers = [rng.bytes(int(size)) for size in rng.integers(0, 9000, 5000)]
        place.replace("a", buffers)
        assert place.size("a") > 16 << 20
        assert place.read("a") == b"".join(buffers)

    def test_an_object_is_there_until_it_is_removed(self, place: Place) -> None:
        place.create("a/b", [b"x"])
        place.create("a/c", [b"y"])
        assert place.exists("a/b")
        for _ in range(2):  # the second time there is nothing to do
            place.remove("a/b")
            place.settle()
            assert not place.exists("a/b")
        assert (place.names("a"), place.unfinished("a")) == (["c"], [])

    def test_there_is_room_or_no_end(self, place: Place) -> None:
        free = place.free()
        assert free is None or free > 0

    def test_a_copy_by_pickle_is_the_same_place(self, place: Place) -> None:
        """In a process that was spawned."""
        place.create("a", [b"x"])
        copy = pickle.loads(pickle.dumps(place))
        assert (copy.root, copy.read("a")) == (place.root, b"x")

    def test_names_are_sorted_and_without_unfinished_ones(self, place: Place) -> None:
        for name in ("f/b", "f/a", "f/10", "f/2", "f/deeper/x", "f/deeper/y", "f/.c.0.d41d8cd9.partial", "fg/z"):
            place.replace(name, [b""])
        assert place.names("f") == ["10", "2", "a", "b", "deeper"]
        assert place.names("") == ["f", "fg"]

    def test_all_of_many_names_are_found(self, place: Place) -> None:
        """More than a service gives in one answer."""
        place.each(lambda number: place.replace(f"f/{number:02d}/x" if number % 2 else f"f/{number:02d}", [b""]), range(30))
        assert place.names("f") == [f"{number:02d}" for number in range(30)]

    def test_there_are_no_names_where_there_is_no_folder(self, place: Place) -> None:
        assert place.names("") == []
        place.create("file", [b""])
        assert place.names("nowhere") == place.names("file") == []

    def test_any_name_on_disk_is_a_name(self, place: Place) -> None:
        names = ["c.0.0", "h~20~3a~c3~a9", "x" * 200, "_-.~~0a"]
        for name in names:
            place.replace(f"parts/{name}/zarr.json", [name.encode()])
        assert place.names("parts") == sorted(names)
        assert [place.read(f"parts/{name}/zarr.json") for name in names] == [name.encode() for name in names]

    @pytest.mark.parametrize("expected", [0, MANY])
    def test_an_object_that_is_not_there_is_file_not_found(self, place: Place, expected: int) -> None:
        place.create("folder/x", [b""])
        for name in ("nowhere", "folder/nothing"):
            for look in (place.read, place.size, lambda path: place.view(path, expected=expected, stays=True)):
                with pytest.raises(FileNotFoundError, match=name):
                    look(name)

    def test_a_view_holds_the_spans_that_were_loaded(self, place: Place) -> None:
        place.replace("a", [CONTENT])
        view = place.view("a", expected=MANY, stays=True)
        spans = [(MANY - 3, MANY), (1_000_000, 1_600_001), (0, 1), (1_500_000, 1_700_000), (1, 4)]
        view.load(iter(spans))
        assert len(view.content) == MANY
        assert all(view.content[start:stop].tobytes() == CONTENT[start:stop] for start, stop in spans)
        assert not view.content.flags.writeable

    def test_a_view_is_loaded_bit_by_bit(self, place: Place) -> None:
        place.replace("a", [CONTENT])

        @settings(deadline=None, max_examples=15)
        @given(st.lists(st.tuples(st.integers(0, MANY - 1), st.integers(1, MANY)), min_size=1, max_size=4))
        def check(drawn: list[tuple[int, int]]) -> None:
            view = place.view("a", expected=MANY, stays=True)
            spans = [(start, min(start + count, MANY)) for start, count in drawn]
            for span in spans:
                view.load([span])
            assert all(view.content[start:stop].tobytes() == CONTENT[start:stop] for start, stop in spans)

        check()

    def test_a_view_keeps_what_it_has_loaded_when_the_object_is_replaced(self, place: Place) -> None:
        place.replace("a", [CONTENT])
        view = place.view("a", expected=MANY, stays=True)
        view.load([(0, MANY)])
        place.replace("a", [b"another"])
        assert view.content.tobytes() == CONTENT

    def test_each_gives_the_results_in_order(self, place: Place) -> None:
        for number in range(20):
            place.replace(f"n/{number}", [b"%d" % number])
        assert place.each(lambda number: int(place.read(f"n/{number}")), range(20)) == list(range(20))
        with pytest.raises(FileNotFoundError):
            place.each(place.read, ["n/1", "n/nothing", "n/2"])
