"""Run the package's examples: python -m iopo.kernels."""

import doctest
import sys

import iopo.kernels

if __name__ == "__main__":
    sys.exit(doctest.testmod(iopo.kernels, verbose=True).failed)
