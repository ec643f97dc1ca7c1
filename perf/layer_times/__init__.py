"""An artifact -> the time of each of its layers, beside the least that it could take."""
