"""Checkpoints written beside the training, which waits for the copy of its tensors alone.

One thread writes one checkpoint at a time, then deletes those that need not stay. What goes wrong in it is raised at the next
call; what it has to say is said there too.
"""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitcli.checkpoint import save_checkpoint
from vitcli.retention import Keep, prune

__all__ = ["AsyncSaver"]


class AsyncSaver:
    """Saves the checkpoints of one run, the directory's only writer.

    Args:
        checkpoints_dir: made if missing.
        keep: which checkpoints stay.
        say: is told what is worth knowing, in the thread that calls a method.
    """

    def __init__(self, checkpoints_dir: Path, *, keep: Keep, say: Callable[[str], object]) -> None:
        self.checkpoints_dir = checkpoints_dir
        self.keep = keep
        self.say = say
        self.told: set[Path] = set()
        self.writing: Future[list[str]] | None = None
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="vit-save")

    def save(
        self,
        *,
        step: int,
        model_state: Mapping[str, Tensor],
        ema_state: Mapping[str, Tensor] | None,
        optimizer_state: Mapping[str, Any],
        manifest: Mapping[str, Any],
        extra: Mapping[str, Any] | None = None,
        scores: Mapping[int, float] | None = None,
        also_keep: Collection[int] = (),
        owned: bool = False,
    ) -> None:
        """Copy a state to the CPU and begin to write it as `save_checkpoint` does; first wait for the one before.

        Args:
            scores: of the steps evaluated so far, for the best checkpoints.
            also_keep: steps that no rule needs to keep.
            owned: nobody else will change these tensors, so they need no copy.

        Raises:
            CheckpointError: the one before could not be saved.
        """
        self.wait()
        states = {"model_state": model_state, "ema_state": ema_state, "optimizer_state": optimizer_state}
        copies = states if owned else copy_to_cpu(states)
        # JSON values change too, and are small
        about = {"manifest": dict(manifest), "extra": dict(extra or {})}
        rule = {"scores": dict(scores or {}), "also": frozenset(also_keep)}
        self.writing = self.thread.submit(self.write, step, {**copies, **about}, rule)

    def write(self, step: int, content: Mapping[str, Any], rule: Mapping[str, Any]) -> list[str]:
        """Write and prune, in the thread; return what there is to say."""
        save_checkpoint(self.checkpoints_dir, step=step, **content)
        pruned = prune(self.checkpoints_dir, keep=self.keep, step=step, **rule)
        in_use = [path for path in pruned.in_use if path not in self.told]
        self.told.update(in_use)
        return [f"{path} is being read: kept until nobody does" for path in in_use] + pruned.failed

    def check(self) -> None:
        """Raise CheckpointError if what was begun has failed by now; does not wait."""
        if self.writing is not None and self.writing.done():
            self.wait()

    def wait(self) -> None:
        """Return once what was begun is on the disk.

        An exception that arrives meanwhile, say of Ctrl-C, stops the waiting and not the writing.

        Raises:
            CheckpointError: it could not be saved.
        """
        if self.writing is None:
            return
        wait([self.writing])
        writing, self.writing = self.writing, None
        for text in writing.result():
            self.say(text)

    def close(self) -> None:
        """Wait like `wait` and end the thread; a second call does nothing."""
        try:
            self.wait()
        finally:
            self.thread.shutdown(wait=False)  # it ends by itself, after what is begun

    def __enter__(self) -> "AsyncSaver":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def copy_to_cpu(value: Any) -> Any:
    """Return a copy of nested containers of tensors that shares no memory with it, all tensors on the CPU."""
    moved: list[torch.device] = []
    copied = copy_nested(value, moved)
    for device in set(moved):  # copies from a GPU run beside each other; the training goes on after the last
        torch.cuda.synchronize(device)
    return copied


def copy_nested(value: Any, moved: list[torch.device]) -> Any:
    """Copy as `copy_to_cpu` does, without waiting for the devices added to `moved`."""
    if isinstance(value, Tensor):
        if not value.is_cuda:
            return value.detach().to("cpu", copy=True)
        moved.append(value.device)
        pinned = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)  # torch keeps it for the next time
        return pinned.copy_(value.detach(), non_blocking=True)
    if isinstance(value, Mapping):
        return {key: copy_nested(item, moved) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([copy_nested(item, moved) for item in value])
    return value
