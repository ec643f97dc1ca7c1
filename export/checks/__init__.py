"""Program beside the eager model: agreement, accuracy gate, layer by layer."""
