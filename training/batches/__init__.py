"""Labelled images -> augmented batches in an order that follows from the seed."""
