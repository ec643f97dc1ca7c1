"""Programs that take turns -> times that can be compared."""
