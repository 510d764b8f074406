"""The paper's figures: test error in percent, its table 1 as we know it, not read again from the PDF."""

from __future__ import annotations

METHODS = ("no backprop", "backprop", "DNI", "cDNI")

# data, net -> layers -> the figures of METHODS
TABLE: dict[tuple[str, str], dict[int, tuple[float, float, float, float]]] = {
    ("mnist", "fcn"): {
        3: (9.3, 2.0, 1.9, 2.2),
        4: (12.6, 1.8, 2.2, 1.9),
        5: (16.2, 1.8, 3.4, 1.7),
        6: (21.4, 1.8, 4.3, 1.6),
    },
    ("mnist", "cnn"): {3: (0.9, 0.8, 0.9, 1.0), 4: (2.8, 0.6, 0.7, 0.8)},
    ("cifar10", "fcn"): {
        3: (54.9, 43.5, 42.5, 48.5),
        4: (57.2, 43.0, 45.0, 45.1),
        5: (59.6, 41.7, 46.9, 43.5),
        6: (61.9, 42.0, 49.7, 46.8),
    },
    ("cifar10", "cnn"): {3: (28.7, 17.9, 19.5, 19.0), 4: (38.1, 15.7, 19.5, 16.4)},
}

# What its text and figures say where it prints no number for the table.
CLAIMS = {
    "updates": "The paper (a plot of 100 runs): a network still trains to about 2 % with DNI at p = 0.2, "
    "and with cDNI at 0.05, only slower.",
    "unlocked": "The paper (a plot): about 2 % is reached.",
    "deep": "The paper: cDNI trains 21 layers, to about 2 %.",
}


def error(data: str, net: str, layers: int, method: str) -> float | None:
    """None: the paper has no such figure."""
    row = TABLE[data, net].get(layers)
    return row[METHODS.index(method)] if row and method in METHODS else None
