"""Which quantizer for which linear, and what that costs, counted exactly."""

from qpalette.plan.budget import Budget, Overhead, parse_size, readable, spec_for_bits
from qpalette.plan.build import FUSIONS, Candidate, Limits, Space, candidate_of, palette_of
from qpalette.plan.memory import device_bytes
from qpalette.plan.plan import PLAN_FILE, Plan, PlanSummary, counted_rate, select_linears, summarize, uniform_plan
from qpalette.plan.planner import Choice, FrontPoint, Planned, Planner
from qpalette.plan.profile import LatencyProfile, Launch
from qpalette.plan.sensitivities import SensitiveLinear, Sensitivities

__all__ = [
    "FUSIONS",
    "PLAN_FILE",
    "Budget",
    "Candidate",
    "Choice",
    "FrontPoint",
    "LatencyProfile",
    "Launch",
    "Limits",
    "Overhead",
    "Plan",
    "PlanSummary",
    "Planned",
    "Planner",
    "SensitiveLinear",
    "Sensitivities",
    "Space",
    "candidate_of",
    "counted_rate",
    "device_bytes",
    "palette_of",
    "parse_size",
    "readable",
    "select_linears",
    "spec_for_bits",
    "summarize",
    "uniform_plan",
]
