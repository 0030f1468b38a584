"""Which sparse layers of a checkpoint can share a selection: `m3serve calibrate`, from flags to files."""
