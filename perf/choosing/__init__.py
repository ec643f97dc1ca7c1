"""Records of this device -> the best program within a budget, verified by a fresh run."""
