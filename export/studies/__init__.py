"""Exports compared: what the commands ablation, stock and all are made of."""
