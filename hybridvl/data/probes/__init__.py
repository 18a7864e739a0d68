"""Probes: small tasks that need no download and ask for one ability of a model, sliced by what makes it hard."""
