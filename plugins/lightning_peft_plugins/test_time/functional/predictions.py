"""The mathematics of test-time adaptation as pure functions: what a batch of logits says about its samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax_entropy(logits: Tensor) -> Tensor:
    """Entropy of the predicted distribution, in nats; computed in at least float32.

    Args:
        logits: Shape ``(..., classes)``.

    Returns:
        Entropies, shape ``(...)``, differentiable.

    Example:
        >>> softmax_entropy(torch.tensor([[4.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
        tensor([0.2618, 1.3863])
    """
    log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    return -(log_p.exp() * log_p).sum(-1)


def marginal_entropy(logits: Tensor) -> Tensor:
    """Entropy of the mean of predictions over the views of one sample (MEMO, Zhang et al., 2022, eq. 3).

    Args:
        logits: Shape ``(views, ..., classes)``.

    Returns:
        Shape ``(...)``, differentiable: a scalar for one prediction a view; the plain entropy for one view.

    Example:
        >>> marginal_entropy(torch.tensor([[10.0, -10.0], [-10.0, 10.0]]))
        tensor(0.6931)
    """
    log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    mean = log_p.logsumexp(0) - math.log(len(log_p))
    return -(mean.exp() * mean.clamp(min=torch.finfo(mean.dtype).min)).sum(-1)


def entropy_margin(margin: float, classes: int) -> float:
    """Entropy below which a prediction counts as reliable: ``margin * ln(classes)``.

    Example:
        >>> round(entropy_margin(0.4, 1000), 3)
        2.763
    """
    return margin * math.log(classes)


def redundancy(probabilities: Tensor, average: Tensor) -> Tensor:
    """Cosine between each prediction and the running average of predictions (EATA, Niu et al., ICML 2022, eq. 5).

    Args:
        probabilities: Shape ``(batch, classes)``.
        average: Shape ``(classes,)``.

    Returns:
        Shape ``(batch,)``, in [0, 1].

    Example:
        >>> redundancy(torch.eye(2), torch.tensor([1.0, 0.0]))
        tensor([1., 0.])
    """
    return torch.nn.functional.cosine_similarity(probabilities, average[None], dim=-1)


def entropy_weight(entropy: Tensor, margin: float) -> Tensor:
    """Weight of a sample, ``exp(E0 - H)``: the surer, the more (EATA, eq. 6); without a graph.

    Example:
        >>> entropy_weight(torch.tensor([0.0, 0.5]), 0.5)
        tensor([1.6487, 1.0000])
    """
    return (margin - entropy.detach()).exp()


def prediction_drop(logits: Tensor, destroyed: Tensor) -> Tensor:
    """How much the probability of the predicted class falls when the object's shape is destroyed (DeYO's PLPD, ICLR 2024).

    Args:
        logits: Of the images, shape ``(batch, classes)``.
        destroyed: Of the same images after their patches were shuffled, same shape.

    Returns:
        Shape ``(batch,)``, in [-1, 1].

    Example:
        >>> prediction_drop(torch.tensor([[20.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([0.5000])
    """
    predicted = logits.argmax(-1, keepdim=True)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    before, after = logits.softmax(-1, dtype=dtype), destroyed.softmax(-1, dtype=dtype)
    return (before - after).gather(-1, predicted).squeeze(-1)


def shuffle_patches(images: Tensor, patches: int = 4, generator: torch.Generator | None = None) -> Tensor:
    """Shuffle an image's ``patches x patches`` tiles, for each image on its own (DeYO).

    Sides that do not divide are resized to the next multiple below, with antialiasing, and back.

    Args:
        images: Shape ``(batch, channels, height, width)``.
        patches: Tiles along each side.
        generator: Source of randomness, on the CPU.

    Returns:
        Same shape.

    Example:
        >>> x = torch.arange(16.0).reshape(1, 1, 4, 4)
        >>> bool((shuffle_patches(x, 2).flatten().sort().values == x.flatten()).all())
        True
    """
    batch, channels, height, width = images.shape
    rows, columns = height // patches, width // patches
    if rows == 0 or columns == 0:
        raise ValueError(f"images of {height} x {width} have no {patches} x {patches} patches")
    size = (rows * patches, columns * patches)
    x = images if size == (height, width) else _resize(images, size)
    tiles = x.reshape(batch, channels, patches, rows, patches, columns).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    order = torch.rand(batch, patches * patches, generator=generator, dtype=torch.float32).argsort(-1).to(images.device)
    tiles = tiles[torch.arange(batch, device=images.device)[:, None], order]
    x = tiles.unflatten(1, (patches, patches)).permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, *size)
    return x if size == (height, width) else _resize(x, (height, width))


def _resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)


def symmetric_cross_entropy(logits: Tensor, target: Tensor, alpha: float = 0.5) -> Tensor:
    """Cross entropy of a prediction with a soft target and of the target with the prediction, mixed.

    ``-(1 - alpha) sum softmax(target) log softmax(logits) - alpha sum softmax(logits) log softmax(target)``: CoTTA on ImageNet
    with ``alpha=0.5``, on CIFAR with ``alpha=0``.

    Args:
        logits: Shape ``(batch, classes)``.
        target: Logits of the target, same shape.
        alpha: Share of the reverse term.

    Returns:
        Shape ``(batch,)``.

    Example:
        >>> symmetric_cross_entropy(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
        tensor([1.3916])
        >>> symmetric_cross_entropy(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]]), alpha=0.0)
        tensor([1.5890])
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p, log_q = logits.log_softmax(-1, dtype=dtype), target.log_softmax(-1, dtype=dtype)
    forward = -(log_q.exp() * log_p).sum(-1)
    return forward if alpha == 0.0 else (1 - alpha) * forward - alpha * (log_p.exp() * log_q).sum(-1)
