"""Losses straight from hidden states, with backward passes of their own."""
