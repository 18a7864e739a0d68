"""Ablations: many fits of one recipe along axes, fair budgets, and what their results say."""
