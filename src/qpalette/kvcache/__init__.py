"""The key-value cache as codes: theory, palette, bytes. No model and no transformers; `nn` makes a cache of it."""

from qpalette.kvcache.codes import CacheCode, cache_palette, parse_code
from qpalette.kvcache.plan import (
    BALANCED,
    CACHE_PLAN_FILE,
    MEAN,
    TRANSFORMS,
    WHITE,
    CachePlan,
    parse_cache,
    read_cache_plan,
)
from qpalette.kvcache.stream import PAGE, Exact, Stream
from qpalette.kvcache.transform import Transform, balanced, made_of, mean_removed, white
from qpalette.kvcache.vectors import VectorFormat

__all__ = [
    "BALANCED",
    "CACHE_PLAN_FILE",
    "MEAN",
    "PAGE",
    "TRANSFORMS",
    "WHITE",
    "CacheCode",
    "CachePlan",
    "Exact",
    "Stream",
    "Transform",
    "VectorFormat",
    "balanced",
    "cache_palette",
    "made_of",
    "mean_removed",
    "parse_cache",
    "parse_code",
    "read_cache_plan",
    "white",
]
