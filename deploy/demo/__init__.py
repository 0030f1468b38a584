"""The small checkpoint that `m3serve serve` takes when no model is named."""
