"""From files to batches: read → transform → collate."""
