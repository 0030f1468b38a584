"""Recording rules and alerts. `python -m deploy.generate` writes rules.yaml."""
