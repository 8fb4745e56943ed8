"""The data and run files of `medmamba demo`, and the baseline it must beat."""
