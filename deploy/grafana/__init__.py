"""The Grafana dashboards, as code. `python -m deploy.generate` writes the JSON."""
