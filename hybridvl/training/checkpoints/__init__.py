"""Checkpoints of trainings: whole files or folders of shards, and the models in them."""
