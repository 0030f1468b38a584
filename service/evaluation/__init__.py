"""What a checkpoint and an index plan cost in quality: held-out loss and synthetic long-context tasks."""
