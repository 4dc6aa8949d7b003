"""Which units to keep: every pruning criterion against a random choice, on three kinds of network: see ``__main__``."""
