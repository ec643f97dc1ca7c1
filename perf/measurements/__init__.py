"""Programs and images -> what was measured."""
