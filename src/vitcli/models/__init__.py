"""Architectures, and `build_model`, which makes one from the config's `model` section."""

from vitcli.model_config import ModelConfig
from vitcli.models.vit import VisionTransformer

__all__ = ["VisionTransformer", "build_model"]


def build_model(section: ModelConfig, *, image_size: tuple[int, int], num_classes: int) -> VisionTransformer:
    """Build the model a resolved section describes: patch_size, width, depth and num_heads are numbers by now.

    Initial weights come from torch's global generator. Use `with torch.device("meta")` to count parameters without memory.

    Raises:
        ValueError: the section is not resolved, or its sizes do not fit one another.
    """
    patch_size, width, depth, num_heads = section.patch_size, section.width, section.depth, section.num_heads
    if patch_size is None or width is None or depth is None or num_heads is None:
        raise ValueError("the model section is not resolved: patch_size, width, depth or num_heads is missing")
    return VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        depth=depth,
        mlp_dim=section.mlp_dim or 4 * width,
        num_heads=num_heads,
        num_classes=num_classes,
        representation_size=width if section.representation_size == "width" else section.representation_size,
        pool=section.pool,
        pos_embed=section.pos_embed,
        dropout=section.dropout,
        attention_dropout=section.attention_dropout,
        gelu=section.gelu,
        layer_norm_eps=section.layer_norm_eps,
        head_bias=section.head_bias,
    )
