"""The DNI paper's feed-forward experiments (arXiv:1608.05343): `python -m benchmarks.paper`; see README.md."""
