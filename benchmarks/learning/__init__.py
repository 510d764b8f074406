"""Does decoupled training learn as well as backprop? `python -m benchmarks.learning`; what is compared: README.md."""
