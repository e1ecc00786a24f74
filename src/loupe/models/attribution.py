"""Where a classifier looks: heat maps over images, the first filters, and what they respond to."""

import numpy as np
import torch
from captum.attr import LayerGradCam
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from loupe.models.classifiers import Classifier

BATCH_SIZE = 8  # gradients keep every map of a batch


def compute_grad_cam(
    classifier: Classifier,
    images: UInt8[Tensor, "num_images channels height width"],
    targets: Int64[np.ndarray, " num_images"],
) -> Float[np.ndarray, "num_images map_height map_width"] | None:
    """Where the last map of a network speaks for a label: Grad-CAM of Selvaraju et al., arXiv:1610.02391, by captum.

    Values are in [0, 1], 1 where it speaks most in that image; a map lies over the part of the image that the network
    sees (`config.crop`), and is coarser than it. All are 0 where nothing speaks for the label.

    Args:
        targets: the label asked about, of each image.

    Returns:
        None for a network without such a map: a dense one, or one that ends in tokens.
    """
    layer = find_last_map(classifier)
    if layer is None:
        return None
    device = next(classifier.parameters()).device
    explain, asked = LayerGradCam(classifier, layer), torch.from_numpy(targets)
    parts = [
        explain.attribute(part.to(device), target=labels.to(device), relu_attributions=True).detach().cpu()
        for part, labels in zip(images.split(BATCH_SIZE), asked.split(BATCH_SIZE), strict=True)
    ]
    maps = torch.cat(parts)[:, 0].float()
    highest = maps.amax(dim=(1, 2), keepdim=True)
    scaled: np.ndarray = torch.where(highest > 0, maps / highest, 0).numpy()
    return scaled


@torch.no_grad()
def find_last_map(classifier: Classifier) -> nn.Module | None:
    """The last layer before the features are pooled or flattened whose output still is a map, of more than one place.

    None where the features are no map (batch, channels, height, width).
    """
    backbone, config = classifier.backbone, classifier.config
    maps: list[nn.Module] = []

    def keep(layer: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] * output.shape[3] > 1:
            maps.append(layer)

    blank = torch.zeros(
        1, config.channels, *config.crop, dtype=torch.uint8, device=next(classifier.parameters()).device
    )
    hooks = [layer.register_forward_hook(keep) for layer in backbone.modules()]
    try:
        features = backbone.forward_features(classifier.preprocess(blank))  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
    is_map = isinstance(features, Tensor) and features.dim() == 4 and features.shape[1] == backbone.num_features
    return maps[-1] if is_map and maps else None


def compute_filters(classifier: Classifier) -> UInt8[np.ndarray, "num_filters height width channels"] | None:
    """The kernels of the first convolution as pictures, of one channel or three; None for a network without any.

    Mid-grey is no weight; the largest weight of each filter, of either sign, is black or white.
    """
    layer = _find_first_convolution(classifier)
    if layer is None:
        return None
    kernels = layer.weight.detach().float().cpu().permute(0, 2, 3, 1)
    if kernels.shape[3] not in (1, 3):
        kernels = kernels.mean(dim=3, keepdim=True)
    highest = kernels.abs().amax(dim=(1, 2, 3), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    pictures: np.ndarray = (127.5 + 127.5 * kernels / highest).round().to(torch.uint8).numpy()
    return pictures


@torch.no_grad()
def compute_responses(
    classifier: Classifier, image: UInt8[Tensor, "channels height width"]
) -> UInt8[np.ndarray, "num_filters map_height map_width 1"] | None:
    """What the first convolution makes of one image, before anything follows; None for a network without any.

    Mid-grey is no response; the largest of each filter, of either sign, is black or white.
    """
    layer = _find_first_convolution(classifier)
    if layer is None:
        return None
    kept: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _layer, _input, output: kept.append(output.float().cpu().clone()))
    try:
        classifier(image[None].to(next(classifier.parameters()).device))
    finally:
        hook.remove()
    highest = kept[0][0].abs().amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    pictures: np.ndarray = (127.5 + 127.5 * kept[0][0] / highest).round().to(torch.uint8)[..., None].numpy()
    return pictures


def _find_first_convolution(classifier: Classifier) -> nn.Conv2d | None:
    return next((layer for layer in classifier.backbone.modules() if isinstance(layer, nn.Conv2d)), None)
