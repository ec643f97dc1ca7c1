"""Bytes -> images: decoding, preprocessing, and the data sets they come from."""
