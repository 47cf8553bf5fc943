"""The length of an average chosen after training: any averaging profile, rebuilt from the snapshots of a few.

:class:`~ignite_ema.PostHocEMA` keeps power-function averages of two widths while a model trains, and stores
them from time to time. Each is a sum over the same weights of the model, with a known profile; which sum of them
comes closest to a profile that is wanted is found by least squares, without the weights. Karras et al. 2024 (arXiv
2312.02696), section 3 and appendix C.
"""

from .fitting import GOOD, coefficients, fitted, planned, residual, residuals
from .profiles import (
    ExponentialProfile,
    PowerProfile,
    Profile,
    SampledProfile,
    Snapshot,
    UniformProfile,
    inner_products,
)
from .reconstruction import gamma_from_sigma_rel, reconstruct, rounding, sigma_rel_from_gamma, stored

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
    "inner_products",
    "planned",
    "reconstruct",
    "residual",
    "residuals",
    "rounding",
    "sigma_rel_from_gamma",
    "stored",
]
