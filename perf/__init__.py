"""Artifact or checkpoint -> records -> report."""
