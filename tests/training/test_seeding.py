import torch

from effdet_fast.training.seeding import algorithm_choice, seed_step


def _draw(seed, step, rank):
    seed_step(seed, step, rank)
    return torch.rand(4)


def test_numbers_depend_on_seed_step_and_rank_alone():
    base = _draw(1, 2, 3)
    torch.rand(1000)
    assert torch.equal(base, _draw(1, 2, 3))
    others = [_draw(2, 2, 3), _draw(1, 3, 3), _draw(1, 2, 4), _draw(2, 1, 3)]
    assert not any(torch.equal(base, other) for other in others)


def test_the_callers_choice_comes_back():
    state = torch.random.get_rng_state()
    cudnn = torch.backends.cudnn.benchmark
    with algorithm_choice(True):
        assert torch.are_deterministic_algorithms_enabled()
        torch.manual_seed(5)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark == cudnn
    assert torch.equal(state, torch.random.get_rng_state())
