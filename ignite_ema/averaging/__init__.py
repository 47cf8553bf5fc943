"""Averages modules and tensors; knows neither engines nor files. Internal: the public name is ``ModelAverage``."""

__all__: list[str] = []
