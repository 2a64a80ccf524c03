"""Tuning of normalisation layers."""

from __future__ import annotations

from lightning_peft_plugins.selective._shared.parameter_tuning import ParameterTuning


class NormTuning(ParameterTuning):
    """Trains the normalisation layers of a network and its head; the rest is frozen for the fit.

    Args:
        head: Train the layers that write the logits too. A head that is tied to an embedding stays frozen.
        targets: Normalisation layers to train, or what holds them; all by default.
        exclude: Layers that are left alone.
        checkpoint: ``"trained"`` leaves what is frozen out of checkpoints, which then need the same base to be loaded.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: There is no normalisation layer to train.

    Example:
        >>> NormTuning(targets="re:blocks")
        NormTuning(head=True, targets='re:blocks', checkpoint='trained')
    """

    kind = "norm"
    called = ("normalisation layer", "tensors of normalisation layers")
    instead = "Use BitFit where it has biases, or LoRA."
    paper = "Frankle, Schwab, Morcos, Training BatchNorm and Only BatchNorm, ICLR 2021, arXiv 2003.00152"
