"""Which predictor stands at an edge: the kind that the settings name, made to fit what passes there.

[predictor] settings ─┐
shapes at the edge ───┼─► build ─► Regression, VFBN, Completed (predictors.py); or ConfigError, with what would fit
the model's loss ─────┘
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn as nn

from dnipipe.config import Predictor as Settings
from dnipipe.errors import ConfigError
from dnipipe.heads import Attention, Pool, Position, Residual, Scores, Similarity
from dnipipe.lessons import Distance
from dnipipe.nets import convolutions, dense
from dnipipe.predictors import VFBN, Completed, Edge, Labels, Loss, Predictor, Regression


def build(settings: Settings, edge: Edge, loss: Loss) -> Predictor:
    """The predictor that the settings name, for this edge. Raises ConfigError where kind and activation do not fit."""
    return KINDS[settings.name](settings, edge, loss)


def _linear(settings: Settings, edge: Edge, loss: Loss) -> Regression:
    if settings.hidden > 0:
        raise ConfigError(
            f"predictor.hidden = {settings.hidden} with predictor.name = linear: use predictor.name = mlp"
        )
    return _regression(settings, edge, hidden=0)


def _mlp(settings: Settings, edge: Edge, loss: Loss) -> Regression:
    return _regression(settings, edge, hidden=1 if settings.hidden < 0 else settings.hidden)


def _regression(settings: Settings, edge: Edge, hidden: int) -> Regression:
    if len(edge.h) not in (2, 3):
        raise ConfigError(
            f"predictor.name = {settings.name} cannot guess for an activation of shape {edge.h}: "
            "use predictor.name = conv (images) or vfbn (any)"
        )
    return _rows(settings, edge, hidden, seen=edge.h[-1])


def _rows(settings: Settings, edge: Edge, hidden: int, seen: int) -> Regression:
    """From `seen` features of a row, and its label, to the gradient."""
    labels, features = _labels(settings, edge), edge.h[-1]
    seen += labels.features if labels else 0
    return Regression(dense(seen, features, hidden, settings.width or 4 * features), labels, _distance(settings))


def _conv(settings: Settings, edge: Edge, loss: Loss) -> Regression:
    if len(edge.h) != 4:
        raise ConfigError(
            f"predictor.name = conv needs an activation (B, C, H, W), but it has shape {edge.h}: "
            "use predictor.name = mlp, or vfbn (any)"
        )
    return _planes(settings, edge, hidden=2 if settings.hidden < 0 else settings.hidden, seen=edge.h[1])


def _planes(settings: Settings, edge: Edge, hidden: int, seen: int) -> Regression:
    """From `seen` channels, and the labels as others, to the gradient."""
    labels, channels = _labels(settings, edge), edge.h[1]
    seen += labels.features if labels else 0
    net = convolutions(seen, channels, hidden, settings.width or channels)
    return Regression(net, labels, _distance(settings))


def _labels(settings: Settings, edge: Edge) -> Labels | None:
    if not settings.condition:
        return None
    if edge.classes is None or not (edge.per_token or len(edge.y) == 1):
        raise ConfigError(
            f"predictor.condition = true needs class labels, one a sample or one a token, but the labels have shape "
            f"{edge.y}{'' if edge.classes else ' and are no classes'}: use predictor.name = vfbn, or condition = false"
        )
    return Labels(edge)


def _vfbn(settings: Settings, edge: Edge, loss: Loss) -> VFBN:
    made = _head(settings, edge, loss)
    if not settings.residual:
        return made
    if settings.matching == 0:
        raise ConfigError(
            "predictor.residual with predictor.matching = 0: nothing would teach it what the head misses; set "
            "predictor.matching = 1"
        )
    if len(edge.h) == 4:
        return Completed(made, _planes(settings, edge, hidden=1, seen=2 * edge.h[1]))
    return Completed(made, _rows(settings, edge, hidden=1, seen=2 * edge.h[-1]))


def _head(settings: Settings, edge: Edge, loss: Loss) -> VFBN:
    pointwise = len(edge.output) == len(edge.h) and edge.output[1:-1] == edge.h[1:-1]
    if not pointwise and len(edge.output) != 2:
        raise ConfigError(
            f"predictor.name = vfbn cannot guess the model's output {edge.output} from an activation {edge.h}: "
            "cut elsewhere, or use predictor.name = linear, mlp or conv"
        )
    features = 4 * edge.h[1] if len(edge.h) == 4 and not pointwise else edge.h[-1]
    layers: list[nn.Module] = []
    if settings.position:
        layers.append(_position(settings, edge))
    if settings.attention:
        layers.append(_attention(settings, edge))
    if not pointwise:
        layers.append(Pool(len(edge.h)))
    layers += [Residual(features, settings.width or 4 * features) for _ in range(max(settings.hidden, 0))]
    similarity = (_similarity(edge, features), settings.similarity) if settings.similarity else None
    classes = edge.output[-1]
    if 0 < settings.sampled < classes:
        if edge.classes is None:
            raise ConfigError(
                f"predictor.sampled = {settings.sampled}, but the labels are no classes: leave predictor.sampled at 0"
            )
        scores = Scores(features, classes, settings.sampled)
        return VFBN(nn.Sequential(*layers), loss, settings.matching, scores, similarity, _distance(settings))
    head = nn.Sequential(*layers, nn.Linear(features, classes))
    return VFBN(head, loss, settings.matching, None, similarity, _distance(settings))


def _distance(settings: Settings) -> Distance:
    return Distance(settings.normalise, settings.cosine)


def _position(settings: Settings, edge: Edge) -> Position:
    if len(edge.h) != 3:
        raise ConfigError(
            f"predictor.position = true needs an activation (B, T, D), but it has shape {edge.h}: set "
            "predictor.position = false"
        )
    return Position(*edge.h[1:])


def _attention(settings: Settings, edge: Edge) -> Attention:
    if len(edge.h) != 3 or edge.h[-1] % settings.attention:
        raise ConfigError(
            f"predictor.attention = {settings.attention} needs an activation (B, T, D) with D a multiple of it, but it "
            f"has shape {edge.h}: set predictor.attention = 0"
        )
    return Attention(edge.h[-1], settings.attention)


def _similarity(edge: Edge, features: int) -> Similarity:
    if edge.classes is None or not (edge.per_token or (len(edge.h) == 2 and len(edge.y) == 1)):
        raise ConfigError(
            f"predictor.similarity needs rows with a class each, but h has shape {edge.h} and the labels {edge.y}"
            f"{'' if edge.classes else ', which are no classes'}: set predictor.similarity = 0"
        )
    return Similarity(features, edge.classes)


KINDS: dict[str, Callable[[Settings, Edge, Loss], Predictor]] = {
    "linear": _linear,
    "mlp": _mlp,
    "conv": _conv,
    "vfbn": _vfbn,
}
