"""The key-value cache as codes: theory, palette, bytes. No model and no transformers; `nn` makes a cache of it."""

from qpalette.kvcache.calibrated import key_transforms
from qpalette.kvcache.codes import CacheCode, cache_palette, parse_code
from qpalette.kvcache.lengths import bucket
from qpalette.kvcache.moments import MOMENTS_FILE, KeyMoments, read_moments, write_moments
from qpalette.kvcache.plan import (
    BALANCED,
    CACHE_PLAN_FILE,
    EXACT,
    MEAN,
    SHAPED,
    TRANSFORMS,
    WHITE,
    CachePlan,
    parse_cache,
    read_cache_plan,
)
from qpalette.kvcache.shaping import shaped
from qpalette.kvcache.stream import PAGE, Exact, Stream, pages_of, with_exact
from qpalette.kvcache.transform import Transform, balanced, mean_removed, white
from qpalette.kvcache.vectors import VectorFormat

__all__ = [
    "BALANCED",
    "CACHE_PLAN_FILE",
    "EXACT",
    "MEAN",
    "MOMENTS_FILE",
    "PAGE",
    "SHAPED",
    "TRANSFORMS",
    "WHITE",
    "CacheCode",
    "CachePlan",
    "Exact",
    "KeyMoments",
    "Stream",
    "Transform",
    "VectorFormat",
    "balanced",
    "bucket",
    "cache_palette",
    "key_transforms",
    "mean_removed",
    "pages_of",
    "parse_cache",
    "parse_code",
    "read_cache_plan",
    "read_moments",
    "shaped",
    "white",
    "with_exact",
    "write_moments",
]
