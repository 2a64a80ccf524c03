"""The mathematics of CMF: how much of the target a Kalman filter lets into its estimate of a refined source."""

from __future__ import annotations


def filter_gain(variance: float, noise: float, decay: float, least: float = 0.89, most: float = 0.9999) -> tuple[float, float]:
    """One predict and update step of the scalar Kalman filter of CMF (Lee and Chang, ICLR 2024).

    The estimate decays towards the source and gains the process noise, ``v = decay^2 v + q``; the target is an observation of
    it with noise ``1 - q``. The share of the estimate that stays is ``beta = (1 - q) / (v + 1 - q)``, not below ``least``, and
    1 from ``most`` on.

    Args:
        variance: Of the estimate.
        noise: Of the process, ``q``.
        decay: Share of the estimate that stays when it decays towards the source.
        least: Smallest share.
        most: Share that counts as all.

    Returns:
        The share, and the variance after the step.

    Example:
        >>> share, variance = filter_gain(0.0, 0.005, 0.99)
        >>> round(share, 4), round(variance, 6)
        (0.995, 0.004975)
        >>> filter_gain(1.0, 0.5, 0.99)[0]
        0.89
    """
    variance = decay**2 * variance + noise
    share = max((1 - noise) / (variance + 1 - noise), least)
    share = share if share < most else 1.0
    return share, share * variance
