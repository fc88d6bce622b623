import pytest
import torch

from hf_ifsq.randomness import generators_at, image_generators


def draws(generators):
    return [torch.rand((), generator=generator).item() for generator in generators]


def test_generators_of_a_list_and_of_a_single_image_are_used_as_they_are():
    given = [torch.Generator().manual_seed(seed) for seed in (1, 2, 3)]
    assert all(used is generator for used, generator in zip(image_generators(given, 3), given, strict=True))
    assert image_generators(given[0], 1)[0] is given[0]


def test_one_generator_for_many_images_draws_a_seed_an_image():
    several = draws(image_generators(torch.Generator().manual_seed(7), 4))
    assert len(set(several)) == 4
    assert several == draws(image_generators(torch.Generator().manual_seed(7), 4))
    assert several != draws(image_generators(torch.Generator().manual_seed(8), 4))
    # The first images do not depend on how many follow.
    assert several[:2] == draws(image_generators(torch.Generator().manual_seed(7), 2))


@pytest.mark.parametrize("num_images", [1, 3])
def test_without_a_generator_the_global_seed_decides(num_images):
    torch.manual_seed(5)
    first, second = draws(image_generators(None, num_images)), draws(image_generators(None, num_images))
    assert first != second
    torch.manual_seed(5)
    assert draws(image_generators(None, num_images)) == first


@pytest.mark.parametrize("length", [1, 3])
def test_list_of_wrong_length(length):
    with pytest.raises(ValueError, match=f"`generator`.*2 images.*list of {length}"):
        image_generators([torch.Generator()] * length, 2)


@pytest.mark.parametrize("generator", [5, "ab", [0, 1], [torch.Generator(), None], {}, torch.Generator])
def test_what_is_no_generator(generator):
    with pytest.raises(TypeError, match="`generator` must be a `torch.Generator` or a list of these, got"):
        image_generators(generator, 2)


def test_generators_at_positions_depend_on_seed_and_position_alone():
    drawn = {
        (seed, position): torch.rand(4, generator=generator)
        for seed in (0, 1)
        for position, generator in zip(range(50), generators_at(seed, range(50)))
    }
    (alone,) = generators_at(1, [7])
    assert torch.equal(torch.rand(4, generator=alone), drawn[1, 7])
    assert len({tuple(numbers.tolist()) for numbers in drawn.values()}) == len(drawn)
    # Seeds of neighbours do not make numbers of neighbours.
    first = torch.stack([numbers[0] for numbers in drawn.values()])
    assert 0.4 < first.mean() < 0.6 and 0.25 < first.std() < 0.33
    assert abs(torch.corrcoef(torch.stack([first[:-1], first[1:]]))[0, 1]) < 0.35
