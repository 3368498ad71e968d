"""Which formula-driven corpus transfers best? Pretrain a small ViT on each candidate, fine-tune it, compare with scratch.

    python scripts/compare_corpora.py --cifar10 FOLDER --arms scratch objects mosaic contours textures

FOLDER holds CIFAR-10 as class folders (train/<class>/*, test/<class>/*); without it only `digits` is measured. All arms see
equally many images, so the comparison does not depend on how busy the machine is. Candidates that lost live here, not in src.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from vitcli.data.shapes import ShapesSource
from vitcli.randomness import derive_seed, uniform

SIDE = 32
Pair = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images (B, H, W, 3), labels (B,)


def grid(cells: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return x and y, (SIDE, SIDE), from -1 to 1 in each of `cells` x `cells` cells."""
    line = ((np.arange(SIDE) + 0.5) / SIDE * cells % 1 * 2 - 1).astype(np.float32)
    return line[None, :], line[:, None]


def finish(image: NDArray[np.floating], draws: np.random.Generator) -> NDArray[np.uint8]:
    """Add pixel noise to images (B, H, W, 3) in [0, 1]."""
    return ((image + 0.04 * draws.standard_normal(image.shape, dtype=np.float32)).clip(0, 1) * 255).astype(np.uint8)


def mosaic(labels: NDArray[np.int64], classes: int, seed: int) -> NDArray[np.uint8]:
    """A class lays 4 x 4 ellipses out of a vocabulary of 16; half of an instance's are random, all vary in pose and colour."""
    draws, B = np.random.default_rng(seed), len(labels)
    words = uniform(derive_seed("mosaic words"), np.arange(16), 9)
    layout = (uniform(derive_seed("mosaic"), np.arange(classes), 16) * 16).astype(int)[labels]
    word = words[np.where(draws.random((B, 16)) < 0.5, draws.integers(0, 16, (B, 16)), layout)]  # (B, 16, 9)
    word = word.reshape(B, 4, 4, 9).repeat(8, 1).repeat(8, 2).astype(np.float32)  # (B, 32, 32, 9)
    jitter = draws.standard_normal((B, 4, 4, 6)).astype(np.float32).repeat(8, 1).repeat(8, 2)
    x, y = grid(4)
    dx, dy = x - 0.2 * jitter[..., 0], y - 0.2 * jitter[..., 1]
    angle = np.pi * word[..., 0] + 0.5 * jitter[..., 2]
    u, v = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    mask = 1 / (1 + np.exp(5 * (np.hypot(u / (0.4 + 0.5 * word[..., 1]), v / (0.4 + 0.5 * word[..., 2])) - 1)))[..., None]
    texture = np.sin(u * (2 + 7 * word[..., 3]) + 3 * jitter[..., 3])[..., None] * (0.1 + 0.3 * word[..., 4:5])
    ground = 0.5 + 0.2 * draws.standard_normal((B, 1, 1, 3)).astype(np.float32)
    return finish(ground + mask * (word[..., 5:8] + 0.15 * jitter[..., 3:] + texture - ground), draws)


def contours(labels: NDArray[np.int64], classes: int, seed: int) -> NDArray[np.uint8]:
    """A class is a nest of radial outlines (after RCDB); instances vary pose, line width and two grounds' colours."""
    draws, B = np.random.default_rng(seed), len(labels)
    shape = uniform(derive_seed("contours"), np.arange(classes), 14)[labels].astype(np.float32)[:, :, None, None]
    x, y = grid(1)
    z = draws.standard_normal((5, B, 1, 1)).astype(np.float32)
    dx, dy = (x - 0.2 * z[0]) * np.exp(0.25 * z[2]), (y - 0.2 * z[1]) * np.exp(0.25 * z[3])
    radius, angle = np.hypot(dx, dy), np.arctan2(dy, dx) + 0.4 * z[4]
    rim = np.full_like(radius, 0.45)
    for k in range(1, 7):
        rim += 0.3 / math.sqrt(k) * (shape[:, k - 1] - 0.5) * np.cos(k * angle + 2 * np.pi * shape[:, k + 5])
    lines = 2 + np.floor(5 * shape[:, 12])
    ink = np.clip(np.cos(2 * np.pi * lines * radius / rim) * 2 + draws.random((B, 1, 1)) - 0.5, 0, 1) * (radius < rim * 1.1)
    first, second = draws.random((2, B, 1, 1, 3), dtype=np.float32)
    return finish(first + (second - first) * ink[..., None], draws)


def textures(labels: NDArray[np.int64], classes: int, seed: int) -> NDArray[np.uint8]:
    """A class is four warped waves through a colour map, over the whole image; instances vary phase, angle, scale, colour."""
    draws, B = np.random.default_rng(seed), len(labels)
    u = uniform(derive_seed("textures"), np.arange(classes), 18)[labels].astype(np.float32)[:, :, None, None]
    x, y = grid(1)
    total = np.zeros((B, SIDE, SIDE), np.float32)
    for k in range(4):
        angle = 2 * np.pi * u[:, k] + 0.2 * draws.standard_normal((B, 1, 1))
        frequency = (0.5 + 5 * u[:, 4 + k]) * np.exp(0.2 * draws.standard_normal((B, 1, 1)))
        turns = frequency * (np.cos(angle) * x + np.sin(angle) * y)
        total = total + u[:, 8 + k] * np.sin(2 * np.pi * (turns + draws.random((B, 1, 1))) + 1.5 * total)
    colours = u[:, 12:18, 0, 0] + 0.15 * draws.standard_normal((B, 6), dtype=np.float32)
    blend = 0.5 + 0.5 * np.tanh(total)[..., None]
    return finish(colours[:, None, None, :3] * blend + colours[:, None, None, 3:] * (1 - blend), draws)


def corpus(name: str, *, classes: int, examples: int, split: str) -> Pair:
    """Return a candidate's images and labels."""
    source = ShapesSource(classes=classes, examples=examples, image_size=(SIDE, SIDE), seed=0, split=split)
    if name == "objects":
        return source.batch(np.arange(examples))
    painter = {"mosaic": mosaic, "contours": contours, "textures": textures}[name]
    labels = source.label_of(np.arange(examples))
    chunks = range(0, examples, 256)
    return np.concatenate([painter(labels[i : i + 256], classes, derive_seed(name, split, i)) for i in chunks]), labels


def folders(root: Path) -> Pair:
    """Read class folders, in a fixed shuffled order."""
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    files = [(file, k) for k, folder in enumerate(classes) for file in sorted(folder.iterdir())]
    order = np.random.default_rng(0).permutation(len(files))
    images = np.stack([np.asarray(Image.open(files[i][0]).convert("RGB")) for i in order])
    return images, np.array([files[i][1] for i in order])


def digits() -> tuple[Pair, Pair]:
    """Return scikit-learn's digits at 32 px: 1,297 to train on, 500 to test on."""
    data, labels = load_digits(return_X_y=True)
    images = (data.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in images])
    large, order = large[..., None].repeat(3, -1), np.random.default_rng(0).permutation(len(labels))
    return (large[order[500:]], labels[order[500:]]), (large[order[:500]], labels[order[:500]])


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class SmallViT(nn.Module):
    """A ViT with learned positions and mean pooling."""

    def __init__(self, *, patch: int, width: int, depth: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, patch, patch)
        self.pos = nn.Parameter(0.02 * torch.randn(1, (SIDE // patch) ** 2, width))
        self.blocks = nn.Sequential(*[Block(width=width, heads=width // 32) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2) + self.pos
        return self.head(self.norm(self.blocks(x)).mean(1))


def batch_of(images: NDArray[np.uint8], augment: bool) -> Tensor:
    """Scale images to [-1, 1], (B, 3, H, W); augmented by a flip and a shift of up to 4 px."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    if not augment:
        return x
    x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
    padded = F.pad(x, (4, 4, 4, 4), value=0.0)
    shifts = torch.randint(0, 9, (len(x), 2)).tolist()
    return torch.stack([image[:, r : r + SIDE, c : c + SIDE] for image, (r, c) in zip(padded, shifts)])


def train(
    model: SmallViT, train_set: Pair, test_set: Pair, *, images_seen: int, batch_size: int, lr: float, augment: bool, seed: int
) -> float:
    """Train with AdamW, warm-up and a cosine; return the accuracy on the test set, in percent."""
    torch.manual_seed(seed)
    B, (x, y) = batch_size, train_set
    kernels = [p for p in model.parameters() if p.ndim in (2, 4)]
    others = [p for p in model.parameters() if p.ndim not in (2, 4)]
    groups = [dict(params=kernels, weight_decay=0.05), dict(params=others, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)
    steps, queue = images_seen // B, torch.empty(0, dtype=torch.long)
    for step in range(steps):
        scale = min((step + 1) / (0.1 * steps), 0.5 + 0.5 * math.cos(math.pi * max(0.0, step / steps - 0.1) / 0.9))
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
        if len(queue) < B:
            queue = torch.randperm(len(y))
        chosen, queue = queue[:B].numpy(), queue[B:]
        loss = F.cross_entropy(model(batch_of(x[chosen], augment)), torch.from_numpy(y[chosen]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        x, y = test_set
        guesses = np.concatenate([model(batch_of(x[i : i + 500], False)).argmax(1).numpy() for i in range(0, len(y), 500)])
    return 100 * float((guesses == y).mean())


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--cifar10", type=Path, help="class folders of CIFAR-10")
    cli.add_argument("--arms", nargs="+", default=["scratch", "objects", "mosaic", "contours", "textures"])
    cli.add_argument("--classes", type=int, default=100)
    cli.add_argument("--patch", type=int, default=8)
    cli.add_argument("--width", type=int, default=96)
    cli.add_argument("--depth", type=int, default=4)
    cli.add_argument("--pretrain-images", type=int, default=40_000)
    cli.add_argument("--cifar10-images", type=int, default=30_000, help="images seen in fine-tuning")
    cli.add_argument("--cifar10-subset", type=int, default=15_000, help="different images")
    cli.add_argument("--digits-images", type=int, default=6_485, help="images seen: 5 epochs")
    cli.add_argument("--batch-size", type=int, default=64, help="of all training")
    cli.add_argument("--pretrain-lr", type=float, default=1e-3)
    cli.add_argument("--lr", type=float, nargs="+", default=[1e-3], help="of fine-tuning and scratch")
    cli.add_argument("--seed", type=int, default=0)
    cli.add_argument("--out", type=Path, help="append JSON lines here")
    args = cli.parse_args()
    torch.set_num_threads(1)
    tasks = {"digits": (*digits(), args.digits_images, False)}
    if args.cifar10:
        (x, y), (test_x, test_y), n = folders(args.cifar10 / "train"), folders(args.cifar10 / "test"), args.cifar10_subset
        tasks["cifar10"] = ((x[:n], y[:n]), (test_x[:5000], test_y[:5000]), args.cifar10_images, True)
    sizes = dict(patch=args.patch, width=args.width, depth=args.depth)
    for arm in args.arms:
        began = time.perf_counter()
        torch.manual_seed(args.seed)
        model = SmallViT(**sizes, classes=args.classes)
        row = {"arm": arm, **{k: v for k, v in vars(args).items() if k not in ("arms", "out", "cifar10")}}
        if arm != "scratch":
            seen = corpus(arm, classes=args.classes, examples=args.pretrain_images, split="train")
            held_out = corpus(arm, classes=args.classes, examples=1000, split="val")
            budget = dict(images_seen=args.pretrain_images, batch_size=args.batch_size, lr=args.pretrain_lr)
            row["pretrain_top1"] = train(model, seen, held_out, **budget, augment=False, seed=args.seed)
        start = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("head")}
        for task, (train_set, test_set, images_seen, augment) in tasks.items():
            for lr in args.lr:
                model = SmallViT(**sizes, classes=10)
                model.load_state_dict(start, strict=False)
                nn.init.zeros_(model.head.weight)
                budget = dict(images_seen=images_seen, batch_size=args.batch_size, lr=lr)
                row[f"{task}_top1_lr{lr:g}"] = train(model, train_set, test_set, **budget, augment=augment, seed=args.seed)
        row["seconds"] = round(time.perf_counter() - began)
        print(json.dumps(row), flush=True)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
