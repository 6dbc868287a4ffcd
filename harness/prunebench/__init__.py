"""prunebench: which pruning method should I use on this model, at this sparsity, on this hardware?

Importing this package loads neither torch nor transformers. `harness/README.md` is the map.
"""

from importlib.metadata import version

__version__ = version("prunebench")
__all__ = ["__version__"]
