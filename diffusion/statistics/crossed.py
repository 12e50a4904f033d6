"""The mean of a measurement that training seeds and test examples both influence, with its error.

Every network is measured on the same examples with the same noise, so seeds and examples are
crossed, not nested. Let x_ijk be what is measured of training seed i, example j and noise draw k:
a bound, or a linear combination of the bounds of several models. As random effects,

    x_ijk = μ + a_i + b_j + c_ij + d_jk + e_ijk,

where noise k of example j is the same for every seed. Everything is on the host in float64.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class CrossedMean(NamedTuple):
    """A mean over training seeds, examples and noise, in the unit of the measurements.

    Attributes:
      mean: over all of them.
      se: standard error over training seeds and examples, as draws from their populations, noise
        included. With one seed it is over examples only: it speaks of these trained networks.
      mc_se: the part of the error that is due to noise, with networks and examples fixed.
    """

    mean: float
    se: float
    mc_se: float


def crossed_mean(totals: Float[np.ndarray, "seeds n draws"]) -> CrossedMean:
    """The mean of paired measurements of one training seed with its errors."""
    totals = np.asarray(totals, np.float64)
    _, n, draws = totals.shape
    by_example = totals.mean(axis=(0, 2))
    noise = totals.mean(axis=0).var(axis=1, ddof=1) / draws
    se = by_example.std(ddof=1) / np.sqrt(n)
    return CrossedMean(float(by_example.mean()), float(se), float(np.sqrt(noise.sum()) / n))
