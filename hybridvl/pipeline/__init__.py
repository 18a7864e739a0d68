"""Several fits one after another, from recipes with overrides; what is done is skipped, what was killed goes on."""
