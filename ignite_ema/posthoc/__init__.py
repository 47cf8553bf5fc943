"""Chooses the length of an average after training, by reconstructing it from stored snapshots of a few averages.

:class:`~ignite_ema.PostHocEMA` keeps power-function averages of two widths while a model trains, and stores snapshots
of them. Each snapshot is a weighted sum of the model's weights over time, and its averaging profile is known. Least
squares over the profiles finds the linear combination of snapshots that is closest to any other profile; this does not
need the weights. Karras et al. 2024 (arXiv 2312.02696), section 3 and appendix C.
"""

from .fitting import GOOD, coefficients, fitted, planned, residual, residuals
from .profiles import ExponentialProfile, PowerProfile, Profile, SampledProfile, Snapshot, UniformProfile
from .reconstruction import gamma_from_sigma_rel, reconstruct, rounding, sigma_rel_from_gamma, sweep
from .snapshots import stored

__all__ = [
    "GOOD",
    "ExponentialProfile",
    "PowerProfile",
    "Profile",
    "SampledProfile",
    "Snapshot",
    "UniformProfile",
    "coefficients",
    "fitted",
    "gamma_from_sigma_rel",
    "planned",
    "reconstruct",
    "residual",
    "residuals",
    "rounding",
    "sigma_rel_from_gamma",
    "stored",
    "sweep",
]
