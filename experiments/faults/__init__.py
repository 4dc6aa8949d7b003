"""What becomes of runs that faults befall, under every composite of rules and the shipped policy: see ``__main__``."""
