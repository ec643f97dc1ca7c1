"""A run from its first step to its report, and what it leaves in its folder."""
