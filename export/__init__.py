"""Checkpoint -> artifact, one command per runtime."""
