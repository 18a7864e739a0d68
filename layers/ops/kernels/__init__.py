"""Implementations that need more than PyTorch's own operators: each module is imported only when it is chosen."""
