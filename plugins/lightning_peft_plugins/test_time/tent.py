"""Tent: entropy minimisation on every prediction."""

from __future__ import annotations

from lightning_peft_plugins.test_time._shared.entropy import EntropyMethod


class Tent(EntropyMethod):
    """Minimises the entropy of all predictions by moving the scale and shift of the norm layers, batch by batch.

    BatchNorm layers normalise with the statistics of each batch. The predictions of a batch are those before its own update.
    All arguments are those of :class:`~lightning_peft_plugins.test_time._shared.entropy.EntropyMethod`; the paper takes
    ``optimizer="Adam", lr=1e-3`` on CIFAR-10-C and SGD with ``lr=2.5e-4`` on ImageNet-C.

    Example:
        >>> Tent(lr=1e-3, optimizer="Adam", reset="dataloader").reset
        'dataloader'
    """

    paper = "Wang et al.: Tent: Fully Test-Time Adaptation by Entropy Minimization, ICLR 2021, https://arxiv.org/abs/2006.10726"
    weighs_in_threads = True
