"""What `install` does to the functions by which a house builds its models."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

_logger = logging.getLogger(__name__)


class Factories:
    """Functions of a package that build models.

    Args:
        package: which need not be installed.
        namespaces: its modules in which users and itself find the functions.
        names: of the functions; those that a version lacks are passed over.
        wanted: whether a model is one to be made fast.
    """

    def __init__(
        self, package: str, namespaces: tuple[str, ...], names: tuple[str, ...], wanted: Callable[[nn.Module], bool]
    ) -> None:
        self.package, self.namespaces, self.names, self.wanted = package, namespaces, names, wanted
        self.replaced: list[tuple[ModuleType, str, Callable[..., nn.Module]]] = []

    def install(self, made: Callable[[nn.Module], object]) -> None:
        """Have the functions call `made` with every wanted model that they build."""
        if self.replaced or importlib.util.find_spec(self.package) is None:
            return
        try:
            found = [importlib.import_module(f"{self.package}.{name}") for name in self.namespaces]
        except Exception as error:  # one for another torch, for example
            first_line = str(error).partition("\n")[0]
            _logger.warning("%s cannot be imported, its functions stay as they are: %s", self.package, first_line)
            return
        for namespace in found:
            for name in self.names:
                if hasattr(namespace, name):
                    factory = getattr(namespace, name)
                    self.replaced.append((namespace, name, factory))
                    setattr(namespace, name, self._calling(made, factory))

    def uninstall(self) -> None:
        """Undo `install`."""
        while self.replaced:
            setattr(*self.replaced.pop())

    def _calling(
        self, made: Callable[[nn.Module], object], factory: Callable[..., nn.Module]
    ) -> Callable[..., nn.Module]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> nn.Module:
            model = factory(*args, **kwargs)
            if self.wanted(model):
                made(model)
            return model

        return make
