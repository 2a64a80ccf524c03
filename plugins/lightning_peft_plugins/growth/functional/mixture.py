"""Arithmetic of MixtureGrowth: weights as linear combinations of templates, and two members in one network.

A weight has two halves of rows, one a member, and each half is made of two templates of the member's own shape. The stored
tensor, of the shape of the weight, holds these four templates as its four blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_peft.arguments import one_of

CROSS_RULES = ("orthogonal", "copy", "zero", "random")


def mix_templates(templates: Tensor, coefficients: Tensor) -> Tensor:
    """Combine templates into a weight.

    Args:
        templates: Four blocks, ``(2 rows, 2 columns, ...)``: the templates of member ``m`` are the two blocks of its rows.
        coefficients: ``(2, 2, 2)``: what block ``[m, j]`` of the weight takes of each template of member ``m``.

    Returns:
        The weight, of the shape of ``templates``. With ``coefficients[m, j, k] = (j == k)`` it is ``templates``, bit for bit.

    Example:
        >>> own = torch.tensor([[[1.0, 1.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, -1.0]]])
        >>> mix_templates(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), own)
        tensor([[ 3.,  0.],
                [ 0., -1.]])
    """
    rows, columns = templates.shape[0] // 2, templates.shape[1] // 2
    blocks = templates.reshape(2, rows, 2, columns, -1)
    # Products and not einsum, which autocast would round to half precision.
    shares = coefficients[:, None, :, :, None, None]
    mixed = shares[:, :, :, 0] * blocks[:, :, None, 0] + shares[:, :, :, 1] * blocks[:, :, None, 1]
    return mixed.reshape(templates.shape)


def own_shares(coefficients: Tensor) -> Tensor:
    """Return which coefficients make the blocks on the diagonal, as a mask of ``(2, 2, 1)``.

    Example:
        >>> own_shares(torch.zeros(2, 2, 2)).flatten()
        tensor([ True, False, False,  True])
    """
    return torch.eye(2, dtype=torch.bool, device=coefficients.device)[:, :, None]


def cross_coefficients(
    own: Tensor, rule: str = "orthogonal", noise: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Choose new coefficients for a block off the diagonal.

    Args:
        own: The trained coefficients of the member whose templates are combined anew.
        rule: ``"orthogonal"`` to them, a ``"copy"`` with noise, ``"zero"`` or ``"random"``.
        noise: Length of the orthogonal vector, of the noise, or largest random entry.
        generator: Random numbers.

    Raises:
        MisconfigurationException: Unknown rule.

    Example:
        >>> own = torch.tensor([3.0, 4.0])
        >>> new = cross_coefficients(own)
        >>> bool((own @ new).abs() < 1e-6), round(new.norm().item(), 5)
        (True, 1.0)
        >>> cross_coefficients(own, "zero")
        tensor([0., 0.])
    """
    one_of("coefficients", rule, CROSS_RULES)
    if rule == "zero":
        return torch.zeros_like(own)
    drawn: Tensor = torch.rand(own.shape, generator=generator).to(own)
    if rule == "orthogonal":
        drawn = torch.linalg.svd(own[None].double()).Vh[-1].to(own)
    if rule != "copy":
        return drawn * noise
    length: Tensor = drawn.norm()
    return own + drawn / length * noise


def of_its_member(features: Tensor, dim: int, offset: int | Tensor = 0) -> Tensor:
    """Keep for each sample the half of the features that its member computes; the other half is zero.

    Args:
        features: Samples along the first dimension.
        dim: Dimension of the features.
        offset: Member of the first sample; the members take turns.

    Example:
        >>> of_its_member(torch.ones(2, 4), -1)
        tensor([[1., 1., 0., 0.],
                [0., 0., 1., 1.]])
    """
    member = (torch.arange(features.shape[0], device=features.device) + offset) % 2
    half = torch.arange(features.shape[dim], device=features.device) >= features.shape[dim] // 2
    sizes = [1] * features.ndim
    sizes[0], sizes[dim] = features.shape[0], features.shape[dim]
    return features.masked_fill((member[:, None] != half[None, :]).reshape(sizes), 0.0)
