"""From a labelled cohort to a bundle."""
