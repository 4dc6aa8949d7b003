"""Node classification: the nodes of random graphs with planted classes, and of four graphs bundled with networkx."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

from trimtab.inner_training.networks import Arrays, build_module
from trimtab.inner_training.networks.graph import GraphConvolution, initial_graph_parameters, normalised_adjacency
from trimtab.inner_training.tasks.classification import ClassificationFamily, Examples, Variation
from trimtab.inner_training.tasks.recipe import log_uniform

NODES, FEATURES, CLASSES, HIDDEN = 96, 32, 5, 32
FEWEST = 48  # nodes of a random graph
BUNDLED = {False: ("karate-club", "les-miserables"), True: ("southern-women", "florentine-families")}
BUNDLED_SHARE = 0.3  # of the instances


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A graph with classes.

    Attributes:
        edges: (n, n) bool, symmetric, without self-loops.
        labels: (n,) int64 class of each node.
        traits: what was drawn.
    """

    edges: np.ndarray
    labels: np.ndarray
    traits: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Nodes(Examples):
    """The nodes of a graph as examples.

    Attributes:
        edges: (n, n) bool.
        values: (n, FEATURES) features of each node.
    """

    edges: np.ndarray
    values: np.ndarray


def _edges(graph: Any) -> np.ndarray:
    import networkx

    edges: np.ndarray = networkx.to_numpy_array(graph, weight=None) > 0
    return edges


def _karate_club() -> tuple[np.ndarray, list[object]]:
    """Zachary's karate club: which of the two clubs a member joined when the club split."""
    from networkx import karate_club_graph

    graph = karate_club_graph()
    return _edges(graph), [club for _, club in graph.nodes(data="club")]


def _les_miserables() -> tuple[np.ndarray, list[object]]:
    """Characters of *Les Miserables*: their community, by the greedy modularity of their joint appearances."""
    from networkx import convert_node_labels_to_integers, les_miserables_graph
    from networkx.algorithms.community import greedy_modularity_communities

    # Sets of numbers, unlike sets of names, have the same order in every process.
    graph = convert_node_labels_to_integers(les_miserables_graph())
    communities = greedy_modularity_communities(graph, weight="weight")
    community = {node: number for number, members in enumerate(communities) for node in members}
    return _edges(graph), [community[node] for node in graph]


def _southern_women() -> tuple[np.ndarray, list[object]]:
    """Women and the events they attended: women of one clique, of the other (Freeman 2003), and events."""
    from networkx import davis_southern_women_graph

    graph = davis_southern_women_graph()
    women = [node for node, side in graph.nodes(data="bipartite") if side == 0]
    return _edges(graph), ["event" if node not in women else women.index(node) < 9 for node in graph]


def _florentine_families() -> tuple[np.ndarray, list[object]]:
    """Families of Florence, tied by marriage: the Medici and the families that married them, and the others."""
    from networkx import florentine_families_graph

    graph = florentine_families_graph()
    return _edges(graph), [node == "Medici" or graph.has_edge(node, "Medici") for node in graph]


_LOADERS: dict[str, Callable[[], tuple[np.ndarray, list[object]]]] = {
    "karate-club": _karate_club,
    "les-miserables": _les_miserables,
    "southern-women": _southern_women,
    "florentine-families": _florentine_families,
}


@cache
def bundled_graph(name: str) -> Graph:
    """A graph of networkx, with its classes numbered in the order in which they first occur."""
    edges, classes = _LOADERS[name]()
    numbers = {value: number for number, value in enumerate(dict.fromkeys(classes))}
    return Graph(edges=edges, labels=np.array([numbers[value] for value in classes]), traits={"graph": name})


def block_model(rng: np.random.Generator, nodes: int) -> Graph:
    """A stochastic block model (Holland, Laskey & Leinhardt, *Social Networks* 5, 1983) with classes of equal size.

    2 to 5 classes; a mean degree, log-uniform from 4 to 12; and an edge inside a class 3 to 15 times as likely as one
    between classes, log-uniform.

    Args:
        rng: source of the graph.
        nodes: how many.
    """
    classes = int(rng.integers(2, CLASSES + 1))
    degree, ratio = log_uniform(rng, 4, 12), log_uniform(rng, 3, 15)
    labels = rng.permutation(np.arange(nodes) % classes)
    between = degree / nodes * classes / (ratio + classes - 1)
    chance = np.where(labels[:, None] == labels, ratio * between, between)
    upper = np.triu(rng.random((nodes, nodes)) < chance, 1)
    traits = {"graph": "block-model", "mean_degree": degree, "affinity_ratio": ratio}
    return Graph(edges=upper | upper.T, labels=labels, traits=traits)


class GraphNodes(ClassificationFamily):
    """Nodes of one graph, some with known classes, classified by a two-layer graph convolution.

    A random graph is new in each instance, with an even number of nodes in training and an odd one in held-out
    instances; of the bundled graphs two belong to either. So no graph is in both.

    Rows of the table of inputs are node numbers, first those of training graphs and then those of held-out ones.
    """

    module: GraphConvolution
    max_examples = NODES
    variation = Variation(input_scale=(1.0, 1.0))  # node numbers have no scale; the features have their own

    def __init__(self, name: str, doc: str) -> None:
        self.name, self.doc = name, doc
        self.module = build_module(lambda: GraphConvolution(NODES, FEATURES, HIDDEN, CLASSES), seed=0)
        self.widest = HIDDEN
        self.inputs = torch.arange(NODES).repeat(2)[:, None]
        self.max_batch = self.recipe.batch[1]
        self.loss_cap = 2 * math.log(CLASSES)

    def examples(self, rng: np.random.Generator, held_out: bool) -> Nodes:
        """Draws a graph and features of its nodes.

        The features of a block model are its classes' means, of a log-uniform length, under standard normal noise (the
        contextual block model, Deshpande et al., arXiv 1807.08838). Those of a bundled graph are noise alone, a random
        projection of the identity: only the edges tell.
        """
        if rng.random() < BUNDLED_SHARE:
            graph, signal = bundled_graph(BUNDLED[held_out][int(rng.integers(2))]), 0.0
        else:
            half = int(rng.integers(FEWEST // 2, NODES // 2))
            graph, signal = block_model(rng, 2 * half + int(held_out)), log_uniform(rng, 0.1, 0.5)
        count, classes = graph.labels.size, int(graph.labels.max()) + 1
        scale = log_uniform(rng, 0.3, 3.0)
        means = signal * rng.standard_normal((classes, FEATURES))
        values = scale * (means[graph.labels] + rng.standard_normal((count, FEATURES)))
        nodes = rng.permutation(count)
        return Nodes(
            rows=nodes + NODES * int(held_out),
            labels=graph.labels[nodes],
            classes=classes,
            features=FEATURES,
            traits={**graph.traits, "nodes": count, "feature_signal": signal, "feature_scale": scale},
            edges=graph.edges,
            values=values,
        )

    def initial(self, rng: np.random.Generator, width: int, scale: float, data: Examples) -> tuple[Arrays, Arrays]:
        """Draws initial parameters; the buffers are the graph, padded to 96 nodes, and the gate."""
        assert isinstance(data, Nodes)
        parameters, gate = initial_graph_parameters(self.module, rng, width, scale)
        count = len(data.edges)
        adjacency = np.zeros((NODES, NODES), dtype=np.float32)
        adjacency[:count, :count] = normalised_adjacency(data.edges)
        values = np.zeros((NODES, FEATURES), dtype=np.float32)
        values[:count] = data.values
        return parameters, {"adjacency": adjacency, "features": values, "gate0": gate}
