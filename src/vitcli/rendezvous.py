"""A part of torchrun's key-value store that belongs to this start of the processes alone.

torchrun keeps one store through all restarts (`--max-restarts`), and torch leaves the addresses of processes that are gone in
it: whoever reads one waits for a dead process (pytorch/pytorch, issue 135712). The number of restarts cannot tell them apart,
since every node counts its own. So the ranks agree on a name that nobody has used before.
"""

import time
import uuid

from torch.distributed import DistNetworkError
from torch.distributed.distributed_c10d import PrefixStore, Store

__all__ = ["fresh_store"]

PAUSE_SECONDS = 0.05


def fresh_store(store: Store, *, rank: int, ranks: int, timeout_seconds: float) -> Store:
    """Return an empty store that the ranks of this start share, and nobody else.

    Every rank but 0 says hello under a random name and waits for an answer to it; rank 0 answers every hello, an old one too,
    whose sender is gone. An answer from before cannot be meant for a new name, so it cannot mislead anybody.

    Raises:
        DistNetworkError: a rank did not come within the time.
    """
    deadline = time.monotonic() + timeout_seconds
    mine = uuid.uuid4().hex
    if rank > 0:
        store.set(f"vit/hello/{rank}", mine)
        answer = f"vit/answer/{mine}"
        while not store.check([answer]):
            pause(deadline, "rank 0")
        name = store.get(answer).decode()
        store.set(f"vit/joined/{name}/{rank}", "")
        return PrefixStore(f"vit/{name}", store)
    answered = {""}
    absent = set(range(1, ranks))
    while absent:
        for other in sorted(absent):
            hello = store.get(f"vit/hello/{other}").decode() if store.check([f"vit/hello/{other}"]) else ""
            if hello not in answered:
                answered.add(hello)
                store.set(f"vit/answer/{hello}", mine)
        absent = {other for other in absent if not store.check([f"vit/joined/{mine}/{other}"])}
        if absent:
            pause(deadline, f"rank {min(absent)}")
    return PrefixStore(f"vit/{mine}", store)


def pause(deadline: float, whom: str) -> None:
    """Wait a moment for another rank, but not for ever."""
    if time.monotonic() > deadline:
        raise DistNetworkError(f"timed out waiting for {whom}")
    time.sleep(PAUSE_SECONDS)
