"""Searches: the cells of a study chosen one after another, as Optuna draws them."""
