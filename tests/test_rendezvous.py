"""Processes that start again find a store without what those before them left."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore
from torch.distributed import DistNetworkError
from torch.distributed.distributed_c10d import Store

from vitcli.rendezvous import fresh_store


def start_all(store: Store, *, ranks: int, but: int | None = None, seconds: float = 60.0) -> list[Store]:
    """Let the ranks join, each in a thread as it would in a process."""
    present = [rank for rank in range(ranks) if rank != but]
    with ThreadPoolExecutor(len(present)) as threads:
        joined = [threads.submit(fresh_store, store, rank=rank, ranks=ranks, timeout_seconds=seconds) for rank in present]
        return [future.result() for future in joined]


def common(stores: list[Store]) -> None:
    """Check that each sees what the others write."""
    for number, store in enumerate(stores):
        store.set(f"from {number}", str(number))
    for store in stores:
        assert [store.get(f"from {number}") for number in range(len(stores))] == [str(n).encode() for n in range(len(stores))]


@pytest.mark.parametrize("ranks", [2, 5])
def test_each_start_has_a_store_of_its_own(ranks: int) -> None:
    whole = HashStore()
    for _ in range(4):
        stores = start_all(whole, ranks=ranks)
        assert not stores[0].check(["from 0"])  # of the start before
        common(stores)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_start_that_somebody_died_in_does_not_mislead_the_next(lost: int) -> None:
    whole = HashStore()
    whole.set_timeout(timedelta(seconds=60))
    with pytest.raises(DistNetworkError, match="timed out waiting for rank"):
        start_all(whole, ranks=3, but=lost, seconds=0.3)
    common(start_all(whole, ranks=3))


def test_rank_0_may_come_last() -> None:
    whole = HashStore()
    start_all(whole, ranks=2)  # leaves answers that are not for the next ones
    others: list[Store] = []
    late = threading.Thread(target=lambda: others.append(fresh_store(whole, rank=1, ranks=2, timeout_seconds=60)))
    late.start()
    late.join(0.3)
    assert not others
    first = fresh_store(whole, rank=0, ranks=2, timeout_seconds=60)
    late.join(60)
    common([first, *others])


def test_a_missing_rank_is_named() -> None:
    with pytest.raises(DistNetworkError, match="waiting for rank 1"):
        fresh_store(HashStore(), rank=0, ranks=3, timeout_seconds=0.1)
