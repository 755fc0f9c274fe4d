"""The exact multiplier, so that the zoo's names have a baseline; by value it is `Multiplier.exact`."""

from __future__ import annotations

import numpy as np

from .family import Family

FAMILY = Family("exact", np.multiply)
