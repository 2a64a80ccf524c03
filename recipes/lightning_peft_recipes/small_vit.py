"""A Vision Transformer small enough to be trained from scratch on CPU, without any BatchNorm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_peft_recipes.classification import ImageClassifier


class SmallViT(ImageClassifier):
    """timm's VisionTransformer behind a few convolutions, trained with cross-entropy on ``(image, label)`` batches.

    Convolutions instead of one linear map of the patches let a Transformer learn in a few epochs what it would otherwise need
    hundreds for (Xiao et al., "Early Convolutions Help Transformers See Better", NeurIPS 2021). All norms are LayerNorm, or
    GroupNorm of one group, its like for feature maps: predictions never depend on the rest of the batch.

    Args:
        image_size: Side of the images in pixels.
        num_classes: Number of classes.
        dim: Width of the Transformer.
        depth: Number of blocks.
        heads: Attention heads.
        mlp_ratio: Hidden width of the blocks' MLPs, as a multiple of ``dim``.
        stem: Output channels of the convolutions before the last, which has ``dim``.
        strides: Stride of each convolution; their product is the side of a token in pixels.
        drop_path_rate: Stochastic depth.
        optimizer: See :class:`~lightning_peft_recipes.classification.Classifier`, as for all that follow.
        lr: Peak learning rate.
        weight_decay: Weight decay of matrices and filters.
        warmup: Share of all steps in which the learning rate rises.
        label_smoothing: Label smoothing of the training loss.

    Raises:
        MisconfigurationException: timm is missing, or the strides do not fit the stem or the image.
    """

    def __init__(
        self,
        image_size: int = 32,
        num_classes: int = 10,
        dim: int = 128,
        depth: int = 6,
        heads: int = 4,
        mlp_ratio: float = 2.0,
        stem: Sequence[int] = (32, 64),
        strides: Sequence[int] = (1, 2, 2),
        drop_path_rate: float = 0.0,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        lr: float = 2e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.1,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__(num_classes, optimizer, lr, 1.0, weight_decay, warmup, label_smoothing)
        self.save_hyperparameters()
        try:
            from timm.models.vision_transformer import VisionTransformer
        except ImportError as error:
            raise MisconfigurationException(f'timm models need: pip install "lightning-peft[vision]" ({error})') from error
        token = math.prod(strides)
        if len(strides) != len(stem) + 1 or image_size % token:
            raise MisconfigurationException(
                f"strides={list(strides)} must be one more than stem={list(stem)}, with a product that divides {image_size}."
            )
        self.model: nn.Module = VisionTransformer(
            img_size=image_size,
            patch_size=token,
            num_classes=num_classes,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            mlp_ratio=mlp_ratio,
            global_pool="avg",
            fc_norm=False,
            drop_path_rate=drop_path_rate,
            embed_layer=partial(ConvStem, channels=tuple(stem), strides=tuple(strides)),
        )

    def head(self) -> nn.Module:
        """The output layer."""
        return self.model.get_classifier()


class ConvStem(nn.Module):
    """Convolutions that turn images into tokens, in place of timm's ``PatchEmbed``.

    Args:
        img_size: Side of the images.
        patch_size: Side of a token in pixels, the product of ``strides``.
        in_chans: Channels of the images.
        embed_dim: Width of the tokens.
        channels: Output channels of the convolutions before the last.
        strides: Stride of each convolution.
        unused: What else timm hands to an embedding.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        channels: Sequence[int],
        strides: Sequence[int],
        **unused: Any,
    ) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        layers: list[nn.Module] = []
        before = in_chans
        for after, stride in zip(channels, strides, strict=False):
            layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.GroupNorm(1, after), nn.GELU()]
            before = after
        self.layers = nn.Sequential(*layers, nn.Conv2d(before, embed_dim, 3, strides[-1], padding=1))

    def forward(self, images: Tensor) -> Tensor:
        """Tokens, shape ``[batch, tokens, embed_dim]``, of images, shape ``[batch, in_chans, img_size, img_size]``."""
        return self.layers(images).flatten(2).transpose(1, 2)
