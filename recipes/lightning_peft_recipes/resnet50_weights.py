"""ImageNet weights of ResNet-50 as Keras ships them, put into timm's ResNet-50."""

from __future__ import annotations

import json
import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from lightning_peft.assets import open_member, open_members
from lightning_peft_recipes.assets import RESNET50

_FOLDER = "package/ResNet50/"
_MEANS = (123.68, 116.779, 103.939)  # red, green, blue, subtracted from pixels of 0 to 255 by the original
_BLOCKS = (3, 4, 6, 3)


def load_resnet50(network: nn.Module) -> None:
    """Load the weights into a timm ``resnet50``, all but its head, in place.

    The original strides in the first convolution of a stage, has another epsilon, convolution biases, blue before red, and
    wants pixels from 0 to 255 minus a mean colour. All of that is worked into the network, so that it takes images normalised
    with mean = std = 0.5 like the other networks here. At the very edge of an image the padding is grey instead of the mean
    colour.

    Args:
        network: ``timm.create_model("resnet50")`` with any number of classes.
    """
    stored = _stored()
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-3
    state = network.state_dict()
    _fill(state, stored, "conv1", "bn1", "conv1", "bn_conv1")
    for stage, blocks in enumerate(_BLOCKS, 1):
        for block in range(blocks):
            ours, theirs = f"layer{stage}.{block}.", f"{stage + 1}{'abcdef'[block]}_branch"
            for index, letter in enumerate("abc", 1):
                _fill(state, stored, f"{ours}conv{index}", f"{ours}bn{index}", f"res{theirs}2{letter}", f"bn{theirs}2{letter}")
            if block == 0:
                _fill(state, stored, f"{ours}downsample.0", f"{ours}downsample.1", f"res{theirs}1", f"bn{theirs}1")
    first = state["conv1.weight"].flip(1)
    shift = 127.5 - torch.tensor(_MEANS)
    state["bn1.running_mean"] = state["bn1.running_mean"] - (first * shift[:, None, None]).sum((1, 2, 3))
    state["conv1.weight"] = 127.5 * first
    for stage in range(2, 5):
        block = network.get_submodule(f"layer{stage}.0")
        block.conv1.stride, block.conv2.stride = (2, 2), (1, 1)
    network.load_state_dict(state)


def _fill(state: dict[str, Tensor], stored: dict[str, Tensor], conv: str, norm: str, their_conv: str, their_norm: str) -> None:
    kernel = stored[f"{their_conv}/kernel"].permute(3, 2, 0, 1)
    if state[f"{conv}.weight"].shape != kernel.shape:
        raise RuntimeError(f"{RESNET50.filename}: {their_conv} has shape {tuple(kernel.shape)}, which does not fit {conv}")
    state[f"{conv}.weight"] = kernel.contiguous()
    state[f"{norm}.weight"], state[f"{norm}.bias"] = stored[f"{their_norm}/gamma"], stored[f"{their_norm}/beta"]
    state[f"{norm}.running_mean"] = stored[f"{their_norm}/moving_mean"] - stored[f"{their_conv}/bias"]
    state[f"{norm}.running_var"] = stored[f"{their_norm}/moving_variance"]


@lru_cache(maxsize=1)
def _stored() -> dict[str, Tensor]:
    """Tensors by Keras name, read from the shards that the manifest lists."""
    manifest = json.load(open_member(RESNET50, f"{_FOLDER}model.json"))["weightsManifest"]
    tensors = {}
    for group in manifest:
        parts = open_members(RESNET50, [_FOLDER + path for path in group["paths"]])
        data = bytearray(b"".join(part.getvalue() for part in parts))
        offset = 0
        for entry in group["weights"]:
            count = math.prod(entry["shape"])
            tensors[entry["name"]] = torch.frombuffer(data, dtype=torch.float32, count=count, offset=offset).view(
                entry["shape"]
            )
            offset += 4 * count
    return tensors
