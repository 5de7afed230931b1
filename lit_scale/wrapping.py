"""Change one object during a run: wrap a method or replace an attribute, and undo it (wrapped methods in any order)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["replace", "wrap"]

#: Called with the method that it wraps, and with the arguments of the call.
Around = Callable[..., Any]


def wrap(module: Any, name: str, around: Around, *, outermost: bool = False) -> Callable[[], None]:
    """Run ``around(method, *args, **kwargs)`` in place of a method of this one object.

    Args:
        module: The object; other objects of its class keep their method.
        name: Name of the method.
        around: The wrapper. A later wrapper encloses the earlier ones.
        outermost: Enclose all wrappers that are not ``outermost``, also later ones. Needed by a wrapper that replaces
            the batch of a step, so that the others act on the batch that is trained.

    Returns:
        A function that removes the wrapper.

    Example:
        >>> class Greeting:
        ...     def text(self, name):
        ...         return f"hello {name}"
        >>> greeting = Greeting()
        >>> unwrap = wrap(greeting, "text", lambda method, name: method(name).upper())
        >>> greeting.text("you")
        'HELLO YOU'
        >>> unwrap()
        >>> greeting.text("you")
        'hello you'
    """
    wrapped = module.__dict__.get(name)
    layers: list[tuple[bool, Around]] | None = getattr(wrapped, "layers", None)
    if layers is None:
        wrapped, layers = _wrapped(wrapped, getattr(module, name))
        module.__dict__[name] = wrapped
    layer = (outermost, around)
    inner = len(layers) if outermost else sum(not out for out, _ in layers)
    layers.insert(inner, layer)

    def unwrap() -> None:
        own = [i for i, other in enumerate(layers) if other is layer]
        for i in own:
            del layers[i]
        if own and not layers and module.__dict__.get(name) is wrapped:
            if wrapped.before is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = wrapped.before

    return unwrap


def replace(thing: Any, name: str, value: Any) -> Callable[[], None]:
    """Set an attribute, or a submodule, of this one object.

    Args:
        thing: The object.
        name: Of the attribute.
        value: The new one.

    Returns:
        A function that sets the former one again, or uncovers that of the class. Replacements of one attribute have to
        be undone latest first.

    Example:
        >>> from torch import nn
        >>> layer = nn.Sequential(nn.ReLU())
        >>> put_back = replace(layer, "forward", lambda x: x)
        >>> layer(-1)
        -1
        >>> put_back()
        >>> "forward" in vars(layer)
        False
    """
    own = {**vars(thing).get("_modules", {}), **vars(thing)}
    setattr(thing, name, value)

    def put_back() -> None:
        delattr(thing, name)  # first, so that None is a plain attribute again and no submodule
        if name in own:
            setattr(thing, name, own[name])

    return put_back


def _wrapped(before: Any, method: Callable[..., Any]) -> tuple[Any, list[tuple[bool, Around]]]:
    """A method with a list of wrappers, the innermost first; ``before`` is the object's own attribute, if any."""
    layers: list[tuple[bool, Around]] = []

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        inner = method
        for _, around in layers:
            inner = functools.partial(around, inner)
        return inner(*args, **kwargs)

    call.layers, call.before = layers, before  # type: ignore[attr-defined]
    return call, layers
