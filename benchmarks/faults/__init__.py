"""Does a pipeline of independent stages survive? Faults made on a running one, and what became of it."""
