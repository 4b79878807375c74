"""Ranks that are started again meet each other, and not those who died before them."""

import threading
import time
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import Store

from vlm.distributed.meeting import place_to_meet
from vlm.errors import VlmError


def meet(store: Store, size: int, late: tuple[int, ...] = ()) -> list[Store]:
    found: dict[int, Store] = {}

    def come(rank: int) -> None:
        time.sleep(0.1 * (rank in late))
        found[rank] = place_to_meet(store, rank, size, timeout_seconds=20.0)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(size)]


@pytest.mark.parametrize("late", [(0,), (1, 2), (2,)])
def test_ranks_started_again_meet_in_a_place_where_nothing_is_left(late: tuple[int, ...]) -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=20))
    store.set("greeting/2", "of a rank that died before it was answered")
    for _ in range(3):
        places = meet(store, 3, late)
        assert not any(place.check(["address/0"]) for place in places)
        places[0].set("address/0", "mine")
        assert [place.get("address/0") for place in places] == [b"mine"] * 3


def test_the_ranks_that_do_not_come_are_named() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(VlmError, match="rank 1, 2 of 3 did not come within 0.1 s"):
        place_to_meet(store, 0, 3, timeout_seconds=0.1)
    with pytest.raises(VlmError, match="rank 2 of 3: no answer from rank 0"):
        place_to_meet(store, 2, 3, timeout_seconds=0.1)
