"""What exports start from: flags, the model, its images and its answers."""
