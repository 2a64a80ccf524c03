"""Whether a training is one in which a past prediction can take the place of a share of the label; looked at once."""

from __future__ import annotations

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

_SLACK = 0.02  # of a row's gradient: what bfloat16 loses in the sum of it
_SURE = 1e-4  # a prediction this near to certain has a gradient that rounding distorts, or none
_WIDER, _FEW = 16, 1000  # times a dataset of at least so many samples: rows that nobody wants a memory of


def check_loss(loss: Tensor, logits: Tensor) -> None:
    """Look at the gradient of a loss in the logits, which tells a cross entropy over classes from what it is not.

    A softmax does not change when one number is added to all logits of a sample, so the gradient of whatever is computed from
    it sums to zero over the classes. That of losses which look at every logit for itself (binary cross entropy of several
    labels, squared error) does not. A sample without any gradient is one that the loss leaves out.

    Args:
        loss: The user's loss, a scalar with its graph.
        logits: What the network returned, shape ``(batch, classes)``, part of that graph.

    Raises:
        MisconfigurationException: The loss does not depend on these logits, is none over their classes, or leaves samples out.
    """
    if not (loss.requires_grad and logits.requires_grad):
        return
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise MisconfigurationException(
            "The loss of training_step does not depend on what the network last returned, so PSKD would distil predictions "
            'that are not trained. Name the network that the loss is computed with, network="<name>".'
        )
    gradient = gradient.detach().float()
    sizes = gradient.abs().sum(1)
    if not bool(sizes.isfinite().all()):
        return
    sure = logits.detach().float().softmax(1).amax(1) > 1 - _SURE
    if bool((gradient.sum(1).abs() > _SLACK * sizes)[~sure].any()):
        raise MisconfigurationException(
            "The loss of training_step is no cross entropy over the classes of a softmax: it changes when one number is added "
            "to all logits of a sample, as losses of several labels and squared errors do. PSKD's past predictions are "
            'distributions over classes, which mean nothing there. If only a small term is like that: PSKD(check="off").'
        )
    left_out = int(((sizes == 0) & ~sure).sum())
    if left_out:
        raise MisconfigurationException(
            f"{left_out} of {len(sizes)} samples of this batch add nothing to the loss of training_step (ignore_index, or "
            "class weights of zero?), but PSKD would train on past predictions for them. Leave such samples out of the "
            'dataset, or have them distilled with PSKD(check="off").'
        )


def check_positions(index: Tensor, dataset: object, path: str) -> None:
    """Refuse identifiers in the place of positions, for which a memory would have to be far larger than the dataset.

    Args:
        index: What a batch gave, shape ``(batch,)``.
        dataset: The training dataset.
        path: Where in the batch they stand.

    Raises:
        MisconfigurationException: The highest is far beyond the dataset.
    """
    if not hasattr(dataset, "__len__"):
        return
    size, highest = len(dataset), int(index.max())
    if highest >= _WIDER * max(size, _FEW):
        raise MisconfigurationException(
            f"sample_index={path!r} gave {highest}, but the training dataset has {size} samples: these look like identifiers, "
            "and the memory has a row for every number up to the highest. Let the dataset return each sample's position, or "
            f"say how many rows there shall be: num_samples={highest + 1} or more."
        )
