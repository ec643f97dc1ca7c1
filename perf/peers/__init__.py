"""An artifact -> a service as one would write it with another tool, to be measured."""
