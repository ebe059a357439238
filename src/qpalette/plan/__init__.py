"""Which quantizer for which linear, and what that costs, counted exactly."""

from qpalette.plan.budget import spec_for_bits
from qpalette.plan.plan import Plan, PlanSummary, counted_rate, select_linears, summarize, uniform_plan

__all__ = ["Plan", "PlanSummary", "counted_rate", "select_linears", "spec_for_bits", "summarize", "uniform_plan"]
