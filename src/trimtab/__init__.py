"""A learned controller for neural-network training."""
