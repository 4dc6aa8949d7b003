"""Rules: hand-written policies by name."""
