"""Some of the samples stand for all: at equal distances, no sample twice."""

import torch

from roundexport.calibration.evenly_spread import enough_tokens, evenly_spread, samples_for


def test_the_first_and_the_last_are_among_them() -> None:
    assert evenly_spread(9, 3).tolist() == [0, 4, 8]
    assert evenly_spread(1, 3).tolist() == [0]


def test_no_sample_is_taken_twice() -> None:
    assert evenly_spread(5, 32).tolist() == [0, 1, 2, 3, 4]
    assert len(set(evenly_spread(100, 64).tolist())) == 64


def test_short_samples_are_as_many_more() -> None:
    assert [samples_for(32, length) for length in (128, 500, 512, 2048)] == [128, 64, 32, 32]
    taken = [len(enough_tokens(torch.zeros(samples, 256), 4)) for samples in (3, 9)]
    assert taken == [3, 8]
