"""Portions side by side: the gradients of one lane, whatever thread was faster."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitcli.lanes import Lanes, choose_lanes, twin

Portion = tuple[Tensor, Tensor]


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.BatchNorm1d(8, affine=False, momentum=0.0), nn.Linear(8, 3))


def portions(sizes: list[int]) -> list[Portion]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


def backward(model: nn.Module, portion: Portion) -> Tensor:
    loss = F.cross_entropy(model(portion[0]), portion[1], reduction="sum")
    loss.backward()
    return loss.detach()


@pytest.fixture(params=[1, 2, 3])
def lanes(request: pytest.FixtureRequest) -> Iterator[Lanes]:
    made = Lanes(build_model(), count=request.param)
    yield made
    made.close()


@pytest.mark.parametrize("sizes", [[4], [4, 4], [4, 4, 3, 2, 2]])
def test_losses_and_gradients_are_those_of_one_thread(lanes: Lanes, sizes: list[int]) -> None:
    plain, given = build_model(), portions(sizes)
    expected = [backward(plain, portion) for portion in given]
    losses = lanes.run(backward, given)
    torch.testing.assert_close(losses, expected)
    for mine, theirs in zip(lanes.models[0].parameters(), plain.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_second_run_adds_to_the_gradients_bit_for_bit(lanes: Lanes) -> None:
    given = portions([5, 5, 5, 5])
    lanes.run(backward, given)
    once = [parameter.grad.clone() for parameter in lanes.models[0].parameters() if parameter.grad is not None]
    for _ in range(3):
        lanes.models[0].zero_grad(set_to_none=True)
        lanes.run(backward, given)
        again = [parameter.grad for parameter in lanes.models[0].parameters()]
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True) if b is not None)
    lanes.run(backward, given)
    for parameter, first in zip(lanes.models[0].parameters(), once):
        torch.testing.assert_close(parameter.grad, 2 * first)
    assert all(parameter.grad is None for other in lanes.models[1:] for parameter in other.parameters())


def test_lanes_see_what_the_optimiser_and_a_loaded_state_change(lanes: Lanes) -> None:
    model = lanes.models[0]
    with torch.no_grad():
        model[0].weight.mul_(2.0)
    model.load_state_dict({name: tensor + 1.0 for name, tensor in model.state_dict().items()})
    for other in lanes.models[1:]:
        for mine, theirs in zip(model.state_dict().values(), other.state_dict().values()):
            assert mine.data_ptr() == theirs.data_ptr()


def test_modes_are_the_models(lanes: Lanes) -> None:
    for mode in (True, False):
        lanes.models[0].train(mode)
        assert lanes.run(lambda model, portion: model[2].training, [0] * 4) == [mode] * 4


def test_frozen_parameters_stay_frozen() -> None:
    model: Any = build_model()
    model[0].weight.requires_grad_(False)
    assert [p.requires_grad for p in twin(model).parameters()] == [False, True, True, True]


def test_an_error_is_raised_and_threads_are_given_back(lanes: Lanes) -> None:
    before = torch.get_num_threads()

    def work(model: nn.Module, portion: int) -> int:
        if portion == 3:
            raise ValueError("portion 3")
        return portion

    with pytest.raises(ValueError, match="portion 3"):
        lanes.run(work, range(6))
    assert torch.get_num_threads() == before
    assert lanes.run(work, [0, 1, 2]) == [0, 1, 2]


def test_short_portions_are_not_worth_a_lane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert choose_lanes(flops=3 * 547e6 * 128, images=128) == 4
    assert choose_lanes(flops=3 * 7e6 * 128, images=128) == 1
    assert choose_lanes(flops=1e15, images=3) == 1
