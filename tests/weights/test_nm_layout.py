"""Along which dimension groups run, layer type by layer type."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from lightning_peft.network.nm_layers import input_dim
from lightning_peft.weights.nm import nm_mask
from lightning_peft.weights.nm_layout import density, group_view, remainder


@pytest.mark.parametrize(
    ("layer", "dim"),
    [
        (nn.Linear(8, 4), 1),
        (nn.Conv1d(8, 4, 3), 1),
        (nn.Conv2d(8, 4, 3, groups=2), 1),
        (nn.Conv3d(8, 4, 1), 1),
        (nn.ConvTranspose1d(8, 4, 3), 0),
        (nn.ConvTranspose2d(8, 4, 3), 0),
        (nn.ConvTranspose3d(8, 4, 3), 0),
    ],
)
def test_input_dim_is_the_dimension_of_the_inputs(layer: nn.Module, dim: int) -> None:
    assert input_dim(layer) == dim
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    assert layer.weight.shape[dim] * getattr(layer, "groups", 1) == inputs


def test_transformers_conv1d_is_found_without_importing_transformers() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    layer = conv1d(4, 8)  # nf outputs, nx inputs
    assert input_dim(layer) == 0
    assert layer.weight.shape == (8, 4)
    mask = nm_mask(layer.weight, 2, 4, input_dim(layer))
    assert torch.equal(mask.t(), nm_mask(layer.weight.t().contiguous(), 2, 4))


@pytest.mark.parametrize("layer", [nn.Embedding(4, 8), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(8, 8, 3, groups=2)])
def test_unsupported_layer_lists_the_supported(layer: nn.Module) -> None:
    with pytest.raises(MisconfigurationException, match=r"Supported: Linear, Conv1d.*exclude="):
        input_dim(layer)


def test_convolution_groups_are_the_channels_last_groups() -> None:
    layer = nn.Conv2d(8, 4, 3)
    mask = nm_mask(layer.weight, 2, 4, input_dim(layer))
    flat = layer.weight.detach().permute(0, 2, 3, 1).reshape(-1, 4)
    pruned = flat.abs().argsort(dim=1, stable=True)[:, :2]
    expected = torch.ones_like(flat, dtype=torch.bool).scatter_(1, pruned, False).view(4, 3, 3, 8).permute(0, 3, 1, 2)
    assert torch.equal(mask, expected)


def test_group_view_is_a_view_without_the_remainder() -> None:
    weight = torch.arange(2 * 10.0).view(2, 10)
    groups = group_view(weight, 4, 1)
    assert groups.shape == (2, 2, 4)
    assert groups.data_ptr() == weight.data_ptr()
    assert groups[1, 1].tolist() == [14, 15, 16, 17]
    assert remainder(10, 4) == 2
    assert group_view(weight, 16, 1).numel() == 0


def test_density() -> None:
    assert density(nm_mask(torch.randn(4, 8), 1, 4)) == 0.25
    assert density(torch.zeros(0)) == 1.0
