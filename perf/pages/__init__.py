"""Records -> report: rows, verdict, tables, pictures, page."""
