"""This machine and its disk: processor, GPU, environment, files that appear whole or not at all."""
