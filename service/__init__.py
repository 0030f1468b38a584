"""The HTTP service: ingress, engine replicas, metrics."""
