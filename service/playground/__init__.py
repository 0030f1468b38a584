"""A page at / to try the model, with a live view of the index cache by layer. It asks nobody but this service."""
