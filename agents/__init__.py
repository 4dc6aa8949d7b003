"""Learning, evaluating, benchmarking and exporting policies."""
