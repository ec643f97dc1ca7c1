"""Two revisions -> programs of one checkpoint, in turns -> a verdict."""
