"""Trainings and steps compared: what the commands ablation and speed are made of."""
