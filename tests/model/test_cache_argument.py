"""The cache goes to a model's forward by the name it has there."""

from torch import nn

from roundexport.model.cache_argument import cache_argument


class _New(nn.Module):
    def forward(self, input_ids: int, cache: object = None, **more: object) -> object:
        return cache


class _Old(nn.Module):
    def forward(self, input_ids: int, past_key_values: object = None, **more: object) -> object:
        return past_key_values


def test_the_forwards_own_name_is_used() -> None:
    kept = object()
    for model in (_New(), _Old()):
        assert model(1, **cache_argument(model, kept)) is kept
