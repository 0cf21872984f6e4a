"""Contenders of benchmarks.others that load no library: their processes start in a moment."""

import os
import sys
import time
from dataclasses import dataclass

from benchmarks.others import PACKAGES, Contender


@dataclass(frozen=True)
class Fake(Contender):
    """Predicts the numbers 1 to batch, off by a tenth of each where it is told to be."""

    error: float = 0.0
    fault: str = ""  # what goes wrong, and where
    runs_in_torch = False

    def load(self, place):
        import numpy as np

        print("a library that talks")
        if self.fault == "load":
            raise ValueError("cannot | load\nand more")
        if self.fault == "dies":
            os._exit(3)
        if self.fault == "sees others" and any(sys.modules.get(name) is not None for name in PACKAGES):
            raise AssertionError("another's library is loaded")

        def make(batch):
            if self.fault == "batch 2" and batch == 2:
                raise MemoryError
            if self.fault == "slow":
                time.sleep(60)
            return lambda: np.arange(1, 1 + batch, dtype=np.float32) * (1 + self.error)

        return make


@dataclass(frozen=True)
class Prepared(Fake):
    def prepare(self, place):
        with open(f"{place.files}/made", "a") as file:
            file.write(str(os.getpid()))
