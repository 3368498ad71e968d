"""The page on scale against torch: parameters, operations, tensors kept, bytes moved; against the paper; and its tables."""

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from vitcli.models.vit import Block, VisionTransformer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
plan = importlib.import_module("scale_plan")

H14 = plan.shape_of("H/14")
WIDTH, HIDDEN, HEADS, TOKENS = 64, 192, 4, 33
TINY = plan.Shape(
    image_size=32,
    patch_size=4,
    width=WIDTH,
    depth=2,
    mlp_dim=HIDDEN,
    num_heads=HEADS,
    num_classes=10,
    representation_size=None,
)
PRODUCTS = ("mm", "addmm", "bmm", "attention")


def block_of(shape: Any) -> Block:
    return Block(
        width=shape.width,
        mlp_dim=shape.mlp_dim,
        num_heads=shape.num_heads,
        dropout=0.0,
        attention_dropout=0.0,
        gelu="tanh",
        layer_norm_eps=1e-6,
    )


def written_out(block: Block, x: Tensor) -> Tensor:
    """Compute a block as a GPU does, whatever the model chooses on a CPU: its attention in one kernel."""
    batch, tokens, width = x.shape
    y = block.norm1(x)
    q, k, v = (part.transpose(1, 2) for part in block.attn.qkv(y).reshape(batch, tokens, 3, HEADS, -1).unbind(2))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        y = F.scaled_dot_product_attention(q, k, v)
    x = x + block.attn.proj(y.transpose(1, 2).reshape(batch, tokens, width))
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x)), approximate="tanh"))  # type: ignore[no-any-return]


class Streamed(TorchDispatchMode):
    """Counts operators, and the bytes that those which are no matrix product read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs, outputs = (
            [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in ((args, kwargs), result)
        )
        if any(returned.alias_info is not None and not returned.alias_info.is_write for returned in function._schema.returns):
            return result  # a view
        self.operators += 1
        name = function._schema.name.split("::")[1]
        if name not in PRODUCTS and "attention" not in name:
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in (*inputs, *outputs))
        return result


def run(blocks: list[Block], batch: int) -> tuple[int, Streamed, Streamed]:
    """Run blocks forward and backward under autocast; return the bytes kept in between, and what either pass moved."""
    weights = {parameter.untyped_storage().data_ptr() for block in blocks for parameter in block.parameters()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(batch, TOKENS, WIDTH, requires_grad=True)
    forward, backward = Streamed(), Streamed()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16), forward:
        y = x
        for block in blocks:
            y = written_out(block, y)
    total = y.sum()
    with backward:
        total.backward()
    for block in blocks:
        block.zero_grad()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for place, size in storages.items() if place not in weights), forward, backward


def one_block(batch: int) -> tuple[int, int, int, int]:
    """Return the bytes kept, those moved forward and backward, and the operators, of the second of two blocks.

    The first one's gradient arrives as any block's does but the last's.
    """
    blocks = [block_of(TINY), block_of(TINY)]
    (kept_1, forward_1, backward_1), (kept_2, forward_2, backward_2) = run(blocks[:1], batch), run(blocks, batch)
    operators = forward_2.operators + backward_2.operators - forward_1.operators - backward_1.operators
    return kept_2 - kept_1, forward_2.bytes - forward_1.bytes, backward_2.bytes - backward_1.bytes, operators


def test_the_block_written_out_is_the_model_s() -> None:
    block, x = block_of(TINY), torch.randn(2, TOKENS, WIDTH)
    torch.testing.assert_close(written_out(block, x), block(x))


def test_bytes_and_operators_of_a_block_are_torchs() -> None:
    small, large = one_block(8), one_block(16)
    # the difference between two batches: what does not grow with them (casts of weights) drops out
    kept, forward, backward = ((more - less) / (8 * TOKENS) for more, less in zip(large[:3], small[:3]))
    assert kept == plan.saved_bytes_per_token(TINY)
    assert (forward, backward) == pytest.approx(plan.streamed_bytes_per_token(TINY), rel=0.02)
    assert large[3] == plan.OPERATORS_PER_BLOCK


@pytest.mark.parametrize("shape", [TINY, H14, plan.shape_of("L/16", num_classes=21_843)], ids=["tiny", "H/14", "L/16"])
def test_parameters_are_the_models(shape: Any) -> None:
    with torch.device("meta"):
        model = VisionTransformer(**{**vars(shape), "image_size": (shape.image_size, shape.image_size)})
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters
    assert sum(parameter.numel() for parameter in model.blocks[0].parameters()) == shape.block_parameters


def test_flops_of_a_block_are_torchs() -> None:
    block, deeper = block_of(TINY), plan.Shape(**{**vars(TINY), "depth": TINY.depth + 1})
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        block(torch.randn(1, TINY.tokens, WIDTH))
    counted = counter.get_flop_counts()["Global"]
    assert counted[torch.ops.aten.bmm] == deeper.attention_flops - TINY.attention_flops
    assert sum(counted.values()) == deeper.flops - TINY.flops


def test_the_paper_and_open_clip_say_the_same() -> None:
    assert plan.training_exaflops(H14) == pytest.approx(plan.PAPER_EXAFLOPS, rel=0.002)  # ViT (2010.11929) Table 6
    # open_clip's table of its own models, GFLOPs of the image towers, which end in a projection to 1,024
    for variant, gflops in (("H/14", 334.59), ("g/14", 534.06), ("G/14", 967.5), ("L/14", 162.03)):
        shape = plan.shape_of(variant, num_classes=1024)
        assert shape.flops / 1e9 == pytest.approx(gflops, rel=0.002)


@pytest.mark.parametrize("kind", ["all_reduce", "all_gather", "reduce_scatter"])
@pytest.mark.parametrize("gpu", plan.GPUS, ids=lambda gpu: gpu.name)
def test_collectives(gpu: Any, kind: str) -> None:
    def seconds(size: float, ranks: int) -> float:
        return plan.collective_seconds(gpu, kind, size, ranks=ranks)  # type: ignore[no-any-return]

    assert seconds(1e9, 1) == 0.0
    large, factor = 1e13, 2 if kind == "all_reduce" else 1
    for ranks, bus in ((8, gpu.node_bus), (64, min(gpu.node_bus, 8 * gpu.adapter))):
        # nccl-tests' definition of bus bandwidth: size x factor (n-1)/n / time
        assert large * factor * (ranks - 1) / ranks / seconds(large, ranks) == pytest.approx(bus, rel=0.01)
    assert seconds(1e6, 8) < seconds(1e6, 64) < seconds(1e6, 512)  # latency
    assert seconds(1e6, 64) < seconds(1e8, 64) < seconds(1e9, 64)


def test_bytes_sent() -> None:
    once = plan.sent_bytes(H14, "ddp", ranks=8, micro_batches=1)
    assert once == pytest.approx(2 * 7 / 8 * 4 * H14.parameters)
    assert plan.sent_bytes(H14, "ddp", ranks=8, micro_batches=4) == once
    assert plan.sent_bytes(H14, "fsdp", ranks=8, micro_batches=1) == pytest.approx(once, rel=0.03)
    assert plan.sent_bytes(H14, "fsdp", ranks=8, micro_batches=4) == pytest.approx(4 * once, rel=0.03)


@pytest.mark.parametrize("parallel", plan.PARALLEL)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_largest_micro_batch_fits_and_one_image_more_does_not(parallel: str, checkpointing: bool) -> None:
    most = plan.largest_micro_batch(H14, plan.A100, parallel, ranks=8, checkpointing=checkpointing)
    limit = plan.USABLE * plan.A100.memory_bytes

    def taken(images: int) -> float:
        return sum(plan.memory_parts(H14, parallel, ranks=8, images=images, checkpointing=checkpointing).values())

    assert taken(most) <= limit < taken(most + 1)


def test_memory() -> None:
    ddp = plan.memory_parts(H14, "ddp", ranks=64, images=1)
    assert ddp["weights"] + ddp["gradients"] + ddp["moments"] == 16 * H14.parameters
    shares = [sum(plan.memory_parts(H14, "fsdp", ranks=ranks, images=1).values()) for ranks in (8, 64, 512)]
    assert shares == sorted(shares, reverse=True) and shares[0] < sum(ddp.values())
    kept = [plan.activation_bytes(H14, images=8, checkpointing=on) for on in (True, False)]
    assert 4 < kept[1] / kept[0] < 10
    assert plan.choose_micro_batch(plan.shape_of("e/14"), plan.A100, "ddp", ranks=8, images=512) == 2


def test_an_estimate_adds_up() -> None:
    for gpu in plan.GPUS:
        for parallel in plan.PARALLEL:
            row = plan.estimate(H14, gpu, parallel, ranks=64)
            assert row.micro_batch * row.micro_batches >= plan.BATCH_SIZE / 64
            assert row.step_seconds >= row.compute_seconds + row.weight_seconds
            done = 3 * H14.flops * row.images_per_second / 64
            assert row.utilisation == pytest.approx(done / gpu.peak_flops)
            assert 0 < row.utilisation < gpu.matmul_share
    assert plan.estimate(H14, plan.A100, "ddp", ranks=1).exposed_seconds == 0.0


def test_checkpointing_costs_a_third_of_the_time() -> None:
    plain, again = (sum(plan.pass_seconds(H14, plan.H100, images=1, checkpointing=on)) for on in (False, True))
    assert again / plain == pytest.approx(4 / 3, rel=0.05)


def test_every_rate_has_its_source() -> None:
    assert all("https://" in source for source in plan.SOURCES.values())
    assert plan.measured_utilisation(plan.A100) == pytest.approx(0.39, abs=0.01)
    assert math.isclose(plan.paper_utilisation(), 4262e18 / (2500 * 86_400 * 61.5e12))


def test_the_page_shows_what_the_script_prints() -> None:
    page = (ROOT / "docs" / "explanation" / "vit-h14-on-paper.md").read_text(encoding="utf-8")
    shown = page.partition("<!-- scale plan: begin -->\n")[2].partition("<!-- scale plan: end -->")[0].strip()
    lines, rows = plan.report(H14, gpus=[8, 64, 512], batch_size=plan.BATCH_SIZE)
    assert shown == "\n".join(lines)
    assert len(rows) == 16
    for source in plan.SOURCES.values():
        assert source in page
