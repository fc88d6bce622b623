"""Casting of diffusers' models."""

import logging
from typing import Any, Self

from torch import nn


class CastingMixin(nn.Module):
    """
    In front of [`~diffusers.ModelMixin`], which warns at each cast of modules to be kept in float32, also where there
    are none to list.
    """

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As of any module."""
        logger = logging.getLogger("diffusers.models.modeling_utils")
        logger.addFilter(_names_a_module)
        try:
            return super().to(*args, **kwargs)
        finally:
            logger.removeFilter(_names_a_module)


def _names_a_module(record: logging.LogRecord) -> bool:
    return "should be kept in float32: []" not in record.getMessage()
