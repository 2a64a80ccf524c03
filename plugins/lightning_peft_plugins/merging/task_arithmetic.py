"""Task arithmetic: the sum of what trainings changed."""

from __future__ import annotations

from torch import Tensor

from lightning_peft import merge_function


@merge_function(elementwise=True)
def task_arithmetic(deltas: Tensor, weights: Tensor) -> Tensor:
    """Add task vectors (Ilharco et al., ICLR 2023, https://arxiv.org/abs/2212.04089, section 2).

    A negative ``scale=`` of the merge, or a negative weight, takes a task out.

    Args:
        deltas: Differences to the base, ``(n, *shape)``.
        weights: ``(n,)``, what each is multiplied by.

    Returns:
        The weighted sum, ``(*shape)``.

    Example:
        >>> import torch
        >>> task_arithmetic(torch.tensor([[1.0, 2.0], [3.0, -2.0]]), torch.tensor([1.0, 1.0]))
        tensor([4., 0.])
    """
    return (weights.to(deltas.dtype) @ deltas.flatten(1)).view(deltas.shape[1:])
