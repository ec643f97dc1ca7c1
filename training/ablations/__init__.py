"""Recipes with one ingredient changed -> what it is worth: trained runs, table and picture."""
