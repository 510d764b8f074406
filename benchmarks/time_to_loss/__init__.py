"""Seconds to the same loss over a link: dnipipe's rules beside synchronous pipelines, each at its own best rate."""
