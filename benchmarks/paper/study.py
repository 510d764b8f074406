"""The paper's experiments as cells: which nets, which methods, and the two protocols.

Every layer is a stage of its own, so a net of k layers has k - 1 predictors. A net's layers count the output layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.cells import Cell, Record, Records

TABLES = ("fcn", "cnn", "updates", "unlocked", "deep")  # the paper's
LONGER = ("length", "length-6", "length-21")  # whether a short run misses the paper's figures for want of iterations
LAYERS: dict[str, tuple[int, ...]] = {
    **{"fcn": (3, 4, 5, 6), "cnn": (3, 4), "updates": (4,), "unlocked": (4,), "deep": (21,)},
    **{"length": (3,), "length-6": (6,), "length-21": (21,)},
}
SEEDS = {"fcn": (0, 1)}  # elsewhere 0 alone
P_UPDATE = {"updates": ("1", "0.5", "0.2", "0.1", "0.05"), "unlocked": ("1", "0.5", "0.2")}
TIMES = {"length": (1, 3, 10, 30), "length-6": (1, 3, 10), "length-21": (1, 3, 10, 30)}
OURS = "vfbn"  # what the paper does not have
METHODS = {
    "fcn": ("no backprop", "backprop", "DNI", "cDNI", OURS),
    "cnn": ("no backprop", "backprop", "DNI", "cDNI", OURS),
    "updates": ("DNI", "cDNI", OURS),
    "unlocked": ("DNI", "cDNI", OURS),
    "deep": ("no backprop", "backprop", "cDNI", OURS),
    "length": ("backprop", "DNI", "cDNI", OURS),
    "length-6": ("backprop", "cDNI", OURS),  # DNI: an hour more
    "length-21": ("backprop", "cDNI"),
}


@dataclass(frozen=True)
class Row:
    """A line of a table: which net, and how it is trained.

    Args:
        p: rule.p_update, as it is written.
        times: how often as many iterations as the protocol's.
    """

    layers: int
    p: str = "1"
    times: int = 1


@dataclass(frozen=True)
class Protocol:
    """How long a net is trained, and at which rate, its predictors' too. A rate falls to a tenth behind each drop."""

    batches: int
    batch: int
    rate: str
    drops: tuple[int, ...]

    def words(self, times: int) -> tuple[str, ...]:
        """Its settings, with so many times the iterations."""
        batches = times * self.batches
        drops = ",".join(str(times * drop) for drop in self.drops)
        return (
            *("--train.batches", str(batches), "--data.batch", str(self.batch)),
            *("--optimizer.lr", self.rate, "--predictor.lr", self.rate),
            *("--optimizer.schedule", "steps", "--optimizer.drops", drops),
            *("--eval.every", str(batches // 10)),
        )


PAPER = Protocol(500_000, 256, "3e-5", (300_000, 400_000))
PROTOCOLS = {
    "paper": {"fcn": PAPER, "cnn": PAPER},
    "short": {"fcn": Protocol(800, 256, "1e-3", (480, 640)), "cnn": Protocol(1000, 64, "1e-3", (600, 800))},
}
FILTERS = {("mnist", "paper"): 64, ("cifar10", "paper"): 128, ("mnist", "short"): 16, ("cifar10", "short"): 16}
UNITS = {"mnist": 256, "cifar10": 1000}  # of a hidden layer
HIDDEN = {"mnist": ("2", "1024"), "cifar10": ("1", "4000")}  # DNI's predictor: hidden layers, their units


@dataclass(frozen=True)
class Paper:
    """Args:
    names: the tables that are wanted. protocol, data: by name.
    """

    names: tuple[str, ...] = TABLES
    protocol: str = "short"
    data: str = "mnist"

    def cells(self, records: Records) -> list[Cell]:
        return [
            cell
            for table in self.names
            for row in self.rows(table)
            for method in METHODS[table]
            for cell in self.seeds(table, method, row)
        ]

    def rows(self, table: str) -> Iterator[Row]:
        """The lines of a table."""
        for layers in LAYERS[table]:
            for p in P_UPDATE.get(table, ("1",)):
                for times in TIMES.get(table, (1,)):
                    yield Row(layers, p, times)

    def iterations(self, row: Row) -> int:
        """Of a fully connected net's training."""
        return row.times * PROTOCOLS[self.protocol]["fcn"].batches

    def found(self, table: str, method: str, row: Row, records: Records) -> list[Record | None]:
        return [records.of(cell) for cell in self.seeds(table, method, row)]

    def seeds(self, table: str, method: str, row: Row) -> list[Cell]:
        """One entry of a table: a run a seed."""
        net = "cnn" if table == "cnn" else "fcn"
        labels: dict[str, object] = {"layers": row.layers, "method": method}
        labels |= {"p_update": row.p} if table in P_UPDATE else {}
        labels |= {"iterations": self.iterations(row)} if table in TIMES else {}
        unlocked = ("--rule.forward_unlock", "true") if table == "unlocked" else ()
        words = (
            *("--data.name", self.data, *self._net(net, row.layers), *PROTOCOLS[self.protocol][net].words(row.times)),
            *("--pipeline.stages", str(1 if method == "backprop" else row.layers), *self._method(table, method)),
            *(("--rule.p_update", row.p) if row.p != "1" else ()),
            *unlocked,
        )
        return [
            Cell(table, {**labels, "seed": seed}, f"benchmarks/paper/{net}.toml", (*words, "--train.seed", str(seed)))
            for seed in SEEDS.get(table, (0,))
        ]

    def _net(self, net: str, layers: int) -> tuple[str, ...]:
        if net == "fcn":
            return "--model.layers", str(layers), "--model.width", str(UNITS[self.data])
        blocks, filters = layers - 1, FILTERS[self.data, self.protocol]  # a cnn's output layer is not counted by ours
        return "--model.layers", str(blocks), "--model.width", str(filters)

    def _method(self, table: str, method: str) -> tuple[str, ...]:
        """The settings of a method. Unlocked, the paper's predictors all have one hidden layer."""
        hidden, width = HIDDEN[self.data]
        conditioned = ("--predictor.condition", str(method == "cDNI").lower())
        if method == "no backprop":  # stages before the last stay as they are
            return "--rule.warmup", "100000000", "--rule.warmup_rule", "zero"
        if method == "backprop":
            return ()
        if method == OURS:
            return "--predictor.name", "vfbn"
        if table == "cnn":
            return "--predictor.name", "conv", "--predictor.hidden", "2", *conditioned
        if table == "unlocked":
            return "--predictor.name", "mlp", "--predictor.hidden", "1", "--predictor.width", width, *conditioned
        if method == "cDNI":
            return "--predictor.name", "linear", *conditioned
        return "--predictor.name", "mlp", "--predictor.hidden", hidden, "--predictor.width", width, *conditioned
