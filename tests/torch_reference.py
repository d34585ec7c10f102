"""Reference networks from torch's libraries, with random weights and random BatchNorm statistics."""

import contextlib
import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")

# Wheels of torchvision that lack its compiled operators fail at import. Declaring the two operators for which it
# registers fakes is enough; where they exist already, nothing is needed. They live as long as this handle.
_OPERATORS = torch.library.Library("torchvision", "FRAGMENT")
for _schema in (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
):
    with contextlib.suppress(RuntimeError):
        _OPERATORS.define(_schema)


def randomize(model, seed=0):
    """Draws every weight and BatchNorm statistic anew, at a scale that keeps activations near one; eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.ndim == 1 and name.endswith("weight"):  # scales of normalisation layers
                tensor.copy_(1.0 + 0.1 * noise)
            elif tensor.ndim <= 1 or not tensor.is_floating_point():
                tensor.copy_(0.1 * noise)
            elif tensor.ndim == 3:  # tokens and position embeddings
                tensor.copy_(0.5 * noise)
            else:
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
    return model.eval()


def save(model, path):
    """Writes the state dict as the file a user would have; returns the path."""
    torch.save(model.state_dict(), path)
    return path


def record(model, modules, images):
    """Runs NHWC numpy images: (logits or the output's logits, {name: output of the module, NHWC or [B, N, D]})."""
    out = {}

    def keep(name, module, inputs, result):
        result = result[0] if isinstance(result, tuple) else result
        out[name] = np.moveaxis(result.numpy(), 1, -1) if result.ndim == 4 else result.numpy()

    hooks = [module.register_forward_hook(functools.partial(keep, name)) for name, module in modules.items()]
    with torch.no_grad():
        result = model(torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1))))
    for hook in hooks:
        hook.remove()
    return getattr(result, "logits", result).numpy(), out
