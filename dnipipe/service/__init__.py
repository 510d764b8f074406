"""Stages as services: each on its own, with its own supervisor; one that dies comes back, the others go on meanwhile.

supervisor ─► session ─► keeper (a Worker) ─► links (edges that outlast a neighbour)
                 │          ├─► ledger      what it did with each batch
                 │          ├─► absence     how long it has waited for a neighbour
                 └─► place  └─► script      stage 0's
own      a stage of a user's script: the script up to its fit, then session
whole    the model out of all stages' states
"""
