"""What a layer pattern costs before anything is built: parameters, FLOPs per token, bytes of state."""

from hybridvl.plan.costs import LayerCost, Plan, plan_model

__all__ = ["LayerCost", "Plan", "plan_model"]
