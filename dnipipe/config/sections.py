"""Every setting, its default, its explanation and its limits: frozen dataclasses, a section each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, Union

LONGEST = 1e6  # seconds of any wait, eleven days: in milliseconds still what poll() takes, 31 bits


def setting(
    default: Any, help: str, *, low: float | None = None, high: float | None = None, local: bool = False
) -> Any:
    """A dataclass field with its explanation and limits. `local`: stages may differ in it (paths, display)."""
    return field(default=default, metadata={"help": help, "low": low, "high": high, "local": local})


@dataclass(frozen=True)
class Model:
    name: Literal["transformer", "mlp", "cnn"] = setting("transformer", "which of the built-in models")
    layers: int = setting(4, "blocks of the transformer or cnn; layers of the mlp, the output one included", low=1)
    width: int = setting(128, "features (mlp, transformer) or channels (cnn) between layers", low=1)
    heads: int = setting(4, "attention heads of the transformer", low=1)
    dropout: float = setting(0.0, "probability of dropping a feature", low=0.0, high=0.99)


@dataclass(frozen=True)
class Data:
    name: Literal["stdlib", "text", "mnist", "cifar10"] = setting(
        "stdlib", "Python's own source files, a text file, MNIST or CIFAR-10"
    )
    root: str = setting(
        "", "text: the file; mnist: the folder with the four IDX files; cifar10: with the six binary ones", local=True
    )
    batch: int = setting(32, "samples a batch", low=1)
    context: int = setting(64, "bytes a sample (text)", low=1)
    limit: int = setting(0, "use only the first so many bytes or training samples (0: all)", low=0)
    validation: float = setting(0.1, "share of the training data held out at its end", low=0.001, high=0.9)
    evaluate: Literal["validation", "test"] = setting(
        "validation", "evaluate on the held-out share, or train on everything and evaluate on the test set (images)"
    )


@dataclass(frozen=True)
class Pipeline:
    stages: int = setting(4, "K, the number of processes", low=1)
    boundaries: tuple[int, ...] = setting((), "first layer of each stage after the first, e.g. 2,4,6 (empty: balance)")
    window: Union[int, Literal["auto"]] = setting("auto", "batches of a stage that may lack their gradient", low=1)
    memory: int = setting(
        1024,
        "MiB of waiting batches, up to which an automatic window may grow; with rule.stash, half of it for them and "
        "their weights, half for their graphs (a batch that finds no room there is computed twice)",
        low=1,
    )
    device: str = setting("auto", "auto (the GPU of LOCAL_RANK if there is one), cpu, cuda", local=True)
    autocast: Literal["off", "bfloat16", "float16"] = setting(
        "off",
        "layers, predictors and the loss under torch.autocast; between them all stays float32. float16, for GPUs that "
        "have no bfloat16: gradients go back scaled, predictors stay float32",
    )
    compile: bool = setting(
        False,
        "torch.compile the layers of a stage, at the start; no graph waits then (rule.stash runs forwards again)",
    )


@dataclass(frozen=True)
class Rule:
    name: Literal["synthetic", "blend", "local", "delayed", "wait", "sync"] = setting(
        "blend", "where a stage's gradient comes from; sync: synchronous training, by torch.distributed.pipelining"
    )
    then: str = setting("", "rules that follow and the batch that each begins with, e.g. 501:synthetic,1501:blend")
    bp_lambda: float = setting(
        0.0, "BP(λ): 0 bootstrapped gradients, 1 the true one travelling from the loss", low=0.0, high=1.0
    )
    warmup: int = setting(0, "batches from a rule's first on during which predictors learn but are not trusted", low=0)
    warmup_rule: Literal["wait", "zero", "local", "scale"] = setting(
        "wait",
        "meanwhile: apply the true gradient, late; or none; or the prediction, taught by its own loss alone (vfbn); or "
        "a part of the prediction, its cosine with what arrives (and no longer than that)",
    )
    trust: float = setting(
        -1.0,
        "cosine with what arrives below which a prediction is not used, until it is above again (-1: used always); "
        "rule.warmup_rule says what is done meanwhile",
        low=-1.0,
        high=1.0,
    )
    trust_length: float = setting(
        0.0, "the same for its length: |ĝ| / |g| above which a prediction is not used (0: however long it is)", low=0.0
    )
    p_update: float = setting(
        1.0, "probability with which a stage updates on a batch; each stage draws for itself", low=1e-3, high=1.0
    )
    forward_unlock: bool = setting(
        False, "synthetic, local: train on a guess of the stage's input, made from x, so that no forward waits either"
    )
    correction: float = setting(1.0, "blend: weight w of g - ĝ, which joins the next update", low=1e-3)
    stash: bool = setting(
        False,
        "delayed, blend: take the gradient at the weights that the batch went through with, a copy for each under way",
    )
    compensate: float = setting(
        0.0, "delayed, with rule.stash: λ of the delay compensation g + λ g² (weights now - then) (0: none)", low=0.0
    )
    accumulate: int = setting(1, "batches whose gradients, averaged, make one update of a stage", low=1)
    reschedule: int = setting(
        0, "batches over which an update that is late by n updates goes from lr/n to lr (0: at lr always)", low=0
    )
    lookahead: int = setting(
        0,
        "delayed, blend: most updates by which a batch goes through a stage ahead of its weights, by the optimizer's "
        "momentum, if it has any; as many as its gradient will be late (0: none)",
        low=0,
        high=1000,
    )


# rule -> what a run that has it in rule.name or rule.then begins with, in the place of the defaults (docs/learning.md)
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "blend": {
        "rule": {"bp_lambda": 1.0, "correction": 0.5, "lookahead": 1, "stash": True},
        "predictor": {"matching": 0.0},
    }
}
# and in the place of those where the rate stays what it is (docs/learning-measured.md, "What it hangs on")
AT_A_CONSTANT_RATE: dict[str, dict[str, dict[str, Any]]] = {"blend": {"rule": {"lookahead": 10}}}


@dataclass(frozen=True)
class Sync:
    schedule: Literal["1f1b", "gpipe"] = setting("1f1b", "sync: in which order micro-batches go forward and back")
    microbatches: int = setting(
        0, "sync: equal parts of a batch (0: of the numbers that divide it, the largest up to 2 K)", low=0
    )


@dataclass(frozen=True)
class Predictor:
    name: Literal["vfbn", "linear", "mlp", "conv"] = setting("vfbn", "which synthetic-gradient model")
    condition: bool = setting(True, "let linear, mlp and conv see the labels (cDNI); vfbn always does")
    hidden: int = setting(-1, "hidden layers (-1: the kind's own: vfbn and linear 0, mlp 1, conv 2)", low=-1, high=8)
    width: int = setting(0, "features of a hidden layer (0: the kind's own)", low=0)
    lr: float = setting(3e-3, "learning rate of the predictor's Adam", low=0.0)
    position: bool = setting(False, "vfbn: let its head see at which place of a sequence it is, for tokens")
    attention: int = setting(0, "vfbn: heads of a causal attention at the head's entrance, for tokens (0: none)", low=0)
    sampled: int = setting(
        0, "vfbn: classes that its head scores besides those of the batch, for a large vocabulary (0: all)", low=0
    )
    similarity: float = setting(
        0.0, "vfbn: share of the similarity loss in its own loss (predsim, with rule.name = local)", low=0.0, high=1.0
    )
    residual: bool = setting(
        False,
        "vfbn: its own loss alone teaches the head; a small net beside it guesses what arriving gradients have beyond",
    )
    matching: float = setting(0.1, "vfbn: weight of the squared distance to the arriving gradient", low=0.0)
    normalise: bool = setting(False, "measure that distance by the running size of what arrives")
    cosine: float = setting(
        0.0, "weight of 1 - cosine with the arriving gradient, beside the squared distance", low=0.0
    )
    rows: float = setting(1.0, "share of an arriving gradient's samples that is learnt from", low=1e-3, high=1.0)
    steps: int = setting(1, "times that each arriving gradient is learnt from", low=1)
    lazily: int = setting(
        1, "learn when the stage would wait; one that never does, from the newest of so many (1: at once)", low=1
    )
    replay: int = setting(
        0, "newest gradients that are learnt from once more whenever one comes, the older the less", low=0
    )


@dataclass(frozen=True)
class Optimizer:
    name: Literal["adam", "adamw", "nadam", "sgd"] = setting("adam", "of every stage")
    lr: float = setting(1e-3, "learning rate", low=0.0)
    weight_decay: float = setting(0.0, "weight decay", low=0.0)
    momentum: float = setting(0.0, "of sgd", low=0.0, high=1.0)
    beta1: float = setting(0.9, "momentum of adam, adamw and nadam", low=0.0, high=0.999)
    clip: float = setting(0.0, "largest norm of a stage's gradient (0: no limit)", low=0.0)
    schedule: Literal["constant", "linear", "cosine", "steps"] = setting(
        "constant", "how lr falls over the run, by batch id"
    )
    drops: tuple[int, ...] = setting((), "steps: batches behind each of which lr is a tenth, e.g. 300000,400000")
    warmup: int = setting(0, "batches over which lr rises from 0", low=0)


@dataclass(frozen=True)
class Train:
    epochs: int = setting(1, "passes over the training data (if train.batches is 0)", low=1)
    batches: int = setting(0, "batches to train, whatever the epochs (0: by epochs)", low=0)
    seed: int = setting(0, "decides initial weights, data order and dropout", low=0)
    on_nan: Literal["stop", "skip"] = setting(
        "stop",
        "NaN or infinity, as the loss or in what comes from a neighbour, stops the run; or skips the batch, then also "
        "where it is in the data or arises in a stage",
    )


@dataclass(frozen=True)
class Eval:
    every: int = setting(0, "batches between evaluations (0: only at the end)", low=0)
    sample: int = setting(200, "bytes of text to generate at the end (language models)", low=0)


@dataclass(frozen=True)
class Checkpoints:
    every: int = setting(0, "batches between checkpoints (0: only at the end)", low=0)
    keep: int = setting(3, "newest complete checkpoints to keep", low=1)


@dataclass(frozen=True)
class TransportSettings:
    kind: Literal["zmq", "gloo", "nccl", "local"] = setting(
        "zmq",
        "zmq: a process a stage; gloo, nccl: the same, with the tensors of training by torch.distributed (nccl: from "
        "GPU to GPU); local: all stages in one process, taking turns, the same each time",
    )
    delay: int = setting(0, "local: batches that a message is under way on each hop", low=0)
    scheme: Literal["auto", "ipc", "tcp"] = setting("auto", "auto: ipc on one machine, tcp between machines")
    address: str = setting("", "this machine's address for tcp (empty: the one that reaches the master)", local=True)
    timeout: float = setting(120.0, "longest wait for a neighbour, seconds", low=0.1, high=LONGEST)
    max_message: int = setting(256, "largest tensor on the wire, MiB", low=1)


@dataclass(frozen=True)
class WireSettings:
    activations: Literal["as is", "bfloat16", "float16", "int8"] = setting(
        "as is", "how activations travel; float16 and int8 with a float32 scale a row; evaluations go as they are"
    )
    gradients: Literal["as is", "bfloat16", "float16", "int8"] = setting("as is", "how gradients travel")
    gradient_every: int = setting(
        1, "synthetic, blend: only each n-th batch's gradient is carried, and teaches, or mends", low=1
    )
    gradient_rows: float = setting(
        1.0, "synthetic: share of a gradient's samples that is carried, and teaches", low=1e-3, high=1.0
    )
    gradient_queue: int = setting(
        0,
        "synthetic: gradients that may wait for a link that is full; of more, the oldest is not carried (0: none is "
        "left out, and the stage waits)",
        low=0,
    )

    @property
    def changes(self) -> bool:
        """Whether what arrives is another than what was sent, or less."""
        return replace(self, gradient_queue=0) != WireSettings()

    @property
    def changed(self) -> dict[str, Any]:
        """Setting -> value, of those that are not at their default."""
        return {f"wire.{key}": value for key, value in vars(self).items() if value != getattr(WireSettings, key)}


@dataclass(frozen=True)
class Service:
    addresses: tuple[str, ...] = setting(
        (), "dnipipe stage: HOST:PORT where each stage but the last listens for the one behind it"
    )
    unguided_batches: int = setting(
        200,
        "batches that a stage trains by its predictor while the next stage is away; then it waits. With "
        "rule.forward_unlock also by guesses, while the one before is",
        low=0,
    )
    patience: float = setting(
        600.0, "seconds that a stage waits for an absent neighbour, then it ends", low=0.1, high=LONGEST
    )
    silence: float = setting(
        10.0,
        "seconds, at least, after which a connected stage that says nothing is taken for hung",
        low=0.5,
        high=LONGEST,
    )
    hung: float = setting(
        60.0, "seconds, at least, without progress after which a stage's own process ends", low=0.5, high=LONGEST
    )
    save_every: float = setting(30.0, "seconds between two savings of a stage's own state", low=0.1, high=LONGEST)
    restarts: int = setting(20, "times that a stage which died is started again", low=0, local=True)


@dataclass(frozen=True)
class Security:
    keys: str = setting(
        "",
        "folder of the stages' keys (dnipipe keys): connections are encrypted, and only stages are let in",
        local=True,
    )
    private_network: bool = setting(
        False,
        "without keys, listen where other machines can connect: nothing but the network keeps them out",
        local=True,
    )


@dataclass(frozen=True)
class Output:
    dir: str = setting("runs", "folder of all runs", local=True)
    run: str = setting("", "folder of this run (empty: a new one under output.dir)", local=True)
    quiet: bool = setting(False, "print only the result", local=True)
    tensorboard: bool = setting(False, "also write TensorBoard files (extra: tensorboard)", local=True)
    every: float = setting(
        1.0,
        "seconds between two lines of metrics; the table has one a second at most",
        low=0.05,
        high=LONGEST,
        local=True,
    )
    trace: bool = setting(False, "also write what each moment was spent on, for `dnipipe trace`")
