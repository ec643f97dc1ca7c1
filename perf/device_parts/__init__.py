"""A GPU -> jobs in processes of their own -> records and a report."""
