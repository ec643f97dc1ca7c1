"""A space of networks -> the best of them: what the command search is made of."""
