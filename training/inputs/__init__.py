"""What a training starts from: data sets and published weights."""
