"""What people look at: the picture of one case and the page of one run."""
