"""Studies of many runs: each a grid of `dnipipe train` commands, and the tables and plots made of what they found.

    cells    one run of a grid, and the record that is kept of it     ◄─ figures   what a finished run's folder says
    grid     runs the cells that have no record, several at once      ◄─ tables, plots
    command  the options that all studies share                       ◄─ learning/, paper/   a study each

Not installed with the package: run it from a clone, as `python -m benchmarks.learning`.
"""
