"""`m3serve bench serve`: load on an OpenAI-compatible endpoint, in an open or a closed loop, as its clients see it."""
