"""GradDrop in a training run, for a GradDrop adapter or for any other parameters that train."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from ..common.training.optimizer_watcher import observers
from ..common.training.pieces import piece_of
from .config import GradDropConfig
from .layer import GradDropLayer
from .mask_sampler import MaskSampler
from .masked_steps import MaskedParameter
from .parameter_masks import ParameterMasks, masks_for

_SAMPLE = 4096  # entries of a tensor that are compared with their earlier values


class GradDrop:
    """Announcer of epochs and steps to gradient masks, which also puts masks on models without a GradDrop adapter.

    A custom training loop needs two lines, the first before training and the second at the beginning of each epoch:

        graddrop = GradDrop(model, GradDropConfig.from_variant("GradDrop-Epoch", num_epochs=3))
        graddrop.set_epoch(epoch)

    Optimizer steps are counted automatically; `set_step` is for a run that is resumed.

    Args:
        model: A model with a GradDrop adapter, or any other model, such as one with a LoRA or SparseGrad adapter or
            one that is fine-tuned in full.
        config: None for the settings of the model's GradDrop adapter. Otherwise masks are put on every parameter that
            trains and is inside a transformer block or, with `target_modules`, inside one of these modules. GradDrop's
            layers are the model's blocks. Masked gradients are computed and then dropped; only a GradDrop adapter
            saves their computation.
        num_epochs: Number of epochs of the run; None for the configuration's.
        optimizer: Optimizer of the run. If given, a step by another optimizer is an error, because it is a sign that
            the run was interrupted.

    Masks that an earlier `GradDrop` has put on the same parameters are removed.

    Raises:
        ValueError: If there is nothing to mask, `config` is given for a model with a GradDrop adapter, or another
            `GradDrop` masks the same parameters for the same optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        config: GradDropConfig | None = None,
        num_epochs: int | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self._masks: ParameterMasks | None = None
        self._adapter_layers = [layer for layer in model.modules() if isinstance(layer, GradDropLayer)]
        if config is None:
            self.samplers = self._adapter_samplers()
        else:
            self._check_has_no_adapter()
            self._masks = masks_for(model, config)
            self.samplers = [self._masks.sampler]
        if num_epochs is not None:
            for sampler in self.samplers:
                sampler.set_num_epochs(num_epochs)
        self._remove_earlier_masks(optimizer)
        if optimizer is not None:
            for sampler in self.samplers:
                sampler.progress.bind(optimizer)
        self._before = [_sample(masked.parameter) for masked in self.masked_parameters()]
        if self._masks is not None:
            self._masks.start()

    def set_epoch(self, epoch: int) -> None:
        """Announce an epoch, counted from 0.

        Raises:
            ValueError: If the number of epochs is needed but not known, or `epoch` is not below it.
        """
        for sampler in self.samplers:
            sampler.set_epoch(epoch)

    def set_step(self, step: int) -> None:
        """Announce an optimizer step, counted from 0; from now on every step has to be announced."""
        for sampler in self.samplers:
            sampler.progress.set_step(step)

    def remove(self) -> None:
        """Remove the masks; a GradDrop adapter keeps its own masks but forgets everything that was announced."""
        if self._masks is not None:
            self._masks.remove()
        for sampler in self.samplers:
            sampler.reset()
        self._masks, self._before, self.samplers = None, [], []

    def masked_parameters(self) -> list[MaskedParameter]:
        """Return the parameters that this object masks itself; the deltas of GradDrop adapters are not among them."""
        return [] if self._masks is None else self._masks.masked_parameters()

    def report(self) -> dict[str, float]:
        """Return the shares of entries that are dropped, train and have moved.

        Returns:
            `rate`: share that the schedule drops now. `active`: share of the masked entries that train in this step;
            for element-wise masks the expected share. `moved`: share of the entries whose value has changed. In a
            GradDrop adapter every entry is compared with 0, in other parameters a sample with its values from when
            this object was created; of sharded parameters, what this rank has.

        Raises:
            ValueError: If `remove` was called.
        """
        if not self.samplers or (self._masks is not None and not self._masks.places):
            raise ValueError("there is nothing to report: `remove` was called, or another `GradDrop` masks the model")
        total = active = moved = 0.0
        for masked, now_moved in self._moved():
            count = piece_of(masked.parameter).size
            total += count
            active += count * masked.sampler.mask(masked.name, masked.block).share
            moved += count * now_moved
        return {"rate": self.samplers[0].rate, "active": active / total, "moved": moved / total}

    def _adapter_samplers(self) -> list[MaskSampler]:
        samplers = {
            id(sampler): sampler
            for layer in self._adapter_layers
            for adapter_name, sampler in layer.graddrop_sampler.items()
            if adapter_name in layer.active_adapters
        }
        if not samplers:
            raise ValueError(
                "this model has no active GradDrop adapter: give a `GradDropConfig` to mask whatever else trains"
            )
        return list(samplers.values())

    def _check_has_no_adapter(self) -> None:
        if self._adapter_layers:
            raise ValueError(
                "this model has a GradDrop adapter with settings of its own: leave `config` out to use those"
            )

    def _remove_earlier_masks(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Remove the masks that an earlier `GradDrop` has put on the same parameters, as two masks would multiply.

        Raises:
            ValueError: If the earlier `GradDrop` serves the run of `optimizer`.
        """
        own = {id(masked.parameter) for masked in self.masked_parameters()}
        for other in observers():
            if not isinstance(other, ParameterMasks):
                continue
            if any(id(masked.parameter) in own for masked in other.masked_parameters()):
                if optimizer is not None and other.sampler.progress.is_bound_to(optimizer):
                    raise ValueError("two `GradDropCallback`s mask the same parameters in one run: use one of them")
                other.remove()

    def _moved(self) -> Iterator[tuple[MaskedParameter, float]]:
        for masked, (first_before, before) in zip(self.masked_parameters(), self._before, strict=True):
            first, now = _sample(masked.parameter)
            before = before[first - first_before :][: now.numel()].to(now.device)
            yield masked, torch.count_nonzero(now != before).item() / max(now.numel(), 1)
        for layer in self._adapter_layers:
            for masked in layer.masked_parameters():
                if any(masked.sampler is sampler for sampler in self.samplers):
                    values = piece_of(masked.parameter).values
                    yield masked, torch.count_nonzero(values).item() / max(values.numel(), 1)


def _sample(parameter: nn.Parameter) -> tuple[int, torch.Tensor]:
    """Return a sample of what this rank has of a parameter, and its position in the sample of the whole parameter."""
    piece = piece_of(parameter)
    distance = max(-(-piece.size // _SAMPLE), 1)
    first = -(-piece.start // distance)
    return first, piece.values[first * distance - piece.start :: distance].clone()
