"""What becomes of networks whose units are woken or pruned while they train."""
