"""The graph convolution against a plain loop over nodes, and the graphs that its instances hold."""

from __future__ import annotations

import networkx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.inner_training.learning import learned
from trimtab.errors import RangeError
from trimtab.inner_training.networks.graph import (
    GraphConvolution,
    initial_graph_parameters,
    normalised_adjacency,
)
from trimtab.inner_training.population import Population
from trimtab.inner_training.task import Instance
from trimtab.inner_training.tasks import make_family
from trimtab.inner_training.tasks.classification import Variation
from trimtab.inner_training.tasks.graphs import BUNDLED, CLASSES, NODES, GraphNodes, block_model, bundled_graph

NAMES = {
    "karate-club": networkx.karate_club_graph,
    "les-miserables": networkx.les_miserables_graph,
    "southern-women": networkx.davis_southern_women_graph,
    "florentine-families": networkx.florentine_families_graph,
}


def draws(count: int, *, held_out: bool) -> list[Instance]:
    return [make_family("graph").draw(seed, held_out=held_out) for seed in range(count)]


def edges_of(instance: Instance) -> np.ndarray:
    """The edges (n, n) that lie in an instance's buffers."""
    count = instance.traits["nodes"]
    adjacency = instance.buffers["adjacency"]
    assert not adjacency[count:].any() and not adjacency[:, count:].any()
    return (adjacency[:count, :count] > 0) & ~np.eye(count, dtype=bool)


def looped_convolution(values: np.ndarray, neighbours: list[list[int]], weight: np.ndarray) -> np.ndarray:
    """One layer without its bias, node by node, with the coefficients of Kipf & Welling: 1 / sqrt(d_i d_j), self included."""
    result = np.zeros((len(values), len(weight)))
    for node, around in enumerate(neighbours):
        for other in (node, *around):
            coefficient = 1 / np.sqrt((len(around) + 1) * (len(neighbours[other]) + 1))
            result[node] += coefficient * (weight @ values[other])
    return result


@pytest.mark.parametrize("held_out", [False, True])
def test_network_equals_a_loop_over_neighbours(held_out: bool) -> None:
    for instance in draws(6, held_out=held_out):
        module = GraphConvolution(NODES, 32, 32, CLASSES)
        module.load_state_dict(
            {name: torch.tensor(value) for name, value in {**instance.parameters, **instance.buffers}.items()}
        )
        torch.nn.init.uniform_(module.first.bias, generator=torch.Generator().manual_seed(0))
        torch.nn.init.uniform_(module.second.bias, generator=torch.Generator().manual_seed(1))
        neighbours = [np.flatnonzero(row).tolist() for row in edges_of(instance)]
        values = instance.buffers["features"][: len(neighbours)].astype(np.float64)
        weights = {name: value.detach().double().numpy() for name, value in module.named_parameters()}
        hidden = looped_convolution(values, neighbours, weights["first.weight"]) + weights["first.bias"]
        hidden = np.maximum(hidden, 0) * instance.buffers["gate0"]
        expected = looped_convolution(hidden, neighbours, weights["second.weight"]) + weights["second.bias"]
        nodes = instance.rows % NODES
        outputs = module(torch.from_numpy(nodes)[:, None]).detach().numpy()
        np.testing.assert_allclose(outputs, expected[nodes], rtol=1e-4, atol=1e-4)


@given(nodes=st.integers(1, 12), seed=st.integers(0, 1000))
def test_normalised_adjacency(nodes: int, seed: int) -> None:
    upper = np.triu(np.random.default_rng(seed).random((nodes, nodes)) < 0.4, 1)
    edges = upper | upper.T
    adjacency = normalised_adjacency(edges)
    np.testing.assert_array_equal(adjacency, adjacency.T)
    np.testing.assert_array_equal(adjacency > 0, edges | np.eye(nodes, dtype=bool))
    eigenvalues = np.linalg.eigvalsh(adjacency.astype(np.float64))
    assert eigenvalues[-1] == pytest.approx(1, abs=1e-5)
    assert eigenvalues[0] > -1


@pytest.mark.parametrize("name", NAMES)
def test_bundled_graphs_are_those_of_networkx(name: str) -> None:
    graph, source = bundled_graph(name), NAMES[name]()
    assert graph.edges.sum() == 2 * source.number_of_edges()
    places = {node: place for place, node in enumerate(source)}
    assert all(graph.edges[places[a], places[b]] for a, b in source.edges)
    counts = np.bincount(graph.labels)
    assert counts.size <= CLASSES
    assert counts.min() >= 6


def test_labels_of_bundled_graphs() -> None:
    karate = networkx.karate_club_graph()
    clubs = ["Mr. Hi" if label == 0 else "Officer" for label in bundled_graph("karate-club").labels]
    assert clubs == [club for _, club in karate.nodes(data="club")]
    women = dict(zip(NAMES["southern-women"](), bundled_graph("southern-women").labels, strict=True))
    assert {women[name] for name in ("Evelyn Jefferson", "Ruth DeSand")} == {0}
    assert {women[name] for name in ("Verne Sanderson", "Flora Price")} == {1}
    assert [name for name, label in women.items() if label == 2] == [f"E{number}" for number in range(1, 15)]
    florence = dict(zip(NAMES["florentine-families"](), bundled_graph("florentine-families").labels, strict=True))
    allied = {"Medici", "Acciaiuoli", "Barbadori", "Ridolfi", "Tornabuoni", "Albizzi", "Salviati"}
    assert {name for name, label in florence.items() if label == florence["Medici"]} == allied
    novel = dict(zip(NAMES["les-miserables"](), bundled_graph("les-miserables").labels, strict=True))
    circles = [("Myriel", "MlleBaptistine"), ("Enjolras", "Gavroche"), ("Fantine", "Tholomyes"), ("Valjean", "Cosette")]
    assert all(novel[one] == novel[other] for one, other in circles)
    assert len({novel[one] for one, _ in circles}) == 4


def test_no_graph_is_in_both_roles() -> None:
    graphs = [{edges_of(one).tobytes() for one in draws(60, held_out=held_out)} for held_out in (False, True)]
    assert graphs[0].isdisjoint(graphs[1])
    for held_out in (False, True):
        random = [one for one in draws(60, held_out=held_out) if one.traits["graph"] == "block-model"]
        assert {one.traits["nodes"] % 2 for one in random} == {int(held_out)}
        assert len({edges_of(one).tobytes() for one in random}) == len(random) > 30
        assert {one.traits["graph"] for one in draws(60, held_out=held_out)} == {"block-model", *BUNDLED[held_out]}


def test_block_models_have_the_edges_that_were_drawn() -> None:
    rng = np.random.default_rng(0)
    degrees, ratios = [], []
    for _ in range(60):
        graph = block_model(rng, 90)
        same = graph.labels[:, None] == graph.labels
        degrees.append(graph.edges.sum(1).mean() / graph.traits["mean_degree"])
        inside, between = graph.edges[same].sum() / (same.sum() - 90), graph.edges[~same].mean()
        ratios.append(np.log(inside / between / graph.traits["affinity_ratio"]))
        assert np.ptp(np.bincount(graph.labels)) <= 1
        assert 4 <= graph.traits["mean_degree"] <= 12 and 3 <= graph.traits["affinity_ratio"] <= 15
    assert np.mean(degrees) == pytest.approx(1, abs=0.05)
    assert np.mean(ratios) == pytest.approx(0, abs=0.1)


def test_labels_are_the_classes_of_the_nodes_and_noise_is_on_training_ones_only() -> None:
    clean = GraphNodes("graph", "the same without noise")
    clean.variation = Variation(input_scale=(1.0, 1.0), label_noise=0.0)
    wrong = 0
    for seed, noisy in enumerate(draws(40, held_out=False)):
        true = clean.draw(seed, held_out=False)
        np.testing.assert_array_equal(true.rows, noisy.rows)
        train = noisy.sizes[0]
        np.testing.assert_array_equal(true.labels[train:], noisy.labels[train:])
        wrong += (true.labels != noisy.labels).sum()
        if noisy.traits["graph"] in NAMES:
            np.testing.assert_array_equal(true.labels, bundled_graph(noisy.traits["graph"]).labels[true.rows % NODES])
    assert wrong > 50


def test_inactive_units_stay_at_zero() -> None:
    module = GraphConvolution(6, 4, 8, 3)
    parameters, gate = initial_graph_parameters(module, np.random.default_rng(0), width=5, scale=2.0)
    assert gate.tolist() == [1.0] * 5 + [0.0] * 3
    assert not parameters["first.weight"][5:].any() and not parameters["second.weight"][:, 5:].any()
    assert parameters["first.weight"][:5].all() and parameters["second.weight"][:, :5].all()
    assert np.abs(parameters["first.weight"]).max() <= 2 * np.sqrt(6 / 9)
    instance = next(one for one in draws(20, held_out=False) if one.traits["width"] < 20)
    population = Population(make_family("graph"), 1, mode="eager")
    population.reset([0], [instance])
    population.advance(5)
    idle = instance.buffers["gate0"] == 0
    trained = population.parameters_of(0)
    assert not trained["first.weight"][idle].any() and not trained["second.weight"][:, idle].any()
    for width in (0, 9):
        with pytest.raises(RangeError, match="width"):
            initial_graph_parameters(module, np.random.default_rng(0), width=width, scale=1.0)
    with pytest.raises(RangeError, match="nodes is 0"):
        GraphConvolution(0, 1, 1, 1)


def test_it_learns_and_rates_matter() -> None:
    loss = learned("graph", "adam", (1e-5, 3e-3, 1.0), steps=150, instances=16)
    assert loss[1] < 0.45 * loss.initial
    assert loss[0] > 2 * loss[1]
    assert loss[2] > 1.2 * loss[1]
