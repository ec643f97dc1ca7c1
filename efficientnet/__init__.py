"""What all stages share: the network, its preprocessing, the file formats and the runtimes."""
