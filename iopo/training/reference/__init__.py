"""The reference of a run: where its log-probs come from, and the cache on disk.

python -m iopo.training.reference [+experiment=NAME] [key=value ...]     fills the cache alone
"""

from iopo.training.reference.cache import Cache
from iopo.training.reference.sources import (
    adapter_off,
    cache_folder,
    cached,
    inputs_of_other,
    live,
    manifest,
)

__all__ = [
    "Cache",
    "adapter_off",
    "cache_folder",
    "cached",
    "inputs_of_other",
    "live",
    "manifest",
]
