"""A calibrated graph -> the program that the native engine runs, its numbers quantized."""
