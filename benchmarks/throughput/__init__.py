"""Samples a second over a link: dnipipe beside synchronous pipelines of the same stages."""
