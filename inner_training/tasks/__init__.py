"""Task families: each draws tasks from a generator."""
