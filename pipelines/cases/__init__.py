"""Which cases there are, what they are made from, and which are due."""
