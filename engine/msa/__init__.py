"""MiniMax Sparse Attention runtime: which layers select, the shared selection, the selectors, the audit."""
