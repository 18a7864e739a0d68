"""Training: losses, the optimizer and its schedule, Lightning modules and callbacks."""
