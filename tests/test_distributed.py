"""Two processes (gloo) against one: the same losses, states and evaluation, and one end when either meets a problem.

Run as a script, this file is what each of two processes does: all `check_*` functions, one after the other, then a whole run.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor

from vitcli.checkpoint import load_checkpoint
from vitcli.config import DataConfig, OptimConfig
from vitcli.data.loader import eval_batches
from vitcli.data.sources import open_source
from vitcli.data.transforms import EvalTransform
from vitcli.distributed import SOLO, Engine, Parallel, Ranks, States, choose_parallel, is_agreed, lost, process_group
from vitcli.errors import CheckpointError, DataError, Interrupted, UserError
from vitcli.evaluate import EvalResult, evaluate
from vitcli.forward import answers
from vitcli.models.vit import VisionTransformer
from vitcli.optim import build_optimizer, clip_gradients, ema_start, ema_update, weight_norm
from vitcli.predictions import Predictions, collect_predictions
from vitcli.train import pretrain

CPU = torch.device("cpu")
SIZE = (16, 16)
BATCH, MICRO = 7, 3  # micro-batches of 3, 3 and 1: of the last, rank 0's share is empty


def build(*, classes: int = 5) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(image_size=SIZE, patch_size=4, width=32, depth=2, mlp_dim=64, num_heads=2, num_classes=classes)
    torch.nn.init.normal_(model.head.weight, std=0.05)  # a head of zeros would stop the gradient of everything before it
    return model


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 3, *SIZE, generator=generator), torch.randint(5, (BATCH,), generator=generator)


@dataclass
class Trained:
    engine: Engine
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor]
    losses: list[float]
    norms: list[float]

    def states(self) -> States | None:
        """Return copies."""
        states = self.engine.states(self.optimizer, self.ema)
        return None if states is None else copy_of(states)


def copy_of(states: States) -> States:
    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().clone()
        if isinstance(value, dict):
            return {key: copied(part) for key, part in value.items()}
        return [copied(part) for part in value] if isinstance(value, list) else value

    return States(copied(states.model), copied(states.optimizer), copied(states.ema))


def train(
    ranks: Ranks,
    parallel: Parallel,
    *,
    steps: int = 4,
    start: int = 0,
    saved: States | None = None,
    optimizer: str = "sgd",
    dtype: torch.dtype = torch.float32,
    overlap: bool = False,
    recompute: bool = False,
) -> Trained:
    """Train a few steps as the training loop does."""
    model = build()
    engine = Engine(
        model,
        blocks=list(model.blocks),
        input_shape=(3, *SIZE),
        parallel=parallel,
        ranks=ranks,
        device=CPU,
        compute_dtype=dtype,
        activation_checkpointing=recompute,
    )
    lr = 0.02 if optimizer == "sgd" else 1e-3
    update = build_optimizer(OptimConfig.model_validate({"name": optimizer, "lr": lr, "weight_decay": 0.1}), model)
    trained = Trained(engine, update, ema_start(model), [], [])
    if start:
        engine.load_states(None if saved is None else copy_of(saved), update, trained.ema)
    for step in range(start, start + steps):
        images, labels = batch_of(step)
        update.zero_grad(set_to_none=True)
        total = torch.zeros((), dtype=torch.float64)
        for first in range(0, BATCH, MICRO):
            size = min(MICRO, BATCH - first)
            mine = slice(first + size * ranks.rank // ranks.ranks, first + size * (ranks.rank + 1) // ranks.ranks)
            x, y = images[mine], labels[mine]
            if len(x) == 0:
                engine.idle()
                continue
            with engine.accumulating(overlap=overlap and first + size == BATCH):
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    logits = engine(x)
                loss = F.cross_entropy(logits.float(), y)
                (loss * len(x) / BATCH).backward()
            total += loss.detach().double() * len(x) / BATCH
        engine.reduce()
        ranks.sum_(total)
        trained.losses.append(float(total))
        trained.norms.append(float(clip_gradients(model.parameters(), 0.5)))
        update.step()
        ema_update(trained.ema, model, 0.9)
    return trained


def assert_near(found: list[float], expected: list[float], *, rel: float, of: object) -> None:
    assert found == pytest.approx(expected, rel=rel), f"{of}: {found} is not {expected}"


def assert_close(found: States, expected: States, *, atol: float = 1e-6) -> None:
    """Compare everything a checkpoint holds, the optimiser's layout to the letter."""
    assert found.model.keys() == expected.model.keys()
    assert found.ema is not None and expected.ema is not None
    for name in expected.model:
        torch.testing.assert_close(found.model[name], expected.model[name], atol=atol, rtol=0)
        torch.testing.assert_close(found.ema[name], expected.ema[name], atol=atol, rtol=0)
    assert settings_of(found) == settings_of(expected)
    assert found.optimizer["state"].keys() == expected.optimizer["state"].keys()
    for index, entry in expected.optimizer["state"].items():
        assert found.optimizer["state"][index].keys() == entry.keys()
        for key, value in entry.items():
            torch.testing.assert_close(found.optimizer["state"][index][key], value, atol=atol, rtol=0)


def settings_of(states: States) -> list[dict[str, Any]]:
    """Return the optimiser's groups but for the implementation: shards have no fused SGD."""
    return [{key: value for key, value in group.items() if key != "fused"} for group in states.optimizer["param_groups"]]


# ---------------------------------------------------------------- what two processes do


def check_agreement(ranks: Ranks) -> None:
    assert (ranks.ranks, ranks.main) == (2, ranks.rank == 0)
    assert ranks.any(ranks.rank == 1)
    assert not ranks.any(False)
    assert ranks.largest(10 - ranks.rank) == 10
    counts = torch.tensor([2**60, ranks.rank])  # a float64 would round it
    ranks.sum_(counts)
    assert counts.tolist() == [2**61, 1]
    assert ranks.gather(f"of {ranks.rank}") == ["of 0", "of 1"]
    assert ranks.broadcast({"from": ranks.rank}) == {"from": 0}
    for _ in range(2):
        if ranks.main:
            time.sleep(0.2)
        began = time.monotonic()
        ranks.wait_for_main()
        if ranks.main:
            assert time.monotonic() - began < 0.1


def check_problems_are_shared(ranks: Ranks) -> None:
    ranks.agree(None)
    with pytest.raises(DataError, match="rank 1 of 2: photos/7.png: damaged") as met:
        ranks.agree(DataError("photos/7.png: damaged") if ranks.rank == 1 else None)
    assert is_agreed(met.value)
    with pytest.raises(Interrupted) as stopped:
        ranks.agree(Interrupted(signal.SIGTERM) if ranks.rank == 0 else None)
    assert stopped.value.exit_code == 143


def check_training(ranks: Ranks) -> None:
    alone = train(SOLO, "single")
    expected = alone.states()
    assert expected is not None
    settings: list[tuple[Parallel, dict[str, Any]]] = [
        ("ddp", {}),
        ("ddp", {"overlap": True}),
        ("fsdp", {}),
        ("fsdp", {"recompute": True}),
    ]
    for parallel, options in settings:
        together = train(ranks, parallel, **options)
        assert_near(together.losses, alone.losses, rel=1e-5, of=(parallel, options))
        assert_near(together.norms, alone.norms, rel=1e-5, of=(parallel, options))
        norms = [float(weight_norm(trained.engine.model.parameters())) for trained in (together, alone)]
        assert_near(norms[:1], norms[1:], rel=1e-6, of=(parallel, options))
        found = together.states()
        assert (found is None) == (not ranks.main)
        if found is not None:
            assert_close(found, expected)


def check_optimizers(ranks: Ranks) -> None:
    for name in ("adamw", "adam", "muon"):
        alone = train(SOLO, "single", optimizer=name, steps=2)
        for parallel in ("ddp", "fsdp"):
            together = train(ranks, parallel, optimizer=name, steps=2)  # type: ignore[arg-type]
            assert_near(together.losses, alone.losses, rel=1e-5, of=(name, parallel))


def check_precision(ranks: Ranks) -> None:
    alone = train(SOLO, "single", dtype=torch.bfloat16)
    for parallel in ("ddp", "fsdp"):
        together = train(ranks, parallel, dtype=torch.bfloat16)  # type: ignore[arg-type]
        assert_near(together.losses, alone.losses, rel=0.02, of=parallel)
        weights = [parameter.dtype for parameter in together.engine.model.parameters()]
        assert set(weights) == {torch.float32}


def check_states(ranks: Ranks) -> None:
    """What any number of processes saved, any number loads, bit for bit, and goes on from."""
    for name in ("sgd", "adamw", "muon"):
        alone = train(SOLO, "single", optimizer=name, steps=2)
        first = alone.states()
        expected = train(SOLO, "single", optimizer=name, steps=2, start=2, saved=first)
        kinds: list[Parallel] = ["ddp", "fsdp"]
        for saver in kinds:
            saved = train(ranks, saver, optimizer=name, steps=0, start=2, saved=first if ranks.main else None).states()
            if saved is not None:
                assert first is not None
                assert_close(saved, first, atol=0)
        for loader in kinds:
            found = train(ranks, loader, optimizer=name, steps=2, start=2, saved=first if ranks.main else None)
            assert_near(found.losses, expected.losses, rel=1e-4, of=(name, loader))


def check_full_states_are_torchs(ranks: Ranks) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    trained = train(ranks, "fsdp", steps=1)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    expected = get_model_state_dict(trained.engine.model, options=options)
    states = trained.states()
    if states is not None:
        assert expected.keys() == states.model.keys()
        assert all(torch.equal(expected[name], tensor) for name, tensor in states.model.items())
    own = sum(parameter.to_local().numel() for parameter in trained.engine.model.parameters())  # type: ignore[attr-defined]
    assert own < 0.6 * sum(parameter.numel() for parameter in build().parameters())


def check_a_foreign_checkpoint(ranks: Ranks) -> None:
    model = build()
    engine = Engine(model, blocks=list(model.blocks), input_shape=(3, *SIZE), parallel="ddp", ranks=ranks, device=CPU)
    optimizer = build_optimizer(OptimConfig(), model)
    other = States(build(classes=6).state_dict(), optimizer.state_dict(), None)
    with pytest.raises(CheckpointError, match=r"head.bias is \(6,\) there and \(5,\) here"):
        engine.load_states(other if ranks.main else None, optimizer, None)


def check_averages(ranks: Ranks) -> None:
    for parallel in ("ddp", "fsdp"):
        trained = train(ranks, parallel)  # type: ignore[arg-type]
        before = trained.states()
        with trained.engine.averaged(trained.ema) as judged:
            judged.eval()
            with torch.no_grad():
                judged(batch_of(0)[0])
            inside = trained.states()
        judged.train()
        after = trained.states()
        if before is not None:
            assert before.ema is not None and inside is not None and after is not None
            assert all(torch.equal(inside.model[name], before.ema[name]) for name in before.model)
            assert all(torch.equal(after.model[name], before.model[name]) for name in before.model)
        with torch.no_grad():  # FSDP keeps what it gathered; not beyond the exchange
            output = trained.engine.model(batch_of(0)[0])
        if after is not None:
            plain = build()
            plain.load_state_dict(after.model)
            torch.testing.assert_close(output, plain(batch_of(0)[0]), atol=1e-6, rtol=0)


def check_evaluation(ranks: Ranks) -> None:
    source = open_source("digits", split="val", data=DataConfig(source="digits", image_size=SIZE))
    model = build(classes=10)

    def judge(by: Ranks, judged: torch.nn.Module, batch_size: int) -> EvalResult:
        batches = eval_batches(source, EvalTransform(image_size=SIZE), batch_size=batch_size, rank=by.rank, ranks=by.ranks)
        scaled = lambda images: images.float() / 128 - 1  # noqa: E731
        answered = answers(judged, batches, preprocess=scaled, device=CPU, ranks=by)
        return replace(evaluate(answered, num_classes=10, device=CPU, ranks=by), seconds=0.0)

    def collect(by: Ranks, batch_size: int) -> Predictions:
        batches = eval_batches(source, EvalTransform(image_size=SIZE), batch_size=batch_size, rank=by.rank, ranks=by.ranks)
        scaled = lambda images: images.float() / 128 - 1  # noqa: E731
        answered = answers(model, batches, preprocess=scaled, device=CPU, ranks=by)
        return collect_predictions(answered, num_classes=10, device=CPU, ranks=by, keep_logits=True)[1]

    sharded = build(classes=10)
    Engine(sharded, blocks=list(sharded.blocks), input_shape=(3, *SIZE), parallel="fsdp", ranks=ranks, device=CPU)
    for batch_size in (7, 32, 40, len(source), 1000):  # as many batches for each, one more for rank 1, none for rank 0
        alone = judge(SOLO, model, batch_size)
        assert judge(ranks, model, batch_size) == alone, batch_size
        assert judge(ranks, sharded, batch_size) == alone, batch_size
        shared = vars(collect(ranks, batch_size))
        for name, array in vars(collect(SOLO, batch_size)).items():
            np.testing.assert_array_equal(shared[name], array, err_msg=f"{name}, {batch_size}")

    def broken() -> Iterator[dict[str, Tensor]]:
        batch = {"images": torch.zeros(2, 3, *SIZE, dtype=torch.uint8), "labels": torch.zeros(2, dtype=torch.int64)}
        yield batch
        if ranks.rank == 1:
            raise DataError("photos/7.png: damaged")
        yield batch

    with pytest.raises(DataError, match="rank 1 of 2: photos/7.png: damaged"):
        list(answers(model, broken(), preprocess=Tensor.float, device=CPU, ranks=ranks))


CHECKS: dict[str, Callable[[Ranks], None]] = {
    name: value for name, value in list(globals().items()) if name.startswith("check_")
}


def resume_exactly(ranks: Ranks) -> None:
    """Of three numbers the sum depends on their order, and DDP's buckets are other ones after its first step."""
    whole = train(ranks, "ddp", optimizer="adamw", steps=6).states()
    half = train(ranks, "ddp", optimizer="adamw", steps=3).states()
    resumed = train(ranks, "ddp", optimizer="adamw", steps=3, start=3, saved=half).states()
    if whole is not None and resumed is not None:
        assert_close(resumed, whole, atol=0)


def work(folder: Path, what: str) -> None:
    """Be one of the processes."""
    torch.set_num_threads(1)
    with process_group(device_type="cpu", timeout_seconds=2 if what == "hang" else 60) as ranks:
        said = {}
        if what == "die" and ranks.rank == 1:
            os._exit(9)
        if what == "hang" and ranks.rank == 1:
            time.sleep(6)
        if what == "disagree":
            ranks.agree(DataError("photos/7.png: damaged") if ranks.rank == 1 else None)
        wanted: dict[str, dict[str, Callable[[Ranks], None]]] = {"checks": CHECKS, "resume": {"resume": resume_exactly}}
        for name, check in wanted.get(what, {}).items():
            try:
                check(ranks)
            except Exception:  # every failure is told; after one the other process may be elsewhere
                said[name] = traceback.format_exc()
                break
        ranks.any(False)
        (folder / f"{ranks.rank}.json").write_text(json.dumps(said))
    if what == "checks" and not said:
        os.environ["MASTER_PORT"] = os.environ["SECOND_PORT"]  # the first one's store may still be there
        pretrain_briefly(folder)


def pretrain_briefly(folder: Path) -> None:
    """Do as `vit pretrain`, in as many processes as the environment says."""
    pretrain(folder / "tiny.yaml", [f"out={folder / 'run'}", *BRIEF], dry_run=False, say=lambda text: None)


def processes(folder: Path, what: str, count: int = 2) -> list[subprocess.Popen[str]]:
    with socket.socket() as free, socket.socket() as other:
        for each in (free, other):
            each.bind(("127.0.0.1", 0))
        ports = [each.getsockname()[1] for each in (free, other)]
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ports[0]),
        "SECOND_PORT": str(ports[1]),
        "WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-W", "error", __file__, str(folder), what]
    return [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(count)
    ]


@pytest.mark.parametrize(("what", "count"), [pytest.param("checks", 2), pytest.param("resume", 3, marks=pytest.mark.slow)])
def test_several_processes_do_what_one_does(tmp_path: Path, what: str, count: int) -> None:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    outputs = [process.communicate(timeout=300)[0] for process in processes(tmp_path, what, count)]
    for rank, output in enumerate(outputs):
        report = tmp_path / f"{rank}.json"
        assert report.exists(), output
        failed = json.loads(report.read_text())
        assert not failed, "\n".join(f"rank {rank}, {name}:\n{text}" for name, text in failed.items())
    if what == "checks":
        assert (tmp_path / "run" / "summary.json").exists(), "\n".join(outputs)
        (tmp_path / "alone").mkdir()
        (tmp_path / "alone" / "tiny.yaml").write_text(CONFIG)
        pretrain_briefly(tmp_path / "alone")
        assert_same_run(tmp_path, tmp_path / "alone", steps=BRIEF_STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("die", "rank 0 of 2: rank 1 ended early; its own message says why"),
        ("hang", "rank 0 of 2: rank 1 did not answer for 2 s"),
    ],
)
def test_a_process_that_goes_away_ends_the_others(tmp_path: Path, what: str, reason: str) -> None:
    first, second = processes(tmp_path, what)
    output = first.communicate(timeout=60)[0]
    second.communicate(timeout=60)
    assert first.returncode != 0
    assert f"UserError: {reason}" in output


@pytest.mark.slow
def test_one_process_reports_for_all(tmp_path: Path) -> None:
    first, second = processes(tmp_path, "disagree")
    assert "DataError: rank 1 of 2: photos/7.png: damaged" in first.communicate(timeout=60)[0]
    assert second.communicate(timeout=60)[0] == ""
    assert (first.returncode, second.returncode) == (1, 2)


# ---------------------------------------------------------------- what one process does


@pytest.mark.parametrize(
    ("wanted", "ranks", "memory", "chosen"),
    [
        ("auto", 1, 10, "single"),
        ("fsdp", 1, 10, "single"),
        ("auto", 2, None, "ddp"),
        ("auto", 2, 1000, "ddp"),
        ("auto", 2, 112, "ddp"),
        ("auto", 2, 110, "fsdp"),
        ("ddp", 2, 10, "ddp"),
        ("fsdp", 2, 1000, "fsdp"),
    ],
)
def test_whole_models_where_they_fit(wanted: str, ranks: int, memory: int | None, chosen: str) -> None:
    assert choose_parallel(wanted, ranks=ranks, state_bytes=60, activation_bytes=40, memory_bytes=memory) == chosen


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with process_group(device_type="cpu", timeout_seconds=1) as ranks:
        assert ranks is SOLO
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun --nproc-per-node 1
    with process_group(device_type="cpu", timeout_seconds=1) as ranks:
        assert ranks is SOLO
    total = torch.tensor([3])
    SOLO.sum_(total)
    SOLO.barrier()
    SOLO.wait_for_main()
    SOLO.agree(None)
    assert (SOLO.any(True), SOLO.any(False), SOLO.largest(7), total.item()) == (True, False, 7, 3)
    assert (SOLO.gather("x"), SOLO.broadcast("x")) == (["x"], "x")
    problem = DataError("photos/7.png: damaged")
    with pytest.raises(DataError) as met:
        SOLO.agree(problem)
    assert met.value is problem


def test_half_of_torchruns_variables_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    with (
        pytest.raises(UserError, match="says WORLD_SIZE=4, several processes, but not RANK; start them with torchrun"),
        process_group(device_type="cpu", timeout_seconds=1),
    ):
        pass


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "3"), ("MASTER_ADDR", "x"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(UserError, match="this machine has 2 GPUs, and torchrun starts at least 4"),
        process_group(device_type="cuda", timeout_seconds=1),
    ):
        pass


class Kept(dict[str, str]):
    """A store in this process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


def test_who_went_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    store = Kept()
    store.set("vit/alive/2", "")
    closed = RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:4711")
    assert lost(Ranks(0, 4, 0), store, 600, closed) == (
        "rank 0 of 4: ranks 1, 3 ended early; its own message says why; the same command goes on from the last checkpoint "
        "(torchrun --max-restarts does so by itself)"
    )
    silent = RuntimeError("Timed out waiting 600000ms for recv operation to complete")
    assert lost(Ranks(0, 4, 0), None, 600, silent).startswith("rank 0 of 4: another process did not answer for 600 s; ")


def test_activations_computed_again_change_nothing() -> None:
    plain, again = train(SOLO, "single"), train(SOLO, "single", recompute=True)
    assert plain.losses == again.losses
    first, second = plain.states(), again.states()
    assert first is not None and second is not None
    assert_close(second, first, atol=0)


def test_dropout_is_the_same_when_activations_are_computed_again() -> None:
    gradients = []
    for recompute in (False, True):
        model = build()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        engine = Engine(
            model,
            blocks=list(model.blocks),
            input_shape=(3, *SIZE),
            parallel="single",
            ranks=SOLO,
            device=CPU,
            activation_checkpointing=recompute,
        )
        torch.manual_seed(1)
        with engine.accumulating():
            engine(batch_of(0)[0]).square().sum().backward()
        engine.reduce()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))  # type: ignore[arg-type]


# ---------------------------------------------------------------- the command, under torchrun

CONFIG = """
seed: 5
model: {patch_size: 4, width: 32, depth: 2, num_heads: 2}
data: {source: digits, image_size: 16}
augment: {crop: pad, pad: 2, flip: false}
optim: {lr: 2e-3, weight_decay: 0.05}
train: {steps: 50, batch_size: 25, micro_batch_size: 7, precision: float32, ema_decay: 0.9, tune: false}
log: {log_every_steps: 1, eval_every_steps: 25, checkpoint_every_steps: 10}
"""  # micro-batches of 14 and 11 over two ranks: shares differ
BRIEF_STEPS = 12
BRIEF = (f"train.steps={BRIEF_STEPS}", "log.eval_every_steps=6")  # and two checkpoints


def command(folder: Path, *overrides: str, count: int = 2, torchrun: tuple[str, ...] = ()) -> list[str]:
    config = folder / "tiny.yaml"
    if not config.exists():
        config.write_text(CONFIG)
    words = ["-m", "vitcli", "pretrain", "--config", str(config), "--out", str(folder / "run"), *overrides]
    if count == 1:
        return [sys.executable, *words]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), *torchrun]
    return [sys.executable, *launch, *words]


def start(words: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen[str], *, code: int = 0) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    return output


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    metrics = folder / "run" / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return [row for row in map(json.loads, (line for line in lines if line.endswith("}"))) if row["kind"] == kind]


def wait_for(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while not any(row["step"] >= step for row in rows(folder, "train")):
        if process.poll() is not None:
            pytest.fail(f"ended before step {step}: {process.communicate()[0]}")
        assert time.monotonic() < deadline
        time.sleep(0.01)


def process_of(rank: int, launcher: subprocess.Popen[str]) -> int:
    """Return the pid of a rank that a torchrun started."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(re.search(r"PPid:\s+(\d+)", (folder / "status").read_text()).group(1))  # type: ignore[union-attr]
            environment = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):
            continue
        if parent == launcher.pid and f"RANK={rank}".encode() in environment:
            return int(folder.name)
    raise AssertionError(f"no rank {rank}")


def final(folder: Path, *, steps: int = 50) -> States:
    saved = load_checkpoint(folder / "run" / "checkpoints" / f"step_{steps:08d}")
    return States(saved.model_state, saved.optimizer_state, saved.ema_state)


def assert_same_bits(found: States, expected: States) -> None:
    assert_close(found, expected, atol=0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    (folder / "tiny.yaml").write_text(CONFIG)
    pretrain(folder / "tiny.yaml", [f"out={folder / 'run'}"], dry_run=False, say=lambda text: None)
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    finish(start(command(folder)))
    return folder


def assert_same_curve(folder: Path, alone: Path) -> None:
    for kind in ("train", "eval"):
        found, expected = rows(folder, kind), rows(alone, kind)
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], abs=1e-5)
    assert [row["gradient_norm"] for row in rows(folder, "train")] == pytest.approx(
        [row["gradient_norm"] for row in rows(alone, "train")], rel=1e-3
    )


def assert_same_run(folder: Path, alone: Path, *, steps: int) -> None:
    assert len(rows(alone, "train")) == steps
    assert_same_curve(folder, alone)
    accuracies = [[row["top1"] for row in rows(each, "eval")] for each in (folder, alone)]
    assert accuracies[0] == accuracies[1]
    assert_close(final(folder, steps=steps), final(alone, steps=steps), atol=1e-3)


@pytest.mark.slow  # the default suite has a shorter one, without torchrun
def test_the_loss_curve_of_two_processes_is_that_of_one(together: Path, alone: Path) -> None:
    assert_same_run(together, alone, steps=50)


@pytest.mark.slow
def test_looking_while_two_processes_train_changes_nothing_and_is_written_once(tmp_path: Path, together: Path) -> None:
    finish(start(command(tmp_path, "log.inspect_every_steps=25")))
    assert_same_bits(final(tmp_path), final(together))
    assert [row["loss"] for row in rows(tmp_path, "train")] == [row["loss"] for row in rows(together, "train")]
    assert_looked_at(tmp_path, steps=[25, 50])
    assert rows(together, "inspect") == []


def assert_looked_at(folder: Path, *, steps: list[int]) -> None:
    """Check that one process, and no other, wrote the figures of these steps."""
    found = rows(folder, "inspect")
    assert [row["step"] for row in found] == steps
    events = EventAccumulator(str(folder / "run" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["images"] if tag.startswith("inspect/")]
    assert len(tags) == found[-1]["figures"]
    assert all([event.step for event in events.Images(tag)] == steps for tag in tags)


@pytest.mark.slow
def test_sharded_training_is_that_of_one(tmp_path: Path, alone: Path) -> None:
    words = ("train.parallel=fsdp", "train.activation_checkpointing=true", "log.inspect_every_steps=50")
    finish(start(command(tmp_path, *words)))
    assert_same_curve(tmp_path, alone)
    assert_looked_at(tmp_path, steps=[50])
    plain = build_like(tmp_path)
    plain.load_state_dict(final(tmp_path).model)


def build_like(folder: Path) -> VisionTransformer:
    manifest = load_checkpoint(folder / "run" / "checkpoints" / "step_00000050").manifest["model"]
    sizes = {key: manifest[key] for key in ("patch_size", "width", "depth", "mlp_dim", "num_heads")}
    return VisionTransformer(image_size=SIZE, num_classes=10, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [((2, "ddp"), (1, "ddp")), ((1, "ddp"), (2, "ddp")), ((2, "fsdp"), (1, "ddp")), ((1, "ddp"), (2, "fsdp"))],
)
def test_another_number_of_processes_goes_on(
    tmp_path: Path, alone: Path, first: tuple[int, str], then: tuple[int, str]
) -> None:
    process = start(command(tmp_path, f"train.parallel={first[1]}", count=first[0]))
    wait_for(process, tmp_path, 23)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert "saved; the same command goes on from there" in output
    output = finish(start(command(tmp_path, f"train.parallel={then[1]}", count=then[0])))
    assert "resuming" in output
    assert_same_curve(tmp_path, alone)


@pytest.mark.slow
def test_torchrun_restarts_a_run_whose_process_was_killed(tmp_path: Path, together: Path) -> None:
    process = start(command(tmp_path, torchrun=("--max-restarts", "2")))
    for step, rank in ((13, 1), (34, 0)):
        wait_for(process, tmp_path, step)
        os.kill(process_of(rank, process), signal.SIGKILL)
        time.sleep(1.0)  # until the rows of the old processes are cut back
    output = finish(process)
    assert output.count("resuming") == 2
    assert_same_bits(final(tmp_path), final(together))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run(tmp_path: Path, together: Path, rank: int) -> None:
    process = start(command(tmp_path))
    wait_for(process, tmp_path, 13)
    began = time.monotonic()
    os.kill(process_of(rank, process), signal.SIGKILL)
    finish(process, code=1)
    assert time.monotonic() - began < 60  # and not the ten minutes a process may take to answer
    finish(start(command(tmp_path)))
    assert_same_bits(final(tmp_path), final(together))


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_run(tmp_path: Path) -> None:
    process = start(command(tmp_path, "train.timeout_seconds=30"))
    wait_for(process, tmp_path, 13)
    os.kill(process_of(1, process), signal.SIGSTOP)
    output = finish(process, code=1)
    assert "rank 0 of 2: rank 1 did not answer for 30 s" in output
    assert "vitcli/train.py" not in output  # torchrun's own traceback is there


@pytest.mark.slow
def test_a_damaged_file_on_one_rank_ends_the_run_with_its_name(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    for split, count in (("train", 60), ("val", 8)):
        for number in range(count):
            place = tmp_path / "photos" / split / f"class{number % 2}"
            place.mkdir(parents=True, exist_ok=True)
            pixels = chance.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(place / f"{number:03}.png")
    (tmp_path / "photos" / "train" / "class1" / "031.png").write_bytes(b"\x89PNG no more")
    data = (f"data.source=folder:{tmp_path / 'photos'}", "data.memory_cache_gib=0", "data.workers=0")
    output = finish(start(command(tmp_path, *data)), code=1)
    assert output.count("031.png") == 1, output
    assert re.search(r"rank [01] of 2: .*031\.png", output)


if __name__ == "__main__":
    work(Path(sys.argv[1]), sys.argv[2])
