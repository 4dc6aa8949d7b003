"""Runs as reinforcement-learning environments."""
