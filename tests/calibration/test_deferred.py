"""Tensors that are computed when they are needed: known properties, and the values of a plain run."""

import pytest
import torch
import torch.nn.functional as F

from dq_runtime.calibration.deferred import Deferred, computed, deferred, on_meta, sources

CPU = torch.device("cpu")


@pytest.fixture
def x():
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def made():
    """Makes deferred tensors, and notes the names of those that are computed."""
    names = []

    def make(name, tree):
        return deferred(name, on_meta(tree), CPU, lambda: names.append(name) or tree)

    make.names = names
    return make


def network(x, weight):
    """What models compute between blocks."""
    x = F.group_norm(x, 2, weight[:4], weight[4:])
    first, second = x.permute(0, 2, 3, 1).reshape(2, 36, 4).chunk(2, dim=1)
    y = torch.cat([first, second + 1], dim=1).transpose(1, 2).unflatten(2, (6, 6))
    y = F.interpolate(y, scale_factor=2.0, mode="nearest")
    return y.to(torch.bfloat16) * torch.arange(12, device=y.device), {"sum": y.sum(), "sizes": [y.shape[0], y.dtype]}


def test_values_and_properties_are_those_of_a_plain_run(x, made):
    weight = torch.randn(8)
    expected = network(x, weight)
    found = network(made("x", x), weight)

    assert made.names == []
    assert found[0].shape == expected[0].shape
    assert found[0].stride() == expected[0].stride()
    assert found[0].dtype == expected[0].dtype
    assert found[0].device == expected[0].device
    assert found[1]["sizes"] == expected[1]["sizes"]
    image, others = computed(found)
    assert torch.equal(image, expected[0])
    assert torch.equal(others["sum"], expected[1]["sum"])
    assert not isinstance(image, Deferred)
    assert made.names == ["x"]


def test_only_what_is_needed_is_computed_and_once(x, made):
    a, b = made("a", x), made("b", (x + 1, {"c": x + 2}))
    wanted, unwanted = a * 2, b[0] + a

    assert torch.equal(computed(wanted), 2 * x)
    assert made.names == ["a"]
    assert torch.equal(computed(unwanted), (x + 1) + x)
    assert torch.equal(computed(b[1]["c"]), x + 2)
    assert made.names == ["a", "b"]


def test_sources_are_those_of_all_operations(x, made):
    a, b, c = (made(name, x) for name in "abc")
    tree = {"one": torch.cat([a, b]).relu(), "two": [c[0], x, 3]}

    assert set(sources(tree)) == {"a", "b", "c"}
    assert set(sources(tree["one"])) == {"a", "b"}
    assert set(sources([x, None])) == set()


def test_several_results_of_one_operation_come_apart(x, made):
    values, indices = made("x", x).max(dim=1)

    assert torch.equal(computed(indices), x.max(dim=1).indices)
    assert torch.equal(computed(values), x.max(dim=1).values)


def test_numbers_are_computed_at_once(x, made):
    assert float(made("x", x).sum()) == float(x.sum())
    assert made.names == ["x"]


def test_changes_in_place_are_refused(x, made):
    with pytest.raises(NotImplementedError, match="in place"):
        made("x", x).add_(1)


def test_memory_layouts_are_known(made):
    for tensor in (
        torch.ones(2, 3).T,
        torch.ones(1, 3).expand(4, 3),
        torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last),
    ):
        assert made("x", tensor).stride() == tensor.stride()
