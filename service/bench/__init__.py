"""Speed, measured from outside: closed-loop benchmarks of the offline engine and of an HTTP endpoint."""
