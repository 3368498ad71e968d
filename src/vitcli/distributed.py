"""Several processes as one: torchrun's set-up, agreement between ranks, and a model that they train together.

Gradients are summed, not averaged: each rank scales its loss by its share of the batch, so a step is that of one process up to
the order of additions, also where shares differ in size or are empty. What the loop decides (stop, skip, end) is agreed over
the CPU group, never through the GPU's stream. States leave and enter as plain whole tensors, whoever holds which part of them.
"""

import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from typing import Any, Literal, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from vitcli.errors import CheckpointError, Interrupted, UserError
from vitcli.rendezvous import fresh_store

__all__ = ["SOLO", "Engine", "Parallel", "Ranks", "States", "choose_parallel", "is_agreed", "process_group"]

Parallel = Literal["single", "ddp", "fsdp"]
Value = TypeVar("Value")

AGREED = "raised by every rank"  # a note on errors that rank 0 reports for all
# How gloo, NCCL and the store say that another process is gone or does not answer.
LOST = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "connection refused",
    "timed out waiting",
    "timeout caused",
    "remote process exited",
)
ROOM = 0.9  # of a device's memory; the rest is for fragments, buckets and the context


# ---------------------------------------------------------------- who takes part


class Store(Protocol):
    """What is used of torch's key-value store, which torchrun keeps and which outlives a process."""

    def set(self, key: str, value: str) -> None:
        """Put a value under a key."""

    def check(self, keys: list[str]) -> bool:
        """Tell at once whether all keys are there."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run. With one, every method returns at once; with several, all must call it."""

    rank: int
    ranks: int
    local_rank: int
    store: Store | None = None
    waits: Iterator[int] = field(default_factory=count, repr=False, compare=False)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Tell whether the flag is set on any rank."""
        if self.ranks == 1:
            return flag
        return self.largest(int(flag)) > 0

    def largest(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        if self.ranks == 1:
            return number
        agreed = torch.tensor(number)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return int(agreed)

    def sum_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks; exact for integers."""
        if self.ranks > 1:
            dist.all_reduce(tensor)

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in their order, on every rank."""
        if self.ranks == 1:
            return [value]
        values: list[Any] = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: Value) -> Value:
        """Return rank 0's value on every rank."""
        if self.ranks == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any(False)

    def wait_for_main(self) -> None:
        """Wait until rank 0 is here, however long it takes, say for a download; should it die, torchrun ends the others."""
        if self.store is None:
            return
        key = f"vit/main/{next(self.waits)}"
        if self.main:
            self.store.set(key, "")
        while not self.store.check([key]):
            time.sleep(0.1)

    def on_main(self, do: Callable[[], Value]) -> Value:
        """Return on every rank what `do` returns on the main one, or raise the UserError it raises, however long that takes."""
        done: list[Value] = []
        problem = problem_of(lambda: done.append(do())) if self.main else None
        self.wait_for_main()
        self.agree(problem)
        return self.broadcast(done[0] if self.main else cast(Value, None))

    def main_first(self, do: Callable[[], Value]) -> Value:
        """Do the same on every rank, on the main one first: it may have to download, decode or index; raise what any meets."""
        done: list[Value] = []
        self.on_main(lambda: done.append(do()))
        self.agree(None if self.main else problem_of(lambda: done.append(do())))
        return done[0]

    def agree(self, problem: UserError | Interrupted | None) -> None:
        """Raise on every rank if there is a problem on any: the first rank's, with its number.

        So that all leave the loop at the same place, and can still save together.
        """
        if not self.any(problem is not None):
            return
        if self.ranks == 1:
            assert problem is not None
            raise problem
        met = self.gather(None if problem is None else (type(problem), problem.args[0], str(problem)))
        rank, (kind, first, text) = next((rank, said) for rank, said in enumerate(met) if said is not None)
        error = kind(first) if issubclass(kind, Interrupted) else kind(f"rank {rank} of {self.ranks}: {text}")
        error.add_note(AGREED)
        raise error


def problem_of(do: Callable[[], object]) -> UserError | None:
    """Return the error that a user can mend, if one is raised."""
    try:
        do()
    except UserError as error:
        return error
    return None


SOLO = Ranks(0, 1, 0)


def is_agreed(error: BaseException) -> bool:
    """Tell whether every rank raises this error, at the same place, so that they can still act together."""
    return AGREED in getattr(error, "__notes__", ())


@contextmanager
def process_group(*, device_type: str, timeout_seconds: float) -> Iterator[Ranks]:
    """Join the processes that torchrun started and leave them at the end; without torchrun, or with one process, SOLO.

    An error that all ranks agreed on ends the others silently: rank 0 reports it.

    Args:
        device_type: cpu, or cuda, where each process takes the GPU of its local rank.
        timeout_seconds: how long one process may keep the others waiting.

    Raises:
        UserError: another process died or does not answer; fewer GPUs than processes; not all of torchrun's variables.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SOLO
        return
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"the environment says WORLD_SIZE={os.environ['WORLD_SIZE']}, several processes, but not {missing[0]}; "
            "start them with torchrun, or unset WORLD_SIZE"
        )
    rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    ranks = Ranks(rank, size, local_rank)
    timeout = timedelta(seconds=timeout_seconds)
    if device_type == "cuda":
        if ranks.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"rank {ranks.rank} of {ranks.ranks}: this machine has {torch.cuda.device_count()} GPUs, and torchrun starts "
                f"at least {ranks.local_rank + 1} processes on it; give --nproc-per-node gpu"
            )
        torch.cuda.set_device(ranks.local_rank)
    store = None
    try:
        shared, _, _ = next(rendezvous("env://", timeout=timeout))
        store = fresh_store(shared, rank=ranks.rank, ranks=ranks.ranks, timeout_seconds=timeout_seconds)
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.ranks, timeout=timeout)
        yield replace(ranks, store=store)
        ranks.barrier()  # whoever leaves early would look like one that died
    except RuntimeError as error:  # torch's errors of communication are of this kind
        if not isinstance(error, dist.DistError) and not any(sign in str(error).lower() for sign in LOST):
            raise
        raise UserError(lost(ranks, store, timeout_seconds, error)) from error
    except (UserError, Interrupted) as error:
        if is_agreed(error) and not ranks.main:
            raise SystemExit(error.exit_code) from None
        raise
    if dist.is_initialized():  # after an error the process ends, and waiting for a dead peer would only hold it up
        dist.destroy_process_group()


def lost(ranks: Ranks, store: Store | None, timeout_seconds: float, error: RuntimeError) -> str:
    """Say in one line which processes went away, as far as the others can tell."""
    silent: list[int] = []
    try:
        if store is not None:
            store.set(f"vit/alive/{ranks.rank}", "")
            time.sleep(1.0)  # the others notice at about the same time
            silent = [rank for rank in range(ranks.ranks) if not store.check([f"vit/alive/{rank}"])]
    except RuntimeError:  # the store went away too
        pass
    named = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}" if silent else "another process"
    slow = any(sign in str(error).lower() for sign in ("timed out", "timeout"))
    what = f"did not answer for {timeout_seconds:g} s" if slow else "ended early; its own message says why"
    return (
        f"rank {ranks.rank} of {ranks.ranks}: {named} {what}; the same command goes on from the last checkpoint "
        "(torchrun --max-restarts does so by itself)"
    )


def choose_parallel(wanted: str, *, ranks: int, state_bytes: int, activation_bytes: int, memory_bytes: int | None) -> Parallel:
    """Return how the ranks share a model: `ddp` if each can hold all of it, else `fsdp`; `single` for one rank.

    Args:
        wanted: auto, ddp or fsdp.
        state_bytes: of weights, gradients, optimiser states and averages.
        activation_bytes: of one micro-batch on one device.
        memory_bytes: of one device; None where that is not known.
    """
    if ranks == 1:
        return "single"
    if wanted == "ddp" or wanted == "fsdp":
        return cast(Parallel, wanted)
    fits = memory_bytes is None or state_bytes + activation_bytes <= ROOM * memory_bytes
    return "ddp" if fits else "fsdp"


# ---------------------------------------------------------------- a model that ranks train together


@dataclass(frozen=True)
class States:
    """All that training has changed, as plain whole tensors in the layout of one process."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any]  # torch's, by index
    ema: dict[str, Tensor] | None


class Engine:
    """A model on its device, ready for an optimiser: in one process, whole in several (DDP), or in parts (FSDP2).

    A step is any number of passes and one `reduce`; afterwards every rank has the sum of all gradients:

        for chunk in chunks:
            with engine.accumulating():
                (loss_of(engine(chunk)) * share).backward()
        engine.reduce()

    Build it after parameters are frozen and before the optimiser is: FSDP replaces parameters by shards (DTensors).

    Args:
        model: on the CPU; moved.
        blocks: its repeated parts: what FSDP gathers at a time, and what is computed again in the backward pass.
        input_shape: of one example.
        beside: (1, ...) what else the model is given with one, such as masks.
        compute_dtype: of autocast, under which the caller runs the model; FSDP sends weights in it and sums in float32.
        activation_checkpointing: keep only each block's input.
        compile: by torch.compile; with FSDP block by block.

    Attributes:
        model: what optimiser, state dict and evaluation see, with the names it had.
        in_step: whether a pass is a meeting of all ranks (FSDP): all must make the same number, `idle` ones included, and
            a pass that failed, say for want of memory, cannot be made again.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        blocks: Sequence[nn.Module],
        input_shape: tuple[int, ...],
        beside: Tensor | None = None,
        parallel: Parallel,
        ranks: Ranks,
        device: torch.device,
        compute_dtype: torch.dtype = torch.float32,
        activation_checkpointing: bool = False,
        compile: bool = False,
    ) -> None:
        assert (parallel == "single") == (ranks.ranks == 1)
        self.model = model
        self.ranks = ranks
        self.device = device
        self.in_step = parallel == "fsdp"
        self.input_shape = input_shape
        self.beside = () if beside is None else (beside.to(device),)
        self.compute_dtype = compute_dtype
        self.reduced = False
        self.replica: DistributedDataParallel | None = None
        if activation_checkpointing:
            for block in blocks:
                recompute_in_backward(block)
        if parallel == "fsdp":
            if compile:
                for block in blocks:
                    block.compile()
            shard(model, blocks, ranks=ranks.ranks, device=device, compute_dtype=compute_dtype)
        else:
            model.to(device)
        self.forward: nn.Module = model
        if parallel == "ddp":
            with warnings.catch_warnings():
                # the keyword's successor is younger than the oldest torch that will do
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                # said once, of the class token's gradient from a single image: its sides of length 1 have no order
                warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
                # no buffer changes in training; views save a copy of every gradient
                self.replica = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
                self.replica.register_comm_hook(None, sum_bucket)
                self.forward = self.replica
                # DDP lays its buckets out anew after its first backward pass, and the order of additions with them: a run that
                # is resumed must have that behind it as well. The second pass is where it does so.
                self.empty_pass()
                self.empty_pass()
            model.zero_grad(set_to_none=True)
        if compile and parallel != "fsdp":
            self.forward = cast(nn.Module, torch.compile(self.forward))

    def __call__(self, *inputs: Tensor, **options: bool) -> Tensor:
        """Return the model's output for training."""
        output: Tensor = self.forward(*inputs, **options)
        return output

    @contextmanager
    def accumulating(self, *, overlap: bool = False) -> Iterator[None]:
        """Run one forward and backward pass inside; its gradients are added to those before.

        Args:
            overlap: for the last pass of a step: sum over ranks while it runs. The other ranks wait in it, so a pass that
                may run out of memory must not.
        """
        held_back = nullcontext() if self.replica is None or overlap else self.replica.no_sync()
        with held_back:
            yield
        self.reduced = overlap

    def idle(self) -> None:
        """Take part in a pass without having examples for it."""
        if self.in_step:
            self.empty_pass()

    def reduce(self) -> None:
        """Sum the gradients of all ranks, unless that happened in the last pass."""
        if self.replica is not None and not self.reduced:
            self.empty_pass()  # DDP sums at the end of a backward pass: one that adds nothing
        self.reduced = False

    def empty_pass(self) -> None:
        """Run one example with weight 0 forward and backward: every parameter's gradient is there, and unchanged."""
        inputs = torch.zeros(1, *self.input_shape, device=self.device)
        model = self.model if self.replica is None else self.replica
        with torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32):
            output: Tensor = model(inputs, *self.beside)
        (0.0 * output.float().sum()).backward()

    @contextmanager
    def averaged(self, ema: Mapping[str, Tensor] | None) -> Iterator[nn.Module]:
        """Give the model with other weights, averages of its own; afterwards it has its own again, bit for bit."""
        if ema is None:
            yield self.model
            return
        kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        try:
            put_in(self.model, ema)
            yield self.model
        finally:
            put_in(self.model, kept)

    # -------------------------------------------------- states

    def states(self, optimizer: torch.optim.Optimizer, ema: Mapping[str, Tensor] | None) -> States | None:
        """Return on rank 0 what a checkpoint holds, and None elsewhere; with FSDP all ranks must call it.

        Whole tensors are the live ones, on the device: copy them before the next step. Parts are put together on the CPU, one
        tensor at a time.
        """
        if not self.in_step and not self.ranks.main:
            return None

        def gather(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: self.whole(tensor) for name, tensor in state.items()}

        model = gather(self.model.state_dict())
        averages = None if ema is None else gather(ema)
        by_index = optimizer.state_dict()
        by_index["state"] = {
            index: {key: self.whole(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
            for index, entry in by_index["state"].items()
        }
        return States(model, by_index, averages) if self.ranks.main else None

    def weights(self, ema: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Return on rank 0 whole weights, the averages where there are any, and None elsewhere; with FSDP all must call it."""
        if not self.in_step and not self.ranks.main:
            return None
        found = {name: self.whole(tensor) for name, tensor in (self.model.state_dict() if ema is None else ema).items()}
        return found if self.ranks.main else None

    def load_states(self, saved: States | None, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor] | None) -> None:
        """Fill model, optimiser and averages from rank 0's states; whoever saved them, in however many parts.

        The optimiser may keep tensors of `saved` as its own.

        Raises:
            CheckpointError: tensors of other names or shapes.
        """
        own = self.model.state_dict()
        problem = None
        if saved is not None:
            problem = difference(saved.model, own) or (difference(saved.ema, ema) if saved.ema and ema else None)
        self.ranks.agree(CheckpointError(f"checkpoint: not of this model: {problem}") if problem else None)
        frame = self.ranks.broadcast(None if saved is None or self.ranks.ranks == 1 else without_tensors(saved.optimizer))
        has_ema = self.ranks.broadcast(saved is not None and saved.ema is not None)
        with torch.no_grad():
            for name, target in own.items():
                target.copy_(self.spread(None if saved is None else saved.model[name], target))
            if ema is not None and has_ema:
                for name, target in ema.items():
                    target.copy_(self.spread(None if saved is None or saved.ema is None else saved.ema[name], target))
        if frame is None:
            assert saved is not None
            load_optimizer(optimizer, saved.optimizer)
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        indices = [index for group in frame["param_groups"] for index in group["params"]]
        for index, parameter in zip(indices, parameters):
            for key, value in frame["state"].get(index, {}).items():
                if isinstance(value, Absent):
                    source = None if saved is None else saved.optimizer["state"][index][key]
                    frame["state"][index][key] = self.spread(source, parameter, value.dtype)
        load_optimizer(optimizer, frame)

    def whole(self, tensor: Tensor) -> Tensor:
        """Return a tensor of which each rank may hold a part; on rank 0 alone where it does."""
        full = getattr(tensor, "full_tensor", None)  # a DTensor's; importing the class costs a second that DDP need not pay
        if full is None:  # beside gathered ones it is copied like them: all of a state is the caller's, or none
            return tensor.detach().to("cpu", copy=True) if self.in_step else tensor
        gathered: Tensor = full()
        return gathered.cpu() if self.ranks.main else gathered.new_empty(0)

    def spread(self, source: Tensor | None, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return rank 0's whole tensor as `like` lies: all of it, or this rank's part of it."""
        if self.ranks.ranks == 1:
            assert source is not None
            return source
        if source is None:
            filled = torch.empty(like.shape, dtype=dtype or like.dtype, device=self.device)
        else:
            filled = source.detach().to(self.device, dtype or like.dtype).contiguous()
        if hasattr(like, "full_tensor"):
            from torch.distributed.tensor import DTensor, distribute_tensor

            assert isinstance(like, DTensor)
            return distribute_tensor(filled, like.device_mesh, like.placements)
        dist.broadcast(filled, src=0)
        return filled


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state, but not the implementation it was computed with: shards have no fused SGD."""
    own: list[dict[str, Any]] = [
        {key: group[key] for key in ("fused", "foreach") if key in group} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, implementation in zip(optimizer.param_groups, own):
        group.update(implementation)


@dataclass(frozen=True)
class Absent:
    """Stands for a tensor that is sent apart."""

    dtype: torch.dtype


def without_tensors(optimizer_state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimiser's state with its large tensors left out; step counters stay."""
    entries = {
        index: {key: Absent(value.dtype) if isinstance(value, Tensor) and value.ndim else value for key, value in entry.items()}
        for index, entry in optimizer_state["state"].items()
    }
    return {**optimizer_state, "state": entries}


def difference(saved: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """Say how two states differ in names or shapes, if they do."""
    for name in sorted(saved.keys() | own.keys()):
        there, here = (tuple(state[name].shape) if name in state else "none" for state in (saved, own))
        if there != here:
            return f"{name} is {there} there and {here} here"
    return None


@torch.no_grad()
def put_in(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy values into a model's tensors; asking for its state first makes FSDP drop what it gathered of the old ones."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(state[name])


def recompute_in_backward(block: nn.Module) -> None:
    """Keep a block's input alone and compute the rest again in the backward pass, with the same dropout."""
    forward = block.forward

    def forward_again(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **options)
        return checkpoint(forward, *inputs, use_reentrant=False, **options)

    block.forward = forward_again


def sum_bucket(
    state: None,
    bucket: dist.GradBucket,  # type: ignore[name-defined]  # DDP insists on this annotation, which torch hides from mypy
) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients over the ranks; DDP's own hook would average."""
    del state
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return cast("torch.futures.Future[Tensor]", work.get_future().then(lambda future: future.value()[0]))


def shard(
    model: nn.Module, blocks: Sequence[nn.Module], *, ranks: int, device: torch.device, compute_dtype: torch.dtype
) -> None:
    """Split parameters, gradients and optimiser states over the ranks with FSDP2; each block moves to the device in its turn.

    On a GPU blocks are sent in the compute type, which halves the traffic of bf16; activations between them, and what lies
    outside (embeddings, last norm, head), stay float32 as under autocast in one process. Gradients are summed in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device.type, (ranks,))
    # a CPU's layer norm takes no bf16 weights with float32 inputs, and autocast does not help it as it does on a GPU
    low = None if compute_dtype == torch.float32 or device.type == "cpu" else compute_dtype
    for part, dtype in [*((block, low) for block in blocks), (model, None)]:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(part, mesh=mesh, mp_policy=policy)
        assert isinstance(part, FSDPModule)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
