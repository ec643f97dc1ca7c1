"""Graph -> program of a runtime, and the artifact that it becomes."""
