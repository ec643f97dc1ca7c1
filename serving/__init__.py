"""Artifact -> HTTP."""
