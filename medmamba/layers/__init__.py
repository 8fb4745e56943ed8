"""Parts shared by two networks or more."""
