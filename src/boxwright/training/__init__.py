"""From a run's description to trained weights."""
