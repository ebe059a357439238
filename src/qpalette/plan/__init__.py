"""Which quantizer for which linear, and what that costs, counted exactly."""

from qpalette.plan.budget import Budget, Overhead, parse_size, readable, spec_for_bits
from qpalette.plan.build import (
    EXPERTS,
    FUSIONS,
    Candidate,
    Limits,
    Space,
    candidate_of,
    is_expert,
    palette_of,
    stored_bits,
)
from qpalette.plan.memory import device_bytes
from qpalette.plan.plan import PLAN_FILE, Plan, PlanSummary, counted_rate, select_linears, summarize, uniform_plan
from qpalette.plan.planner import Choice, FrontPoint, Planned, Planner
from qpalette.plan.preference import ALLOWED, TARGETS, preferred, profile_of, quick_part
from qpalette.plan.profile import Head, LatencyProfile, Launch
from qpalette.plan.sensitivities import SensitiveLinear, Sensitivities
from qpalette.plan.streams import CONTEXT, CacheSpace, SensitiveStream, even_streams

__all__ = [
    "ALLOWED",
    "CONTEXT",
    "EXPERTS",
    "FUSIONS",
    "PLAN_FILE",
    "TARGETS",
    "Budget",
    "CacheSpace",
    "Candidate",
    "Choice",
    "FrontPoint",
    "Head",
    "LatencyProfile",
    "Launch",
    "Limits",
    "Overhead",
    "Plan",
    "PlanSummary",
    "Planned",
    "Planner",
    "SensitiveLinear",
    "SensitiveStream",
    "Sensitivities",
    "Space",
    "candidate_of",
    "counted_rate",
    "device_bytes",
    "even_streams",
    "is_expert",
    "palette_of",
    "parse_size",
    "preferred",
    "profile_of",
    "quick_part",
    "readable",
    "select_linears",
    "spec_for_bits",
    "stored_bits",
    "summarize",
    "uniform_plan",
]
