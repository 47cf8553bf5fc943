"""Handlers for an Ignite engine. Internal; the public names are ``EMAHandler`` and ``PostHocEMA``."""

__all__: list[str] = []
