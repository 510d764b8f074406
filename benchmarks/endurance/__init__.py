"""Whether a run stays as it is: memory and the cost of a batch over 100,000 of them."""
