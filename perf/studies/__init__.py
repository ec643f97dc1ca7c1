"""Records and fresh runs -> answers: what to take, how it stands beside the paper and others."""
