"""The family: its tables, the network itself, what it costs, and published weights."""
