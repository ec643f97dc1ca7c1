"""The native engine: C++ sources, and what builds them."""
