"""From a checkpoint and pictures to boxes."""
