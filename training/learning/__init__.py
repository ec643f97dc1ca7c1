"""Batches -> trained weights: a step, its state, an evaluation, on one process or many."""
