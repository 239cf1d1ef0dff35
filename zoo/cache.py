"""The recurrent cache: states of all layers, as one of transformers' own cache layer types."""

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import Cache, CacheLayerMixin

from statezoo.zoo.mixer import State, map_state, name_tensors

AnyCache = TypeVar("AnyCache", bound=Cache)
LAYER_TYPE = "recurrent_state"


class RecurrentStateLayer(CacheLayerMixin):
    """The state of one layer.

    ``DynamicCache(config=net.config)`` makes one per layer. States are replaced, never written in
    place, so a shallow copy is a fork.

    Attributes:
        state: What the mixer returned last; ``None`` before the first token.
        seen: Columns of tokens processed, padding included.
    """

    _layer_type = LAYER_TYPE
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state: State = None
        self.seen = 0

    def put(self, state: State, tokens: int) -> None:
        """Keep the state after ``tokens`` more columns."""
        self.state, self.seen, self.is_initialized = state, self.seen + tokens, True

    def map(self, function: Any) -> None:
        """Apply ``function`` to every tensor of the state."""
        self.state = map_state(function, self.state)

    @property
    def batch_size(self) -> int:
        """Number of sequences."""
        for tensor in name_tensors(self.state).values():
            return tensor.shape[0]
        raise AttributeError("no state yet")  # transformers asks with hasattr

    def get_seq_length(self) -> int:
        """Return the columns of tokens processed."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset that an attention mask would cover."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name up to transformers 5.2x

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select sequences, for beam search."""
        self.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self.map(lambda x: x.repeat_interleave(repeats, 0))

    def crop(self, *args: Any) -> None:
        """Refuse: a recurrent state cannot be wound back.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "a recurrent state cannot be cropped: keep a fork from before, zoo.fork(cache)."
        )

    def offload(self) -> None:
        """Move the state to the CPU."""
        tensors = name_tensors(self.state).values()
        self.device = next((x.device for x in tensors), torch.device("cpu"))
        self.map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the state back."""
        if self.is_initialized and hasattr(self, "device"):
            self.map(lambda x: x.to(self.device, non_blocking=True))

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: states come from the mixers."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse: keys and values have no place here.

        Raises:
            TypeError: Always.
        """
        raise TypeError("a recurrent cache layer takes states: use put(state, tokens).")


cache_utils.STATIC_LAYER_TYPE_MAPPING[LAYER_TYPE] = RecurrentStateLayer


def fork(cache: AnyCache) -> AnyCache:
    """Copy a cache such that both may go on; the tensors are shared until replaced."""
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    return twin


def detach(cache: AnyCache) -> AnyCache:
    """Cut the states of a cache from the graph, in place, for truncated back-propagation."""
    for layer in states_of(cache):
        layer.map(Tensor.detach)
    return cache


def states_of(cache: Cache) -> list[RecurrentStateLayer]:
    """Return the layers of a cache.

    Raises:
        TypeError: If it was made for another kind of model.
    """
    layers = []
    for layer in cache.layers:
        if not isinstance(layer, RecurrentStateLayer):
            raise TypeError(
                f"the cache holds {type(layer).__name__}, not recurrent states: make it with "
                "DynamicCache(config=net.config), or pass none and use_cache=True."
            )
        layers.append(layer)
    return layers


def cache_to_tensors(cache: Cache) -> dict[str, Tensor]:
    """Flatten a cache into named tensors, ready for safetensors: ``{"0.S": ..., "seen": ...}``."""
    layers = states_of(cache)
    tensors = name_tensors(tuple(layer.state for layer in layers))
    seen = torch.tensor([layer.seen for layer in layers])
    return {name: x.contiguous() for name, x in tensors.items()} | {"seen": seen}


def cache_from_tensors(net: Any, tensors: dict[str, Tensor]) -> Cache:
    """Rebuild the cache of ``net`` from :func:`cache_to_tensors`, on the device of ``net``.

    Raises:
        ValueError: If a tensor is missing or left over.
    """
    device = net.device
    with torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        cache: Cache = net(token, use_cache=True).past_key_values  # for the structure alone
    layers = states_of(cache)
    names = {*name_tensors(tuple(layer.state for layer in layers)), "seen"}
    if names != tensors.keys():
        raise ValueError(
            "the tensors are not a cache of this model: missing "
            f"{sorted(names - tensors.keys())}, left over {sorted(tensors.keys() - names)}."
        )
    for i, layer in enumerate(layers):
        layer.state = _fill(layer.state, str(i), tensors, device)
        layer.seen = int(tensors["seen"][i])
    return cache


def _fill(state: Any, name: str, tensors: dict[str, Tensor], device: torch.device) -> Any:
    if state is None or isinstance(state, Tensor):
        return state if state is None else tensors[name].to(device)
    names = getattr(state, "_fields", range(len(state)))
    parts = [
        _fill(part, f"{name}.{own}", tensors, device)
        for own, part in zip(names, state, strict=True)
    ]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
