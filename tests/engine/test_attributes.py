"""What a forward leaves in attributes of submodules."""

from typing import Any

from torch import nn

from harness.engine.attributes import Submodules


def test_submodules_are_those_of_the_model_as_it_is_now() -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Dropout())
    submodules = Submodules(model)

    def check() -> None:
        assert submodules() == list(model.named_modules())

    check()
    assert submodules() is submodules()
    model[1].append(nn.Linear(2, 2))
    check()
    model[1] = nn.Linear(2, 2)
    check()
    del model[0]  # renames the others, without a registration
    check()
    leaf = model[1]
    leaf.child = nn.Linear(2, 2)
    check()
    model[0].child = leaf._modules.pop("child")
    check()


def test_a_model_without_children() -> None:
    model: Any = nn.Linear(2, 2)
    model.loss = 3.0
    submodules = Submodules(model)
    assert submodules.gather("loss", str) == {}
    assert submodules.gather("loss", float) == {"": 3.0}
    assert submodules.gather("loss", float) == {}
