"""Values derived from a tensor once per version of its contents."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


def once_per_version(function: Callable[[Tensor], T]) -> Callable[[Tensor], T]:
    """Remember ``function(tensor)`` until the tensor dies or is written to in place.

    The result must not hold the tensor itself, which could then never die. Inference tensors have no version counter;
    for them the function runs on every call.
    """
    known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
    lock = threading.Lock()

    def renew_lock() -> None:
        """Another thread of the parent may have held it when this process was forked."""
        nonlocal lock
        lock = threading.Lock()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew_lock)

    @wraps(function)
    def cached(tensor: Tensor) -> T:
        if tensor.is_inference():
            return function(tensor)
        version = tensor._version
        with lock:
            entry = known.get(tensor)
        if entry is None or entry[0] != version:
            entry = (version, function(tensor.detach()))
            with lock:
                known[tensor] = entry
        return entry[1]

    return cached
