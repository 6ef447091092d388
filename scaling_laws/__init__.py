"""Scaling laws fitted from logged runs."""

__all__: list[str] = []
