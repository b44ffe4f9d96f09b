"""The definition of calibration that the package is held to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qat_compat.devices import forked_rng
from qat_compat.testing.modes import DefaultInputs, Inputs, eval_form
from qat_compat.testing.quantizers import fake_quantizers, intx_quantizers, observers, plain_buffers


def native_calibration(model: nn.Module, batches: Iterable[Any], inputs: Inputs | None = None) -> None:
    """Calibrate a prepared model with nothing but its own quantizers.

    This is the definition that the package is held to: eval mode, `torch.no_grad()`, observers on, fake-quant off, the
    batches in order; then `scale, zero_point = quantizer.calculate_qparams()` is written into the quantizer's buffers.
    Every flag, the training mode, the RNG and every buffer that is no quantizer's (BN statistics,
    `num_batches_tracked`) are then as before.

    Exported programs (PT2E) run in their eval form, made by `move_exported_model_to_eval` on a copy of the graph that
    shares the modules. torchao's `IntxFakeQuantizer` has no observer: static and range-learning ones take their values
    in a forward of the first batch with fake-quant on (`initialize_fake_quantizers`), dynamic ones need nothing.

    Example:
        >>> import torch
        >>> from torch.ao.quantization import FakeQuantize, MinMaxObserver
        >>> model = torch.nn.Sequential(FakeQuantize(observer=MinMaxObserver), torch.nn.Dropout())
        >>> native_calibration(model, [torch.tensor([0.0, 2.55])])
        >>> round(model[0].scale.item(), 6), model.training, model[0].fake_quant_enabled.item()
        (0.01, True, 1)

    Args:
        model: Prepared for QAT by torch.ao (eager, FX), torchao PT2E or torchao `QATConfig`.
        batches: What the model is driven with. torchao's lazy quantizers take the first one only.
        inputs: `batch -> (args, kwargs)`. Default: a tensor is the only argument, a mapping holds keyword arguments, a
            tuple or list holds positional arguments and is cut to as many as `forward` takes.
    """
    observing = list(fake_quantizers(model))
    lazy = [quantizer for quantizer in intx_quantizers(model) if not quantizer.config.is_dynamic]
    if not observing and not lazy and not observers(model):
        return
    switches = [(q, q.observer_enabled.clone(), q.fake_quant_enabled.clone()) for q in observing]
    intx = [(q, q.enabled) for q in intx_quantizers(model)]
    others = [(buffer, buffer.clone()) for buffer in plain_buffers(model)]
    with eval_form(model) as runner, forked_rng(), torch.no_grad():
        try:
            for quantizer, *_ in switches:
                quantizer.observer_enabled.fill_(1)
                quantizer.fake_quant_enabled.fill_(0)
            for quantizer, _ in intx:
                quantizer.enabled = True
            for index, batch in enumerate(batches):
                if not observing and not observers(model) and index:
                    break
                args, kwargs = (inputs or DefaultInputs(model))(batch)
                for quantizer in lazy:
                    # What `initialize_fake_quantizers` does, which cannot pass keyword arguments.
                    quantizer._initialized = True
                runner(*args, **kwargs)
            for quantizer in observing:
                scale, zero_point = quantizer.calculate_qparams()
                _write(quantizer.scale, scale)
                _write(quantizer.zero_point, zero_point)
        finally:
            for quantizer, observe, fake in switches:
                quantizer.observer_enabled.copy_(observe)
                quantizer.fake_quant_enabled.copy_(fake)
            for quantizer, enabled in intx:
                quantizer.enabled = enabled
            for buffer, value in others:
                buffer.copy_(value)


def _write(buffer: Tensor, value: Tensor) -> None:
    if buffer.shape != value.shape:
        buffer.resize_(value.shape)
    buffer.copy_(value)
