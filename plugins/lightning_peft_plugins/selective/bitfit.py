"""Bias tuning."""

from __future__ import annotations

from lightning_peft_plugins.selective._shared.parameter_tuning import ParameterTuning


class BitFit(ParameterTuning):
    """Trains the biases of a network and its head; the rest is frozen for the fit (Zaken et al. 2022).

    Args:
        head: Train the layers that write the logits too. A head that is tied to an embedding stays frozen.
        targets: Layers whose biases are trained, with all that is in them; all by default. The paper's smaller variant, for
            BERT: ``["attention.self.query", "intermediate.dense"]``.
        exclude: Layers whose biases are left alone.
        checkpoint: ``"trained"`` leaves what is frozen out of checkpoints, which then need the same base to be loaded.
        name: Name in logs and checkpoints.

    Raises:
        MisconfigurationException: No layer but the head has a bias to train.

    Example:
        >>> BitFit(head=False)
        BitFit(head=False, checkpoint='trained')
    """

    kind = "bias"
    called = ("bias", "biases")
    instead = "Use NormTuning where it has normalisation layers, or LoRA."
    paper = "Zaken, Goldberg, Ravfogel, BitFit, ACL 2022, arXiv 2106.10199"
