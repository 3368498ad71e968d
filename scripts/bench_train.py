"""How many images per second do training and evaluation do, beside timm, torchvision, Hugging Face and vit-pytorch?

    python scripts/bench_train.py --data /data/cifar10 --models 4m 0.2m --json train.json

Same Vision Transformer (tanh GELU, class token) or BiT ResNet, same folders of pictures (DATA/train/CLASS/*,
DATA/test/CLASS/*), same batch, pad-crop and flip, AdamW, clipping at 1, same precision. `vit` is `vit pretrain` as it comes.
The others run the loop of timm's train.py and of torchvision's references/classification on those packages' own models,
loaders and optimisers, Hugging Face's Trainer, and vit-pytorch's model in a plain loop (it has no ResNet; torchvision's does
not standardise kernels, and activates after its convolutions); each first tries every setting of its own (loader processes,
threads, fused optimiser, compilation), the fastest goes on. Every measurement is a process of its own; rounds alternate,
medians are printed.
The limit is what bare matrix products of the model's shapes reach, forward and backward; a share is of that.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from vitcli.device import hardware
from vitcli.model_config import ModelConfig, resolve_model
from vitcli.models.flops import forward_flops

MEAN = STD = (0.5, 0.5, 0.5)
LR, WEIGHT_DECAY, CLIP, EPS = 1e-3, 0.05, 1.0, 1e-6
CLASSES = 10
PHASES = ("data", "forward", "backward", "optimiser")


@dataclass(frozen=True)
class Model:
    """Sizes of a Vision Transformer; or of a ResNet with a small root, when `units` of its blocks are given."""

    side: int
    patch: int = 1
    width: int = 64
    depth: int = 1
    heads: int = 1
    units: tuple[int, ...] = ()

    @property
    def section(self) -> dict[str, Any]:
        """Return what a configuration of ours says under `model`."""
        if self.units:
            return {"kind": "resnet", "resnet_units": list(self.units), "resnet_width": self.width, "resnet_root": "small"}
        return {"patch_size": self.patch, "width": self.width, "depth": self.depth, "num_heads": self.heads}

    @property
    def flops(self) -> int:
        """Of one image forward."""
        section = ModelConfig.model_validate(self.section)
        return forward_flops(resolve_model(section), image_size=(self.side, self.side), num_classes=CLASSES)

    def products(self) -> list[tuple[int, int, int]]:
        """Return rows for one image, inner and outer size of the matrix products that most of the work is."""
        if not self.units:
            tokens = (self.side // self.patch) ** 2 + 1
            sizes = ((1, 3), (1, 1), (1, 4), (4, 1))
            return [(tokens, self.width * inner, self.width * outer) for inner, outer in sizes]
        found, inputs = [], self.width
        for block, count in enumerate(self.units):
            middle, pixels = self.width * 2**block, (self.side // 2**block) ** 2
            for _ in range(count):
                found += [(pixels, inputs, middle), (pixels, 9 * middle, middle), (pixels, middle, 4 * middle)]
                inputs = 4 * middle
        return found

    def __str__(self) -> str:
        if self.units:
            return f"ResNet, {' + '.join(map(str, self.units))} units, width {self.width} at {self.side} px"
        return f"width {self.width}, depth {self.depth}, patch {self.patch} at {self.side} px"


MODELS = {
    "0.2m": Model(32, 8, 64, 4, 4),
    "4m": Model(32, 4, 192, 9, 3),
    "ti4": Model(32, 4, 192, 12, 3),
    "s4": Model(32, 4, 384, 12, 6),
    "ti16": Model(224, 16, 192, 12, 3),
    "resnet": Model(32, width=64, units=(2, 2, 2)),
}


@dataclass(frozen=True)
class Setting:
    """What a user of these tools may choose. `micro` is vit's alone."""

    threads: int
    workers: int = 0
    fused: bool = False
    compile: bool = False
    micro: int | None = None


@dataclass(frozen=True)
class Job:
    """One measurement."""

    name: str
    model: Model
    batch: int
    precision: str
    evaluate: bool
    data: str
    setting: Setting
    seconds: float

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.precision == "bf16")


# ---------------------------------------------------------------- measuring


class Done(BaseException):  # ends a loop from inside its iterator, past any `except Exception`
    """The time is up."""


class Meter:
    """Count images and the time of each phase between the end of the warm-up and the end of the measurement."""

    def __init__(self, *, seconds: float, warm: int) -> None:
        self.seconds = seconds
        self.warm = warm  # batches
        self.seen = 0
        self.images = 0
        self.start = math.nan
        self.elapsed = math.nan
        self.phases: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before = time.perf_counter()
        try:
            yield
        finally:
            if threading.current_thread() is threading.main_thread():  # of several lanes, one
                self.phases[name] += time.perf_counter() - before

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return work(*args, **kwargs)

        return wrapped

    def count(self, batches: Iterable[Any]) -> Generator[Any, None, None]:
        """Pass batches on; raise Done when the time is up, at a step's end."""
        source = iter(batches)
        while True:
            if self.seen == self.warm:
                self.images, self.start = 0, time.perf_counter()
                self.phases.clear()
            elif self.seen > self.warm and time.perf_counter() - self.start > self.seconds:
                self.elapsed = time.perf_counter() - self.start
                raise Done
            with self.phase("data"):
                try:
                    batch = next(source)
                except StopIteration:
                    return
            self.seen += 1
            self.images += size_of(batch)
            yield batch

    def watch_torch(self) -> None:
        """Time every backward pass and every optimiser's step of this process."""
        torch.autograd.backward = self.timed("backward", torch.autograd.backward)
        begun = [0.0]

        def before(*_: Any) -> None:
            begun[0] = time.perf_counter()

        def after(*_: Any) -> None:
            self.phases["optimiser"] += time.perf_counter() - begun[0]

        register_optimizer_step_pre_hook(before)
        register_optimizer_step_post_hook(after)


def size_of(batch: Any) -> int:
    first = next(iter(batch.values())) if hasattr(batch, "values") else batch[0]
    return len(first)


class Metered:
    """A loader whose batches are counted."""

    def __init__(self, loader: Any, meter: Meter) -> None:
        self.loader, self.meter = loader, meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return self.meter.count(self.loader)


# ---------------------------------------------------------------- ours


def ours(job: Job, meter: Meter) -> None:
    from vitcli import fit, train
    from vitcli.models import ResNet, VisionTransformer

    model, setting = job.model, job.setting
    workers = "" if setting.workers == 0 else f"workers: {setting.workers}"
    with tempfile.TemporaryDirectory(prefix="bench-train-") as place:
        config = Path(place) / "config.yaml"
        config.write_text(
            f"out: {place}/run\n"
            f"model: {json.dumps(model.section)}\n"
            f"data: {{source: 'folder:{job.data}', image_size: {model.side}, {workers}}}\n"
            "augment: {crop: pad, pad: 4, flip: true}\n"
            f"optim: {{name: adamw, lr: {LR}, weight_decay: {WEIGHT_DECAY}, grad_clip: {CLIP}}}\n"
            f"train: {{steps: 1000000, batch_size: {job.batch}, precision: {job.precision}, "
            f"compile: {str(setting.compile).lower()}, micro_batch_size: {setting.micro or 'null'}}}\n"
            "log: {log_every_steps: 100, eval_every_steps: 1000000, checkpoint_every_steps: 1000000, sample_images: 0}\n"
        )
        if job.evaluate:
            ours_evaluate(config, job, meter)
        room: Any = fit  # whose names are replaced
        real = room.train_batches
        room.train_batches = lambda *args, **kwargs: meter.count(real(*args, **kwargs))
        for kind in (VisionTransformer, ResNet):
            kind.forward = meter.timed("forward", kind.forward)  # type: ignore[method-assign]
        train.pretrain(config, [], dry_run=False, say=lambda text: None)


def ours_evaluate(path: Path, job: Job, meter: Meter) -> None:
    from vitcli import forward
    from vitcli.config_file import read_config
    from vitcli.data.loader import choose_workers
    from vitcli.data.sources import open_source
    from vitcli.device import keep_freed_memory
    from vitcli.models import build_model
    from vitcli.plan import resolve
    from vitcli.predictions import collect_source

    keep_freed_memory()
    config, _ = read_config(path, [])
    source = open_source(config.data.source, split="val", data=config.data)
    config = resolve(config, train_examples=len(source), val_examples=len(source), device=job.device)
    workers = config.data.workers if config.data.workers is not None else choose_workers(source, job.device.type)
    config = config.model_copy(update={"data": config.data.model_copy(update={"workers": workers})})
    net = build_model(config.model, image_size=config.data.image_size, num_classes=CLASSES).to(job.device)
    type(net).forward = meter.timed("forward", type(net).forward)  # type: ignore[method-assign]
    room: Any = forward  # whose names are replaced
    real = room.eval_batches
    room.eval_batches = lambda *args, **kwargs: meter.count(real(*args, **kwargs))
    while True:
        collect_source(
            net,
            source,
            config,
            device=job.device,
            batch_size=2 * (config.train.micro_batch_size or job.batch),
            num_classes=CLASSES,
            warn=warnings.warn,
            flops_per_image=job.model.flops,
        )


# ---------------------------------------------------------------- the others: models


def timm_model(model: Model) -> nn.Module:
    if model.units:
        from timm.layers import StdConv2d
        from timm.models.resnetv2 import ResNetV2

        channels = tuple(4 * model.width * 2**block for block in range(len(model.units)))
        net = ResNetV2(list(model.units), channels=channels, num_classes=CLASSES, stem_chs=model.width)
        net.stem = StdConv2d(3, model.width, kernel_size=3, padding=1, bias=False)
        return net
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=model.side,
        patch_size=model.patch,
        num_classes=CLASSES,
        embed_dim=model.width,
        depth=model.depth,
        num_heads=model.heads,
        act_layer="gelu_tanh",
    )


def torchvision_model(model: Model) -> nn.Module:
    if model.units:
        from torchvision.models.resnet import Bottleneck, ResNet

        if len(model.units) != 3 or model.width != 64:
            raise SystemExit("torchvision's ResNet starts with 64 channels; and here it is cut after three blocks")
        resnet = ResNet(Bottleneck, [*model.units, 1], num_classes=CLASSES, norm_layer=lambda size: nn.GroupNorm(32, size))
        resnet.conv1 = nn.Conv2d(3, model.width, kernel_size=3, padding=1, bias=False)
        resnet.fc = nn.Linear(16 * model.width, CLASSES)
        resnet.maxpool = resnet.layer4 = nn.Identity()
        return resnet
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=model.side,
        patch_size=model.patch,
        num_layers=model.depth,
        num_heads=model.heads,
        hidden_dim=model.width,
        mlp_dim=4 * model.width,
        num_classes=CLASSES,
    )


def transformers_model(model: Model) -> nn.Module:
    from transformers import BitConfig, BitForImageClassification, ViTConfig, ViTForImageClassification

    if model.units:
        sizes = [4 * model.width * 2**block for block in range(len(model.units))]
        net = BitForImageClassification(
            BitConfig(embedding_size=model.width, hidden_sizes=sizes, depths=list(model.units), num_labels=CLASSES)
        )
        embedder: Any = net.bit.embedder
        embedder.convolution = type(embedder.convolution)(3, model.width, kernel_size=3, padding=1, eps=1e-8)
        embedder.pad = embedder.pooler = nn.Identity()
        return net
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=model.width,
            num_hidden_layers=model.depth,
            num_attention_heads=model.heads,
            intermediate_size=4 * model.width,
            hidden_act="gelu_pytorch_tanh",
            image_size=model.side,
            patch_size=model.patch,
            num_labels=CLASSES,
        )
    )


def vit_pytorch_model(model: Model) -> nn.Module:
    from vit_pytorch import ViT

    return ViT(
        image_size=model.side,
        patch_size=model.patch,
        num_classes=CLASSES,
        dim=model.width,
        depth=model.depth,
        heads=model.heads,
        dim_head=model.width // model.heads,
        mlp_dim=4 * model.width,
    )


def prepared(net: nn.Module, job: Job, meter: Meter) -> tuple[nn.Module, Callable[..., Any]]:
    """Give the model tanh GELUs where it has exact ones, a device and, where it is asked for, the compiler."""
    for module in net.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "tanh"
    net = net.to(job.device)
    return net, meter.timed("forward", torch.compile(net) if job.setting.compile else net)


# ---------------------------------------------------------------- the others: loops


def reference_transform(side: int, *, train: bool, tensor: bool = True) -> Callable[[Any], Any]:
    """Build the steps of torchvision's references/classification/presets.py, with a pad-crop; or timm's, which end in uint8."""
    from torchvision.transforms import transforms

    steps: list[Any] = [] if side == 32 else [transforms.Resize((side, side))]
    if train:
        steps += [transforms.RandomCrop(side, padding=side // 8), transforms.RandomHorizontalFlip(0.5)]
    if tensor:
        steps += [transforms.PILToTensor(), transforms.ConvertImageDtype(torch.float), transforms.Normalize(MEAN, STD)]
    else:
        from timm.data.transforms import MaybePILToTensor

        steps.append(MaybePILToTensor())
    return transforms.Compose(steps)


def timm_loader(job: Job, *, train: bool) -> Any:
    from timm.data import create_dataset, create_loader

    dataset = create_dataset("", root=f"{job.data}/{'train' if train else 'test'}")
    loader = create_loader(
        dataset,
        input_size=(3, job.model.side, job.model.side),
        batch_size=job.batch,
        is_training=train,
        mean=MEAN,
        std=STD,
        num_workers=job.setting.workers,
        persistent_workers=job.setting.workers > 0,
        device=job.device,
        use_prefetcher=True,
    )
    dataset.transform = reference_transform(job.model.side, train=train, tensor=False)
    return loader


def folder_loader(job: Job, *, train: bool) -> Any:
    from torchvision.datasets import ImageFolder

    folder = f"{job.data}/{'train' if train else 'test'}"
    return torch.utils.data.DataLoader(
        ImageFolder(folder, reference_transform(job.model.side, train=train)),
        batch_size=job.batch,
        shuffle=train,
        drop_last=train,
        num_workers=job.setting.workers,
        persistent_workers=job.setting.workers > 0,
        pin_memory=job.device.type == "cuda",
    )


def optimizer_of(net: nn.Module, job: Job) -> torch.optim.Optimizer:
    """Build AdamW without decay on vectors, as timm's and torchvision's scripts can."""
    decayed = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in net.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, fused=job.setting.fused or None)


def plain_loop(net: nn.Module, loader: Any, optimizer: torch.optim.Optimizer, job: Job, meter: Meter, *, scores: bool) -> None:
    """Train as timm's train.py and torchvision's train_one_epoch do; the latter also `scores` every batch."""
    net, forward = prepared(net, job, meter)
    criterion = nn.CrossEntropyLoss()
    net.train()
    while True:
        for images, labels in meter.count(loader):
            images, labels = images.to(job.device, non_blocking=True), labels.to(job.device, non_blocking=True)
            with job.autocast():
                logits = forward(images)
                loss = criterion(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), CLIP)
            optimizer.step()
            if scores:
                count_hits(logits, labels)
            loss.item()


def plain_evaluation(net: nn.Module, loader: Any, job: Job, meter: Meter, *, inference: bool) -> None:
    """Evaluate as timm's validate() does, without gradients, and torchvision's evaluate(), in inference mode."""
    net, forward = prepared(net, job, meter)
    net.eval()
    while True:
        with torch.inference_mode() if inference else torch.no_grad():
            for images, labels in meter.count(loader):
                images, labels = images.to(job.device, non_blocking=True), labels.to(job.device, non_blocking=True)
                with job.autocast():
                    logits = forward(images)
                    loss = F.cross_entropy(logits, labels)
                count_hits(logits, labels)
                loss.item()


def count_hits(logits: Tensor, labels: Tensor) -> list[float]:
    """Count the right answers among the first and the first five guesses."""
    right = logits.topk(5).indices.eq(labels[:, None])
    return [right[:, :k].sum().item() for k in (1, 5)]


def timm(job: Job, meter: Meter) -> None:
    from timm.optim import create_optimizer_v2

    net, loader = timm_model(job.model), timm_loader(job, train=not job.evaluate)
    if job.evaluate:
        plain_evaluation(net, loader, job, meter, inference=False)
    fused = {"fused": True} if job.setting.fused else {}
    optimizer = create_optimizer_v2(net, opt="adamw", lr=LR, weight_decay=WEIGHT_DECAY, **fused)
    plain_loop(net, loader, optimizer, job, meter, scores=False)


def torchvision(job: Job, meter: Meter) -> None:
    net, loader = torchvision_model(job.model), folder_loader(job, train=not job.evaluate)
    if job.evaluate:
        plain_evaluation(net, loader, job, meter, inference=True)
    plain_loop(net, loader, optimizer_of(net, job), job, meter, scores=True)


def vit_pytorch(job: Job, meter: Meter) -> None:
    net, loader = vit_pytorch_model(job.model), folder_loader(job, train=not job.evaluate)
    if job.evaluate:
        plain_evaluation(net, loader, job, meter, inference=True)
    plain_loop(net, loader, optimizer_of(net, job), job, meter, scores=False)


def transformers(job: Job, meter: Meter) -> None:
    from torchvision.datasets import ImageFolder
    from transformers import Trainer, TrainingArguments

    net = transformers_model(job.model)
    net.forward = meter.timed("forward", net.forward)

    class Counted(Trainer):
        def get_train_dataloader(self) -> Any:
            return Metered(super().get_train_dataloader(), meter)

        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
            return Metered(super().get_eval_dataloader(eval_dataset), meter)

    def collate(examples: list[Any]) -> dict[str, Tensor]:  # as in examples/pytorch/image-classification
        labels = torch.tensor([label for _, label in examples])
        return {"pixel_values": torch.stack([image for image, _ in examples]), "labels": labels}

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(prefix="bench-train-"),
        per_device_train_batch_size=job.batch,
        per_device_eval_batch_size=job.batch,
        max_steps=1_000_000,
        learning_rate=LR,
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        optim="adamw_torch_fused" if job.setting.fused else "adamw_torch",
        dataloader_num_workers=job.setting.workers,
        dataloader_persistent_workers=job.setting.workers > 0,
        dataloader_drop_last=not job.evaluate,
        remove_unused_columns=False,
        use_cpu=job.device.type == "cpu",
        bf16=job.precision == "bf16",
        torch_compile=job.setting.compile,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=500,
    )
    folders = {split: ImageFolder(f"{job.data}/{split}", reference_transform(job.model.side, train=split == "train"))
               for split in ("train", "test")}  # fmt: skip
    trainer = Counted(net, arguments, train_dataset=folders["train"], eval_dataset=folders["test"], data_collator=collate)
    while job.evaluate:
        trainer.evaluate()
    trainer.train()


CONTENDERS: dict[str, Callable[[Job, Meter], None]] = {
    "vit": ours,
    "timm": timm,
    "torchvision": torchvision,
    "transformers": transformers,
    "vit-pytorch": vit_pytorch,
}


def settings_of(name: str, job_cores: int, *, compiled: bool, evaluate: bool) -> list[Setting]:
    """Return what to choose the fastest from. Ours decides for itself."""
    if name == "vit":
        return [Setting(threads=job_cores)]
    shares = sorted({(job_cores, 1), (job_cores, job_cores), (max(1, job_cores - 1), 1)})
    found = [Setting(threads, workers, fused=not evaluate) for threads, workers in shares]
    return found + ([Setting(job_cores, 1, fused=not evaluate, compile=True)] if compiled else [])


# ---------------------------------------------------------------- the limit


def limit(job: Job) -> float:
    """Return FLOP/s of the model's matrix products alone, each into memory that is there: dense layers forward and backward.

    A training step needs x W, then dy W^T and x^T dy; an evaluation the first alone.
    """
    total_flops = total_seconds = 0.0
    shapes = job.model.products()
    for rows_each, inner, outer in shapes:
        rows = job.batch * rows_each
        x, dy = (torch.randn(rows, size, dtype=job.dtype, device=job.device) for size in (inner, outer))
        weight = torch.randn(outer, inner, dtype=job.dtype, device=job.device)
        products: list[tuple[Tensor, Tensor]] = [(x, weight.T)]
        if not job.evaluate:
            products += [(dy, weight), (dy.T, x)]
        for a, b in products:
            out = torch.empty(a.shape[0], b.shape[1], dtype=job.dtype, device=job.device)
            times: list[float] = []
            until = time.perf_counter() + job.seconds / (3 * len(shapes))
            while len(times) < 4 or time.perf_counter() < until:
                before = time.perf_counter()
                torch.mm(a, b, out=out)
                if job.device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - before)
            total_flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
            total_seconds += min(times)  # what the machine can do, not what it did beside other work
    return total_flops / total_seconds


# ---------------------------------------------------------------- one process for each measurement

Record = dict[str, Any]  # of a task: settings, what was tried, measurements; goes into the JSON file


def child(job: Job) -> dict[str, Any]:
    """Measure here, in a process that ends afterwards."""
    torch.set_num_threads(job.setting.threads)
    warnings.simplefilter("ignore")  # the others' deprecations
    if job.name == "limit":
        return {"flops_per_second": limit(job)}
    meter = Meter(seconds=job.seconds, warm=max(4, 2 * job.setting.workers + 1))
    meter.watch_torch()
    with contextlib.suppress(Done):
        CONTENDERS[job.name](job, meter)
    steps = meter.images / job.batch
    parts = {name: 1e3 * meter.phases[name] / steps for name in PHASES}
    step = 1e3 * meter.elapsed / steps
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if job.device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    return {
        "images_per_second": meter.images / meter.elapsed,
        "step_ms": step,
        **{f"{name}_ms": value for name, value in parts.items()},
        "other_ms": step - sum(parts.values()),
        "peak_memory_bytes": memory,
    }


def measure(job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """Measure in a process of its own, so that nobody leaves anything behind for the next."""
    command = [*shlex.split(args.launcher), sys.executable, __file__, "--child", json.dumps(asdict(job))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.setting.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"{job.name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def compare(
    title: str, name: str, args: argparse.Namespace, *, evaluate: bool, record: Record, keep: Callable[[], None]
) -> None:
    """Choose each contender's setting, run the rounds and print a table of these and earlier ones; all goes into `record`."""
    model, cores = MODELS[name], len(os.sched_getaffinity(0))

    def job(contender: str, setting: Setting, seconds: float) -> Job:
        return Job(contender, model, args.batch_size, args.precision, evaluate, str(args.data), setting, seconds)

    print(f"\n{title}", flush=True)
    record |= {"task": title, "model": asdict(model), "flops_per_image": model.flops * (1 if evaluate else 3)}
    chosen, tried, found = (record.setdefault(key, {}) for key in ("settings", "tried", "measurements"))
    contenders = [who for who in args.contenders if not (model.units and who == "vit-pytorch")]
    for contender in (who for who in contenders if who not in chosen):
        settings = settings_of(contender, cores, compiled=contender in args.compile, evaluate=evaluate)
        if args.settings and contender != "vit":
            settings = [Setting(**{"threads": cores, "fused": not evaluate, **args.settings})]
        if len(settings) > 1:
            rates = [measure(job(contender, setting, args.search_seconds), args)["images_per_second"] for setting in settings]
            tried[contender] = [{**asdict(setting), "images_per_second": rate} for setting, rate in zip(settings, rates)]
            settings = [settings[rates.index(max(rates))]]
        chosen[contender] = asdict(settings[0])
        keep()
    for _, contender in itertools.product(range(args.rounds), [*contenders, "limit"]):
        setting = Setting(**chosen.get(contender, {"threads": cores}))
        found.setdefault(contender, []).append(measure(job(contender, setting, args.seconds), args))
        keep()
    report(record)
    keep()


def report(record: Record) -> None:
    """Add medians and ratios to a record and print its table."""
    found = {who: rows for who, rows in record["measurements"].items() if who != "limit"}
    peak = statistics.median(row["flops_per_second"] for row in record["measurements"]["limit"])
    rates_of = {who: statistics.median(row["images_per_second"] for row in rows) for who, rows in found.items()}
    best = max((rate for who, rate in rates_of.items() if who != "vit"), default=math.nan)
    work = record["flops_per_image"]
    record |= {
        "limit_flops_per_second": peak,
        "images_per_second": rates_of,
        "ratio": rates_of.get("vit", math.nan) / best,
        "share_of_limit": {who: rate * work / peak for who, rate in rates_of.items()},
    }
    print(f"  matrix products alone: {peak / 1e9:,.0f} GFLOP/s, {peak / work:,.0f} images/s")
    columns = "".join(f"{part:>10s}" for part in (*PHASES, "other"))
    head = f"{'images/s':>9s}{'range':>16s}{'x best other':>13s}{'of limit':>9s}{'ms/step':>9s}{columns}{'MiB':>7s}  setting"
    print(" " * 15 + head)
    for who, rows in found.items():
        rates = [row["images_per_second"] for row in rows]
        middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        parts = "".join(f"{middle[f'{part}_ms']:10,.0f}" for part in (*PHASES, "other"))
        setting = " ".join(f"{key}={value}" for key, value in record["settings"][who].items() if value)
        print(
            f"  {who:13s}{rates_of[who]:9,.0f}{f'{min(rates):,.0f} to {max(rates):,.0f}':>16s}{rates_of[who] / best:13.2f}"
            f"{rates_of[who] * work / peak:9.0%}{middle['step_ms']:9,.0f}{parts}{middle['peak_memory_bytes'] / 2**20:7,.0f}"
            f"  {'as it comes' if who == 'vit' else setting}",
            flush=True,
        )


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--child", help=argparse.SUPPRESS)
    cli.add_argument("--data", type=Path, help="folder with train/CLASS/* and test/CLASS/*")
    cli.add_argument("--models", nargs="+", choices=MODELS, default=["4m", "0.2m"])
    cli.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    cli.add_argument("--what", nargs="+", choices=["train", "eval"], default=["train", "eval"])
    cli.add_argument("--compile", nargs="*", choices=CONTENDERS, default=["timm"], help="whom to try with torch.compile too")
    cli.add_argument("--precision", choices=["float32", "bf16"], default="float32")
    cli.add_argument("--batch-size", type=int, default=128)
    cli.add_argument("--seconds", type=float, default=8.0, help="for each measurement")
    cli.add_argument("--search-seconds", type=float, default=4.0, help="for each setting tried")
    cli.add_argument("--settings", type=json.loads, metavar="JSON", help="take these for all others instead of a search")
    cli.add_argument("--rounds", type=int, default=3)
    cli.add_argument("--launcher", default="", help="command put before each measurement's, say 'taskset -c 0,1'")
    cli.add_argument(
        "--json", type=Path, help="write all measurements here; a file that is there is added to, settings and all"
    )
    args = cli.parse_args()
    if args.child:
        fields = json.loads(args.child)
        model = Model(**{**fields["model"], "units": tuple(fields["model"]["units"])})
        made = {**fields, "model": model, "setting": Setting(**fields["setting"])}
        print("\n" + json.dumps(child(Job(**made))), flush=True)
        os._exit(0)  # loaders of the others may take long to end
    if args.data is None:
        cli.error("--data is missing")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    about = {
        "hardware": hardware(device),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "precision": args.precision,
        "batch_size": args.batch_size,
        "seconds": args.seconds,
        "rounds": args.rounds,
    }
    print(f"{about['hardware']}; {args.precision}, batches of {args.batch_size}, {args.rounds} rounds of {args.seconds:g} s")
    tasks: dict[str, Record] = {}
    if args.json and args.json.exists():
        tasks = {task["task"]: task for task in json.loads(args.json.read_text())["tasks"]}

    def keep() -> None:
        if args.json:
            args.json.write_text(json.dumps({**about, "tasks": list(tasks.values())}, indent=1) + "\n")

    for name, what in itertools.product(args.models, args.what):
        model = MODELS[name]
        title = f"{what}: {name}, {model}"
        compare(title, name, args, evaluate=what == "eval", record=tasks.setdefault(title, {}), keep=keep)


if __name__ == "__main__":
    main()
