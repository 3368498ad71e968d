"""Architectures, and `build_model`, which makes one from the config's `model` section."""

from vitcli.model_config import ModelConfig
from vitcli.models.mlp import PixelMlp
from vitcli.models.resnet import ResNet, ResNetStem
from vitcli.models.vit import VisionTransformer, attention_maps

__all__ = ["Model", "PixelMlp", "ResNet", "ResNetStem", "VisionTransformer", "attention_maps", "build_model", "build_stem"]

Model = VisionTransformer | ResNet | PixelMlp


def build_model(
    section: ModelConfig, *, image_size: tuple[int, int], num_classes: int, patch_permutation: int | None = None
) -> Model:
    """Build the model a resolved section describes: a Transformer, one after a ResNet stem, a ResNet, or an MLP on pixels.

    With `patch_permutation` it looks at images cut into squares of so many px, in another order (see `PatchPermutation`).

    Initial weights come from torch's global generator. Use `with torch.device("meta")` to count parameters without memory.

    Raises:
        ValueError: the section is not resolved, or its sizes do not fit one another.
    """
    if section.kind == "resnet":
        if section.resnet_units is None or section.resnet_width is None:
            raise ValueError("the model section is not resolved: resnet_units or resnet_width is missing")
        return ResNet(
            image_size=image_size,
            units=section.resnet_units,
            width=section.resnet_width,
            root=section.resnet_root,
            standardisation="bit" if section.weight_standardisation == "auto" else section.weight_standardisation,
            group_norm_eps=1e-5 if section.group_norm_eps is None else section.group_norm_eps,
            group_norm_groups=section.group_norm_groups,
            spatial_units=section.resnet_spatial_units,
            num_classes=num_classes,
            head_bias=section.head_bias,
            patch_permutation=patch_permutation,
        )
    if section.kind == "mlp":
        if section.width is None or section.depth is None:
            raise ValueError("the model section is not resolved: width or depth is missing")
        return PixelMlp(
            image_size=image_size,
            width=section.width,
            depth=section.depth,
            mlp_dim=section.mlp_dim or 4 * section.width,
            num_classes=num_classes,
            dropout=section.dropout,
            gelu=section.gelu,
            layer_norm_eps=section.layer_norm_eps,
            head_bias=section.head_bias,
            patch_permutation=patch_permutation,
        )
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
        pos_embed_at=section.pos_embed_at,
        attention=section.attention,
        distill_token=section.distill_token,
        registers=section.registers,
        layer_scale=section.layer_scale,
        qk_norm=section.qk_norm,
        stochastic_depth=section.stochastic_depth,
        patch_dropout=section.patch_dropout,
        dropout=section.dropout,
        attention_dropout=section.attention_dropout,
        gelu=section.gelu,
        layer_norm_eps=section.layer_norm_eps,
        head_bias=section.head_bias,
        backbone=build_stem(section),
        patch_permutation=patch_permutation,
    )


def build_stem(section: ModelConfig) -> ResNetStem | None:
    """Build the ResNet before a hybrid's Transformer, or return None where the patches are the image's."""
    if section.resnet_units is None:
        return None
    return ResNetStem(
        units=section.resnet_units,
        width=section.resnet_width or 64,
        root=section.resnet_root,
        standardisation="std" if section.weight_standardisation == "auto" else section.weight_standardisation,
        group_norm_eps=1e-6 if section.group_norm_eps is None else section.group_norm_eps,
        group_norm_groups=section.group_norm_groups,
    )
