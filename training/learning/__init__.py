"""Batches -> trained weights: a step, its state, an epoch, on one process or many."""
