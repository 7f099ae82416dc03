"""Some of the samples stand for all: at equal distances, no sample twice."""

from roundexport.calibration.evenly_spread import evenly_spread


def test_the_first_and_the_last_are_among_them() -> None:
    assert evenly_spread(9, 3).tolist() == [0, 4, 8]
    assert evenly_spread(1, 3).tolist() == [0]


def test_no_sample_is_taken_twice() -> None:
    assert evenly_spread(5, 32).tolist() == [0, 1, 2, 3, 4]
    assert len(set(evenly_spread(100, 64).tolist())) == 64
