"""Detection modules: one file each."""
