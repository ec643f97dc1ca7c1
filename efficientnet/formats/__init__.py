"""What stages leave each other on disk: checkpoint, artifact, records."""
