"""Records -> text: tables, and what is published."""
