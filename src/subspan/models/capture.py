"""Hidden states taken out of any torch module by layer name, one batch at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor, nn

from subspan.base.modules import evaluation

from .checkpointing import is_detached, is_recomputing
from .layers import Layers, first_tensor, is_single, layer_names
from .layout import Layout, channels_last, check_layout, padded, samples_first, samples_of

Pool = Literal["mean", "sum", "last", "first", "rows", "none"]
Site = Literal["output", "input"]


class _StopForward(BaseException):
    """Ends a forward pass early. Not an Exception, so that models which catch those let it through."""


class Capture(Mapping[str, Tensor]):
    """The states of some layers during forward passes: a mapping from layer name to tensor, as `capture` makes it.

    Used as a context manager; the hooks are gone when the block is left, and what was captured stays readable.

    Parameters
    ----------
    model, layers, site, item, transform
        As in `capture`.

    Attributes
    ----------
    names
        Of the layers.
    samples
        Number of samples of the latest pass, where it is known.

    Raises
    ------
    ValueError
        For another site, and layers that there are not.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import Capture
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> with Capture(model, ["1", "2"], site="input") as states:
    ...     found = {name: tuple(value.shape) for name, value in states.run(torch.randn(5, 4)).items()}
    >>> found
    {'1': (5, 3), '2': (5, 3)}
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers,
        *,
        site: Site = "output",
        item: int = 0,
        transform: Callable[[Tensor], Tensor] | Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        if site not in ("output", "input"):
            raise ValueError(f"site: 'output' or 'input', got {site!r}")
        self.model = model
        self.names = layer_names(model, layers)
        self.site = site
        self.item = item
        transform = torch.clone if transform is None else transform
        self._transforms = transform if isinstance(transform, Mapping) else dict.fromkeys(self.names, transform)
        self._states: dict[str, Tensor] = {}
        self._present: dict[str, Tensor | None] = {}
        self.samples: int | None = None
        self._with_gradient = False
        self._hooks: list[Any] = []
        self._running = self._stop_early = False

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(f"{name!r} is not captured; captured are {', '.join(self.names)}")
        if name not in self._states:
            raise KeyError(f"{name!r} has not been reached by a forward pass yet")
        return self._states[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.names if name in self._states)

    def __len__(self) -> int:
        return len(self._states)

    def __enter__(self) -> Capture:
        modules = dict(self.model.named_modules())
        try:
            self._hooks.append(self.model.register_forward_pre_hook(self._begin, with_kwargs=True))
            for name in self.names:
                self._hooks.append(self._register(name, modules[name]))
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def clear(self) -> None:
        """Forget the states, so that the next reading is of a pass after this."""
        self._states.clear()

    def remove(self) -> None:
        """Take every hook off the model; the captured states stay readable."""
        while self._hooks:
            self._hooks.pop().remove()

    def run(
        self, batch: Any, *, early_exit: bool = True, forward: Callable[[nn.Module, Any], object] | None = None
    ) -> Capture:
        """One forward pass over `batch`, ended after the last layer asked for; returns this mapping.

        A tensor is passed as the one argument, a mapping as keywords, of a tuple or list only the first entry (labels
        are ignored); `forward(model, batch)` calls the model otherwise. A layer called several times gives its first
        state. Raises ValueError for a layer that the pass does not reach.
        """
        if not self._hooks:
            raise RuntimeError("run: the capture is closed; use it inside its with-block")
        self._states.clear()
        self._running, self._stop_early = True, early_exit
        self.samples, self._with_gradient = samples_of(batch), torch.is_grad_enabled()
        try:
            with contextlib.suppress(_StopForward):
                (forward or call_model)(self.model, to_device_of(self.model, batch))
        finally:
            self._running = False
        missed = [name for name in self.names if name not in self._states]
        if missed:
            raise ValueError(f"layers: the forward pass does not reach {', '.join(map(repr, missed))}")
        return self

    def by_sample(self, name: str, layout: Layout = "auto") -> Tensor:
        """A layer's states with the samples as first axis, also where it has tokens first; see `models.layout`."""
        return samples_first(self.model, name, self[name], self.samples, layout)

    def present(self, name: str) -> Bool[Tensor, "b t"] | None:
        """Which tokens of a layer's states are no padding, where the layer gave a nested tensor; else None."""
        return self._present.get(name)

    def tokens(
        self, name: str, states: Tensor, mask: Tensor | None, layout: Layout = "auto"
    ) -> tuple[Tensor, Tensor | None]:
        """In a hook: states with the samples as first axis, and the mask for those of them that are no padding."""
        return (
            samples_first(self.model, name, states, self.samples, layout),
            _of_present(mask, self.present(name)),
        )

    def _begin(self, called: nn.Module, args: Any, kwargs: Any) -> None:
        if called is self.model:
            self.samples, self._with_gradient = samples_of([*args, kwargs]), torch.is_grad_enabled()

    def _register(self, name: str, module: nn.Module) -> Any:
        # A deep copy of the model (an average of its weights) carries the hooks along; its states are not asked for.
        def record_input(called: nn.Module, args: Any, kwargs: Any) -> None:
            if called is module:
                self._record(name, args or kwargs)

        def record_output(called: nn.Module, args: Any, output: object) -> None:
            if called is module:
                self._record(name, output)

        if self.site == "input":
            return module.register_forward_pre_hook(record_input, with_kwargs=True)
        return module.register_forward_hook(record_output)

    def _record(self, name: str, value: object) -> None:
        if name in self._states if self._running else is_recomputing():
            return
        try:
            if self._with_gradient and is_detached():
                raise ValueError(
                    "runs under re-entrant checkpointing, where its states have no gradients; use use_reentrant=False, "
                    "or torch.no_grad() where none are needed"
                )
            states, self._present[name] = padded(first_tensor(value, self.item))
            self._states[name] = self._transforms[name](states)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error
        if self._running and self._stop_early and len(self._states) == len(self.names):
            raise _StopForward


def capture(
    model: nn.Module,
    layers: Layers,
    *,
    site: Site = "output",
    item: int = 0,
    transform: Callable[[Tensor], Tensor] | Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Capture:
    """Context manager that records what layers give, or get, in each forward pass.

    Inside the block either call the model yourself and read `states[name]` (the latest pass; gradients flow), or
    `states.run(batch)`, which stops after the last layer needed. States are as the layer has them, tokens (t, b, d)
    too, except that nested tensors are padded with zeros. The second run of a checkpointed part is not recorded. Hooks
    are gone when the block is left.

    Parameters
    ----------
    model
        Any torch module.
    layers
        As in `layer_names`.
    site
        What the layers give ("output") or get ("input": the first positional argument, or the first tensor among the
        keywords).
    item
        Entry of a tuple output.
    transform
        Applied at once in the hook, one function or one a layer, by name. None: a copy, so that later in-place
        operations of the model do not change it.

    Returns
    -------
    Capture, a mapping from the names of layers that were reached.

    Raises
    ------
    ValueError
        For another site and layers that there are not; in a pass under re-entrant checkpointing that asks for
        gradients.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import capture
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    >>> with capture(model, ["0", -1]) as states:
    ...     y = model(torch.randn(5, 4))
    >>> states["0"].shape, bool((states["2"] == y).all())
    (torch.Size([5, 3]), True)
    """
    return Capture(model, layers, site=site, item=item, transform=transform)


def iterate_representations(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Layers,
    *,
    site: Site = "output",
    item: int = 0,
    pool: Pool = "mean",
    mask: str | Callable[[Any], Tensor] | None = "attention_mask",
    drop_tokens: int = 0,
    layout: Layout = "auto",
    early_exit: bool = True,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
) -> Iterator[Any]:
    """Yield the representations of one batch after another; memory does not grow with the number of batches.

    The model runs without gradients and in evaluation mode; its training flags are put back after every batch.

    Parameters
    ----------
    model
        Any torch module.
    batches
        What the model takes: a tensor, a mapping of keywords, or a tuple or list of which the first entry counts.
    layers
        As in `layer_names`.
    site, item
        As in `capture`.
    pool
        Over the selected tokens (b, t, d) or the positions of a feature map (b, c, h, w): "mean", "sum", "last",
        "first" → (b, d); "rows" → (selected, d); "none" → the layer's own tensor. States (b, d) are passed on as they
        are.
    mask
        Which tokens are selected: a key of the batch (a key other than "attention_mask" is not passed to the model) or
        a function of the batch, giving (b, t), nonzero = selected.
    drop_tokens
        The first so many selected tokens of each sequence are left out (CLS, registers).
    layout
        "channels_first" or "channels_last" of maps; "tokens_first" for tokens (t, b, d), which "auto" also finds out
        (ValueError where it cannot). What is yielded has samples first.
    early_exit
        End the pass after the last layer asked for.
    dtype, device
        Of what is yielded; None keeps the model's.
    forward
        `forward(model, batch)`, how to call the model otherwise.

    Yields
    ------
    A tensor where `layers` is one name or index, else a dict from layer name to tensor.

    Raises
    ------
    ValueError
        For values out of range, a layer that is not reached, and a sample of which no token is selected.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import iterate_representations
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh())
    >>> batches = [torch.randn(2, 5, 4), torch.randn(3, 5, 4)]
    >>> [tuple(found.shape) for found in iterate_representations(model, batches, "0")]
    [(2, 3), (3, 3)]
    """
    if pool not in ("mean", "sum", "last", "first", "rows", "none"):
        raise ValueError(f"pool: one of mean, sum, last, first, rows, none, got {pool!r}")
    if drop_tokens < 0:
        raise ValueError(f"drop_tokens: a count of 0 or more, got {drop_tokens}")
    check_layout(layout)
    names = layer_names(model, layers)
    single = is_single(layers)

    def reduce(captured: Capture, name: str, selected: Tensor | None, states: Tensor) -> Tensor:
        states, selected = captured.tokens(name, states, selected, layout)
        pooled = pool_states(states, selected, pool=pool, drop_tokens=drop_tokens, layout=layout)
        moved = pooled.to(device=device, dtype=dtype)
        shared = moved.untyped_storage().data_ptr() == states.untyped_storage().data_ptr()
        return moved.clone() if shared else moved

    for batch in batches:
        inputs, selected = split_mask(batch, mask)
        transforms: dict[str, Callable[[Tensor], Tensor]] = {}
        captured = Capture(model, names, site=site, item=item, transform=transforms)
        transforms |= {name: partial(reduce, captured, name, selected) for name in names}
        with torch.no_grad(), evaluation(model), captured:
            found = dict(captured.run(inputs, early_exit=early_exit, forward=forward))
        yield found[names[0]] if single else found


def pool_states(
    states: Tensor,
    mask: Tensor | None = None,
    *,
    pool: Pool = "mean",
    drop_tokens: int = 0,
    layout: Layout = "auto",
) -> Tensor:
    """Pool tokens (b, t, d) or a feature map to a vector a sample, or to rows.

    Parameters
    ----------
    states
        Tokens or a map; states (b, d) are returned as they are.
    mask
        (b, t), nonzero = selected; None: all.
    pool, drop_tokens, layout
        As in `iterate_representations`.

    Returns
    -------
    Tensor (b, d), or rows (selected, d); sums run in float32 or wider.

    Raises
    ------
    ValueError
        Where a sample has no selected token, or the mask another shape.

    Examples
    --------
    >>> import torch
    >>> from subspan.models import pool_states
    >>> pool_states(torch.tensor([[[1.0], [2.0], [9.0]]]), torch.tensor([[1, 1, 0]]))
    tensor([[1.5000]])
    """
    if states.ndim <= 2:
        return states
    if states.ndim > 3:
        if pool == "none":
            return states
        states = channels_last(states, layout).flatten(1, -2)
        mask = None
    if pool == "none":
        return states[:, drop_tokens:]
    selected = select_tokens(states, mask, drop_tokens)
    if pool == "rows":
        return states[selected]
    counts = selected.sum(1)
    if not bool((counts > 0).all()):
        empty = torch.nonzero(counts == 0).flatten().tolist()
        raise ValueError(f"mask: no token is selected in sample {', '.join(map(str, empty))} of the batch")
    if pool in ("last", "first"):
        positions = torch.arange(states.shape[1], device=states.device).expand(selected.shape)
        if pool == "last":
            chosen = positions.masked_fill(~selected, -1).amax(1)
        else:
            chosen = positions.masked_fill(~selected, states.shape[1]).amin(1)
        return states[torch.arange(len(states), device=states.device), chosen]
    wide = states.to(torch.promote_types(states.dtype, torch.float32))
    total = wide.masked_fill(~selected[..., None], 0).sum(1)
    return total if pool == "sum" else total / counts[:, None]


def _of_present(selected: Tensor | None, present: Tensor | None) -> Tensor | None:
    """The mask for states of which `present` alone are tokens, maybe fewer than the mask has columns."""
    if present is None or selected is None:
        return selected if present is None else present
    length = present.shape[1]
    selected = selected.to(present.device) != 0
    if bool(selected[:, length:].any()) or bool((selected[:, :length] & ~present).any()):
        raise ValueError("mask: selects tokens that the model takes for padding")
    return selected[:, :length]


def select_tokens(states: Shaped[Tensor, "b t d"], mask: Tensor | None, drop_tokens: int = 0) -> Bool[Tensor, "b t"]:
    """The mask as booleans, without the first `drop_tokens` selected tokens of each sequence; all tokens where None."""
    if mask is None:
        selected = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
    else:
        if tuple(mask.shape) != tuple(states.shape[:2]):
            raise ValueError(f"mask: shape {tuple(states.shape[:2])} is needed here, got {tuple(mask.shape)}")
        selected = mask.to(device=states.device) != 0
    return selected & (selected.cumsum(1) > drop_tokens) if drop_tokens else selected


def device_of(model: nn.Module) -> torch.device | None:
    """Device of the model's first parameter or buffer, None where it has neither."""
    for tensor in model.parameters():
        return tensor.device
    for tensor in model.buffers():
        return tensor.device
    return None


def to_device_of(model: nn.Module, batch: Any) -> Any:
    """The batch's tensors on the model's device; mappings, tuples and lists are kept."""
    device = device_of(model)
    return batch if device is None else _move(batch, device)


def call_model(model: nn.Module, batch: Any) -> object:
    """Call the model on a tensor, on a mapping as keywords, or on the first entry of a tuple or list."""
    if isinstance(batch, tuple | list):
        if not batch:
            raise ValueError("batches: a batch is an empty tuple or list")
        batch = batch[0]
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _move(entry, device) for key, entry in value.items()}
    if isinstance(value, tuple | list):
        return [_move(entry, device) for entry in value]
    return value


def split_mask(batch: Any, mask: str | Callable[[Any], Tensor] | None) -> tuple[Any, Tensor | None]:
    """What goes into the model, and the token mask."""
    if mask is None:
        return batch, None
    if callable(mask):
        return batch, mask(batch)
    if not isinstance(batch, Mapping):
        if mask != "attention_mask":
            raise ValueError(f"mask: {mask!r} is a key, but the batch is {type(batch).__name__}, not a mapping")
        return batch, None
    if mask == "attention_mask":
        return batch, batch.get(mask)
    if mask not in batch:
        raise ValueError(f"mask: the batch has no {mask!r}; it has {', '.join(map(str, batch))}")
    return {key: value for key, value in batch.items() if key != mask}, batch[mask]
