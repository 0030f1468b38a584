"""Speed, measured from outside: benchmarks of kernels, of the engine, and of an HTTP endpoint."""
