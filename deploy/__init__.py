"""What runs m3serve somewhere: the demo checkpoint, container and dashboards."""
