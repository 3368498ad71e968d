"""What does pretraining ViT-H/14 on JFT-300M take on 8, 64 and 512 GPUs? On paper, from formulas and public hardware figures.

    python scripts/scale_plan.py                    # the tables of docs/explanation/vit-h14-on-paper.md
    python scripts/scale_plan.py --model e/14 --gpus 64 256 --batch-size 8192 --checkpointing
    python scripts/scale_plan.py --json plan.json   # every number behind them

Each function below is one formula; that page says what they leave out. Bytes and seconds are per GPU, FLOPs count a
multiply-add twice. GB is 10^9 bytes. Nothing here was measured by us; SOURCES says who measured what.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from vitcli.model_config import parse_variant

Parallel = Literal["ddp", "fsdp"]
PARALLEL: tuple[Parallel, ...] = ("ddp", "fsdp")
Collective = Literal["all_reduce", "all_gather", "reduce_scatter"]
GB = 1e9
GPUS_PER_NODE = 8
BUCKET_BYTES = 25 * 2**20  # of DistributedDataParallel, torch's default
USABLE = 0.90  # share of a GPU's memory; the rest is the CUDA context, NCCL's buffers and what the allocator cannot use
STREAMING = 0.90  # share of the memory bandwidth that element-wise kernels reach: an assumption
ATTENTION_SHARE = 0.25  # of the peak: FlashAttention reaches 25-40 % (2307.08691), and 257 tokens of 80 fill its tiles badly
OPERATORS_PER_BLOCK = 51  # forward and backward, as torch dispatches them; tests/test_scale_plan.py counts them
SECONDS_PER_OPERATOR = 6e-6  # a CPU launching one operator, eager: an assumption

# ViT (2010.11929): section 4.1 and Tables 2, 3 and 6
JFT_IMAGES, JFT_CLASSES, EPOCHS, BATCH_SIZE = 303e6, 18_000, 14, 4096
PAPER_EXAFLOPS, PAPER_CORE_DAYS, TPU_V3_CORE_PEAK = 4262, 2500, 123e12 / 2
CLIP_G14_FLOPS = 581.15e9  # an image and its text, forward (SOURCES)

SOURCES = {
    "A100 peak, memory, NVLink": "https://www.nvidia.com/en-us/data-center/a100/",
    "H100 peak, memory, NVLink (its 1,979 TFLOP/s are with sparsity: half without)": "https://www.nvidia.com/en-us/data-center/h100/",
    "A100 matrix products, 230 of 312 TFLOP/s": "https://github.com/mli/transformers-benchmarks",
    "H100 matrix products, 780 of 989 TFLOP/s": "https://gist.github.com/Chillee/2ec89696db8b7ed1c24461159e325405",
    "A100 node bus, 232 GB/s; 24 GB/s of a 200 Gb/s adapter": "https://github.com/NVIDIA/nccl/issues/1048",
    "H100 node bus, 350 to 360 GB/s": "https://github.com/NVIDIA/nccl/issues/1281",
    "H100 network, 46 to 48 GB/s of a 400 Gb/s adapter": "https://github.com/NVIDIA/nccl-tests/issues/290",
    "DGX A100, 8 x 200 Gb/s": "https://developer.nvidia.com/blog/defining-ai-innovation-with-dgx-a100/",
    "DGX H100, 8 x 400 Gb/s": "https://docs.nvidia.com/dgx-basepod/reference-architecture-infrastructure-foundation-enterprise-ai/"
    "latest/core-components.html",
    "collectives": "NCCL's own cost model, https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc",
    "TPU v3": "https://cloud.google.com/tpu/docs/v3",
    "CLIP g/14 images/s": "https://docs.nvidia.com/nemo-framework/user-guide/latest/multimodalmodels/"
    "visionlanguagefoundation/clip/perf.html",
    "CLIP g/14 FLOPs": "https://github.com/mlfoundations/open_clip/blob/main/docs/model_profile.csv",
}


@dataclass(frozen=True)
class Gpu:
    """One GPU in a node of eight. Peaks are NVIDIA's, the other rates what others measured (SOURCES)."""

    name: str
    peak_flops: float  # per second, bf16, dense
    matmul_share: float  # of the peak, in large matrix products
    memory_bytes: float
    memory_bandwidth: float  # bytes/s
    nvlink: float  # bytes/s, both directions together, as NVIDIA counts
    node_bus: float  # bytes/s: nccl-tests' bus bandwidth inside a node
    network: float  # bytes/s and direction of the GPU's own network adapter
    adapter: float  # bytes/s of it that NCCL reaches
    clip_g14_images: float  # images/s of 8 GPUs: NVIDIA's measurement of a model like ours


A100 = Gpu("A100 80 GB", 312e12, 230 / 312, 80 * GB, 2039 * GB, 600 * GB, 232 * GB, 25 * GB, 24 * GB, 559)
H100 = Gpu("H100 80 GB", 989e12, 780 / 989, 80 * GB, 3350 * GB, 900 * GB, 355 * GB, 50 * GB, 46 * GB, 935)
GPUS = (A100, H100)


# ------------------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True)
class Shape:
    """A Vision Transformer's sizes: all that its costs depend on."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_classes: int
    representation_size: int | None

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def matrix_flops(self) -> int:
        """Of one image, forward, without the products inside attention."""
        dense = 4 * self.width**2 + 2 * self.width * self.mlp_dim  # per token and block: qkv, output projection, MLP
        patches = (self.tokens - 1) * 3 * self.patch_size**2 * self.width
        hidden = self.representation_size or 0
        head = self.width * hidden + (hidden or self.width) * self.num_classes
        return 2 * (self.depth * self.tokens * dense + patches + head)

    @property
    def attention_flops(self) -> int:
        """Of one image, forward: scores, and the weighted sum of values."""
        return 4 * self.depth * self.tokens**2 * self.width

    @property
    def flops(self) -> int:
        """Of one image, forward, as the paper counts: every block for every token."""
        return self.matrix_flops + self.attention_flops

    @property
    def parameters(self) -> int:
        """Patch embedding, class token, positions, blocks, last norm, hidden layer, head."""
        hidden = self.representation_size or 0
        outside = (3 * self.patch_size**2 + 1 + 1 + self.tokens + 2) * self.width
        head = (self.width + 1) * hidden + ((hidden or self.width) + 1) * self.num_classes
        return self.depth * self.block_parameters + outside + head

    @property
    def block_parameters(self) -> int:
        """Two norms, qkv, output projection and MLP with their biases."""
        return 4 * self.width * (self.width + 1) + 2 * self.width * self.mlp_dim + self.mlp_dim + self.width + 4 * self.width


def shape_of(variant: str, *, image_size: int = 224, num_classes: int = JFT_CLASSES) -> Shape:
    """Return a variant as the paper pretrains it: a hidden tanh layer as wide as the model before the head."""
    sizes = {key: parse_variant(variant)[key] for key in ("patch_size", "width", "depth", "mlp_dim", "num_heads")}
    return Shape(image_size=image_size, num_classes=num_classes, representation_size=sizes["width"], **sizes)


# ---------------------------------------------------------------------------------------------------------------- memory


def saved_bytes_per_token(shape: Shape) -> int:
    """What one block keeps of a token between forward and backward pass, under bf16 autocast.

    In float32 the input of each norm (2 x 4 D) and its mean and deviation; in bf16 both norms' outputs, q, k and v, the
    attention's output (6 x 2 D), the hidden layer before and after GELU (2 x 2 M); in float32 the softmax's sum per head.
    """
    return 20 * shape.width + 4 * shape.mlp_dim + 4 * shape.num_heads + 16


def activation_bytes(shape: Shape, *, images: int, checkpointing: bool) -> float:
    """Return what `images` at once keep; with checkpointing each block's input in float32, and all of one block at a time."""
    tokens = images * shape.tokens
    block = tokens * saved_bytes_per_token(shape)
    inputs = tokens * 4 * shape.width
    outside = images * (3 * 4 * shape.image_size**2 + 5 * 4 * shape.num_classes) + 2 * inputs  # pixels; logits, loss; ends
    return outside + (shape.depth * inputs + block if checkpointing else shape.depth * block) + block  # + gradients of one


def memory_parts(shape: Shape, parallel: Parallel, *, ranks: int, images: int, checkpointing: bool = False) -> dict[str, float]:
    """Return bytes by what they are for. Weights, gradients and Adam's moments are float32: 16 bytes a parameter.

    DDP: all of it on every GPU, and autocast's bf16 copies of the weights. FSDP: a share of it, and two blocks whole in bf16,
    with gradients in bf16 and, on their way to the reduction, float32; what is no block (head, embeddings) whole in float32.
    """
    count = shape.parameters
    outside = count - shape.depth * shape.block_parameters
    share = 1 if parallel == "ddp" else ranks
    parts = {"weights": 4 * count / share, "gradients": 4 * count / share, "moments": 8 * count / share}
    if parallel == "ddp":
        parts["copies"] = 2.0 * count
    else:
        parts["copies"] = 2.0 * (2 + 2 + 4) * shape.block_parameters + (4 + 2 + 4) * outside
    parts["activations"] = activation_bytes(shape, images=images, checkpointing=checkpointing)
    return parts


def largest_micro_batch(shape: Shape, gpu: Gpu, parallel: Parallel, *, ranks: int, checkpointing: bool = False) -> int:
    """Return how many images at once fit in one GPU; 0 where not one does."""

    def taken(images: int) -> float:
        return sum(memory_parts(shape, parallel, ranks=ranks, images=images, checkpointing=checkpointing).values())

    return max(0, int((USABLE * gpu.memory_bytes - taken(0)) / (taken(1) - taken(0))))  # memory is linear in images


def choose_micro_batch(
    shape: Shape, gpu: Gpu, parallel: Parallel, *, ranks: int, images: int, checkpointing: bool = False
) -> int | None:
    """Return the largest equal share of a GPU's `images` of a step that fits, or None where not one image does."""
    most = largest_micro_batch(shape, gpu, parallel, ranks=ranks, checkpointing=checkpointing)
    return math.ceil(images / math.ceil(images / most)) if most else None


# --------------------------------------------------------------------------------------------------------- communication


def sent_bytes(shape: Shape, parallel: Parallel, *, ranks: int, micro_batches: int) -> float:
    """Return the bytes a GPU sends in one step; it receives as many.

    DDP sums float32 gradients once a step: 2 (R-1)/R x 4 P. FSDP gathers weights, bf16 of the blocks, in the forward and in
    the backward pass of every micro-batch and reduces float32 gradients after each: (R-1)/R x (2 + 2 + 4) P of the blocks,
    (4 + 4 + 4) P of the rest. For one micro-batch that is as much as DDP's, nearly.
    """
    apart = (ranks - 1) / ranks
    if parallel == "ddp":
        return 2 * apart * 4 * shape.parameters
    blocks = shape.depth * shape.block_parameters
    return micro_batches * apart * (8 * blocks + 12 * (shape.parameters - blocks))


def collective_seconds(gpu: Gpu, kind: Collective, size_bytes: float, *, ranks: int) -> float:
    """Return how long NCCL takes by its own cost model (SOURCES): the best of ring and tree, with its two fast protocols.

    A ring passes once (all-gather, reduce-scatter) or twice (all-reduce) through all GPUs and pays a latency for each: what
    makes it slow with many. A tree pays for the depth of the tree, but NCCL has it for all-reduce alone. Without in-network
    reduction (SHARP) and without NVLink SHARP.
    """
    if ranks == 1:
        return 0.0
    nodes, local = max(1, ranks // GPUS_PER_NODE), min(ranks, GPUS_PER_NODE)
    bus = gpu.node_bus if nodes == 1 else min(gpu.node_bus, local * gpu.adapter)
    rounds = 2 if kind == "all_reduce" else 1
    steps, between = rounds * (ranks - 1), rounds * (nodes - 1)
    times = []
    # microseconds: start, a step inside the node, a step between nodes; then the protocol's share of the bandwidth
    for start, inside, outside, share in ((14.0, 1.9, 4.0, 0.92), (8.4, 3.4, 14.0, 1.0)):  # LL128, Simple
        plateau = 1.4 if kind == "all_reduce" and nodes > 1 and share == 1.0 else 1.0
        latency = plateau * (start + (steps - between) * inside + between * outside)
        times.append(latency * 1e-6 + size_bytes * steps / ranks / (bus * share))
    if kind == "all_reduce" and nodes > 1:
        for start, inside, outside, share in ((14.0, 1.25, 8.5, 0.92 * 0.9375 * 0.9), (8.4, 4.0, 14.0, 0.92 * 0.7)):
            latency = start + 2 * ((local - 1) * inside + math.log2(nodes) * outside)
            times.append(latency * 1e-6 + size_bytes * 2 / (bus * share))
    return min(times)


# ------------------------------------------------------------------------------------------------------------------ time


def streamed_bytes_per_token(shape: Shape) -> tuple[int, int]:
    """Return the bytes that a block's element-wise operators read and write per token, forward and backward.

    Norms, GELU, residual sums, casts between float32 and bf16, sums for bias gradients: each reads and writes memory once.
    """
    return 48 * shape.width + 4 * shape.mlp_dim, 94 * shape.width + 8 * shape.mlp_dim


def image_seconds(shape: Shape, gpu: Gpu) -> dict[str, tuple[float, float]]:
    """Return the seconds of an image's forward and backward pass by what they are spent on, from the GPU's rates.

    A backward pass has twice the forward's matrix products; flash attention's, which computes the scores again, 2.5 times.
    """
    products = shape.matrix_flops / (gpu.peak_flops * gpu.matmul_share)
    attention = shape.attention_flops / (gpu.peak_flops * ATTENTION_SHARE)
    tokens = shape.tokens * shape.depth
    forward, backward = (tokens * streamed / (gpu.memory_bandwidth * STREAMING) for streamed in streamed_bytes_per_token(shape))
    return {
        "matrix products": (products, 2 * products),
        "attention": (attention, 2.5 * attention),
        "element-wise": (forward, backward),
    }


def pass_seconds(shape: Shape, gpu: Gpu, *, images: int, checkpointing: bool = False) -> tuple[float, float]:
    """Return the seconds of a forward and of a backward pass; checkpointing puts a forward before each backward pass."""
    forward, backward = (images * sum(parts) for parts in zip(*image_seconds(shape, gpu).values()))
    return forward, backward + (forward if checkpointing else 0.0)


@dataclass(frozen=True)
class Estimate:
    """One step of one choice. Seconds of what overlaps do not add up to `step_seconds`."""

    gpu: Gpu
    gpus: int
    parallel: Parallel
    checkpointing: bool
    micro_batch: int
    micro_batches: int
    memory: dict[str, float]
    sent_bytes: float
    compute_seconds: float  # forward and backward
    weight_seconds: float  # casting weights, accumulating gradients, the optimiser: whatever passes over all parameters
    launch_seconds: float  # the CPU's, beside the GPU's work
    communication_seconds: float
    exposed_seconds: float  # of it, what the GPU waits for
    step_seconds: float
    images_per_second: float  # of all GPUs
    utilisation: float  # model FLOPs over peak

    @property
    def memory_bytes(self) -> float:
        return sum(self.memory.values())


def estimate(
    shape: Shape,
    gpu: Gpu,
    parallel: Parallel,
    *,
    ranks: int,
    batch_size: int = BATCH_SIZE,
    checkpointing: bool = False,
) -> Estimate | None:
    """Work out one step, or return None where not one image fits.

    Gradients are summed while the last micro-batch's backward pass runs (DDP, in buckets), or weights gathered while the block
    before computes (FSDP): only what is longer than the computing beside it is waited for. The last bucket always is.
    """
    images = math.ceil(batch_size / ranks)
    micro = choose_micro_batch(shape, gpu, parallel, ranks=ranks, images=images, checkpointing=checkpointing)
    if micro is None:
        return None
    chunks = math.ceil(images / micro)
    count, blocks = shape.parameters, shape.depth
    forward, backward = pass_seconds(shape, gpu, images=micro, checkpointing=checkpointing)
    stream = gpu.memory_bandwidth * STREAMING
    launch = chunks * blocks * OPERATORS_PER_BLOCK * SECONDS_PER_OPERATOR

    if parallel == "ddp":
        # per micro-batch: weights to bf16 (4 + 2 bytes), gradients to float32 (2 + 4), added to those before (4 + 4 + 4)
        passes = 1.0 * count * (chunks * (6 + 6) + (chunks - 1) * 12)
        optimiser = 1.0 * count * (28 + 4)  # AdamW reads p, g, m, v and writes p, m, v; the norm reads g
        buckets = math.ceil(4 * count / BUCKET_BYTES)
        bucket = collective_seconds(gpu, "all_reduce", min(BUCKET_BYTES, 4 * count), ranks=ranks)
        communication = buckets * bucket
        exposed = max(bucket, communication - backward) if ranks > 1 else 0.0
    else:
        # per micro-batch: gathered weights copied into place twice (2 + 2), gradients to float32 (2 + 4), shares added up
        passes = count * (6 / ranks + chunks * (8 + 6) + (chunks - 1) * 12 / ranks)
        optimiser = count * (28 + 4) / ranks
        block, outside = shape.block_parameters, count - blocks * shape.block_parameters
        gather = blocks * collective_seconds(gpu, "all_gather", 2 * block, ranks=ranks)
        gather += collective_seconds(gpu, "all_gather", 4 * outside, ranks=ranks)
        reduce = blocks * collective_seconds(gpu, "reduce_scatter", 4 * block, ranks=ranks)
        reduce += collective_seconds(gpu, "reduce_scatter", 4 * outside, ranks=ranks)
        communication = chunks * (2 * gather + reduce)
        exposed = chunks * (max(0.0, gather - forward) + max(0.0, gather + reduce - backward))
    weights = (passes + optimiser) / stream
    compute = chunks * (forward + backward)
    step = max(compute + weights, launch) + exposed
    return Estimate(
        gpu=gpu,
        gpus=ranks,
        parallel=parallel,
        checkpointing=checkpointing,
        micro_batch=micro,
        micro_batches=chunks,
        memory=memory_parts(shape, parallel, ranks=ranks, images=micro, checkpointing=checkpointing),
        sent_bytes=sent_bytes(shape, parallel, ranks=ranks, micro_batches=chunks),
        compute_seconds=compute,
        weight_seconds=weights,
        launch_seconds=launch,
        communication_seconds=communication,
        exposed_seconds=exposed,
        step_seconds=step,
        images_per_second=batch_size / step,
        utilisation=3 * shape.flops * batch_size / ranks / (step * gpu.peak_flops),
    )


# -------------------------------------------------------------------------------------------- against what others report


def measured_utilisation(gpu: Gpu) -> float:
    """Return the utilisation of CLIP g/14 on one node that NVIDIA's images per second amount to."""
    return 3 * CLIP_G14_FLOPS * gpu.clip_g14_images / GPUS_PER_NODE / gpu.peak_flops


def realised_share(gpu: Gpu) -> float:
    """Return that measurement over what `pass_seconds` gives for the image tower, 92 % of the model's work."""
    tower = shape_of("g/14")
    seconds = sum(pass_seconds(tower, gpu, images=1))
    return measured_utilisation(gpu) / (3 * tower.flops / seconds / gpu.peak_flops)


def training_exaflops(shape: Shape) -> float:
    """Return the whole run's operations: three forward passes for every image shown."""
    return 3 * EPOCHS * JFT_IMAGES * shape.flops / 1e18


def paper_utilisation() -> float:
    """Return the utilisation behind the paper's 2,500 TPUv3-core-days for ViT-H/14 on JFT-300M."""
    return PAPER_EXAFLOPS * 1e18 / (PAPER_CORE_DAYS * 86_400 * TPU_V3_CORE_PEAK)


# ---------------------------------------------------------------------------------------------------------------- report


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def gigabytes(count: float) -> str:
    return f"{count / GB:.1f}" if count >= 0.1 * GB else f"{count / GB:.2f}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.1f}"


def hardware_table() -> list[str]:
    head = ["", "bf16 peak, TFLOP/s", "reached in products", "memory", "its bandwidth", "NVLink, both directions"]
    head += ["NCCL in a node", "network", "NCCL over it"]
    rates = [[gpu.memory_bandwidth, gpu.nvlink, gpu.node_bus, gpu.network, gpu.adapter] for gpu in GPUS]
    return table(
        head,
        [
            [gpu.name, f"{gpu.peak_flops / 1e12:.0f}", f"{100 * gpu.matmul_share:.0f} %", f"{gpu.memory_bytes / GB:.0f} GB"]
            + [f"{rate / GB:,.0f} GB/s" for rate in row]
            for gpu, row in zip(GPUS, rates)
        ],
    )


def choice(row: Estimate) -> list[str]:
    name = row.parallel.upper() + (", checkpointed" if row.checkpointing else "")
    return [str(row.gpus), name]


def volume_table(rows: Sequence[Estimate]) -> list[str]:
    """Memory and communication: the same for both GPUs."""
    head = ["GPUs", "", "images per GPU and step", "weights, gradients, moments", "copies", "activations", "memory, GB"]
    return table(
        [*head, "sent per step, GB"],
        [
            [
                *choice(row),
                f"{row.micro_batches} x {row.micro_batch}",
                gigabytes(sum(row.memory[part] for part in ("weights", "gradients", "moments"))),
                gigabytes(row.memory["copies"]),
                gigabytes(row.memory["activations"]),
                f"**{gigabytes(row.memory_bytes)}**",
                gigabytes(row.sent_bytes),
            ]
            for row in rows
        ],
    )


def time_table(rows: Sequence[Estimate], *, examples: float) -> list[str]:
    """Milliseconds of one step, images per second, days; utilisation as computed, and times the realised share."""
    head = ["GPU", "GPUs", "", "forward, backward", "over all weights", "communication", "of it waited for", "step"]
    head += ["images/s", "utilisation, %", "days"]
    lines = []
    for row in rows:
        share = realised_share(row.gpu)
        run_days = examples / row.images_per_second / 86_400
        lines.append(
            [
                row.gpu.name,
                *choice(row),
                milliseconds(row.compute_seconds),
                milliseconds(row.weight_seconds),
                milliseconds(row.communication_seconds),
                milliseconds(row.exposed_seconds),
                milliseconds(row.step_seconds),
                f"{row.images_per_second:,.0f}",
                f"{100 * row.utilisation * share:.0f} to **{100 * row.utilisation:.0f}**",
                f"{run_days:.1f} to {run_days / share:.1f}",
            ]
        )
    return table(head, lines)


def fit_table(gpu: Gpu, variants: Sequence[str]) -> list[str]:
    """The largest micro-batch that fits, by model and by what is split."""
    ways: list[tuple[str, Parallel, int, bool]] = [
        ("DDP", "ddp", 8, False),
        ("DDP, checkpointed", "ddp", 8, True),
        ("FSDP, 8 GPUs", "fsdp", 8, False),
        ("FSDP, 64 GPUs, checkpointed", "fsdp", 64, True),
    ]
    lines = []
    for variant in variants:
        shape = shape_of(variant)
        line = [f"ViT-{variant}", f"{shape.parameters / 1e6:,.0f}", gigabytes(16 * shape.parameters)]
        for _, parallel, ranks, checkpointing in ways:
            most = largest_micro_batch(shape, gpu, parallel, ranks=ranks, checkpointing=checkpointing)
            line.append(f"{most:,}" if most else "none")
        lines.append(line)
    return table(["model", "parameters, M", "weights, gradients, moments, GB", *(way[0] for way in ways)], lines)


def where_time_goes(shape: Shape, gpu: Gpu) -> str:
    parts = {name: sum(both) for name, both in image_seconds(shape, gpu).items()}
    total = sum(parts.values())
    shares = ", ".join(f"{name} {100 * seconds / total:.0f} %" for name, seconds in parts.items())
    return f"{gpu.name}: {1e3 * total:.2f} ms an image, of it {shares}"


def hides(shape: Shape, row: Estimate) -> str:
    """Say from how many images per GPU the gradients' sum takes no longer than the backward pass beside it."""
    images = math.ceil(row.communication_seconds / pass_seconds(shape, row.gpu, images=1)[1])
    return f"{row.gpu.name}: from {images} images per GPU and step"


def report(
    shape: Shape, *, gpus: Sequence[int], batch_size: int, checkpointing: bool = False
) -> tuple[list[str], list[Estimate]]:
    """Return the page's tables and every estimate in them."""

    def rows(gpu: Gpu, at: Sequence[int], batch: int) -> list[Estimate]:
        found = [
            estimate(shape, gpu, parallel, ranks=ranks, batch_size=batch, checkpointing=checkpointing)
            for ranks in at
            for parallel in PARALLEL
        ]
        return [row for row in found if row is not None]

    most, larger = max(gpus), 4 * batch_size
    plain = [row for gpu in GPUS for row in rows(gpu, gpus, batch_size)]
    helped = [row for gpu in GPUS for row in rows(gpu, [most], larger)]
    examples = EPOCHS * JFT_IMAGES
    lines = [
        f"{shape.parameters:,} parameters; {shape.flops / 1e9:.1f} GFLOPs an image forward; "
        f"{examples / batch_size:,.0f} steps of {batch_size:,}; {training_exaflops(shape):,.0f} exaFLOPs in all.",
        "",
        "The hardware, eight GPUs to a node:",
        "",
        *hardware_table(),
        "",
        "Memory and communication of one GPU:",
        "",
        *volume_table([row for row in plain if row.gpu is A100]),
        "",
        "Time of one step, ms, and of the run:",
        "",
        *time_table(plain, examples=examples),
        "",
        f"The same with a batch of {larger:,}, which is another recipe:",
        "",
        *time_table(helped, examples=examples),
        "",
        "Where computing goes:",
        "",
        *(f"- {where_time_goes(shape, gpu)}" for gpu in GPUS),
        "",
        f"Where summing gradients over {most} GPUs with DDP hides behind the backward pass:",
        "",
        *(f"- {hides(shape, row)}" for row in plain if row.gpus == most and row.parallel == "ddp"),
        "",
        "Largest micro-batch in 80 GB at 224 px:",
        "",
        *fit_table(A100, ["L/16", "H/14", "g/14", "G/14", "e/14"]),
        "",
        "Utilisation that others measured:",
        "",
        f"- the paper, ViT-H/14 on TPU v3: {100 * paper_utilisation():.0f} %",
        *(f"- NVIDIA, CLIP g/14 on 8 x {gpu.name}: {100 * measured_utilisation(gpu):.0f} %" for gpu in GPUS),
    ]
    return lines, [*plain, *helped]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="H/14")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    lines, rows = report(
        shape_of(arguments.model),
        gpus=arguments.gpus,
        batch_size=arguments.batch_size,
        checkpointing=arguments.checkpointing,
    )
    print("\n".join(lines))
    if arguments.json:
        arguments.json.write_text(json.dumps({"sources": SOURCES, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
