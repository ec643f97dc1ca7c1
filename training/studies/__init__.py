"""Steps and data loaders timed, recipes side by side: what these commands are made of."""
